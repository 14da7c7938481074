"""What the three commands share: settings, the run, and the report at its end. No torch up here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from harness import cli
from harness.checkpoint import layouts
from harness.errors import UserError
from harness.settings import BOS, IGNORE, Shared, flag, word

PATTERNS = {"unstructured": (0, 0), "2:4": (2, 4), "4:8": (4, 8)}
TRUE_SEQUENTIAL = (
    "prune a block's layers one after another, each on the effect of the earlier ones; here also "
    "the faster order"
)


@dataclass(frozen=True, kw_only=True)
class Amount:
    """how much goes"""

    sparsity: float | None = flag(
        None, "share of the weights to drop, 0 to below 1 (.5 costs little, .6 some; above it try "
        "--ratios owl)", names=["--sparsity", "--sparsity_ratio"],
    )  # fmt: skip
    prunen: int = flag(
        0, "with --prunem: how many of every PRUNEM consecutive weights of a row are DROPPED, as "
        "in SparseGPT (1 of 4 is 25 %% zeros; the usual N:M name counts the ones that stay)",
    )  # fmt: skip
    prunem: int = flag(0, "length of that pattern, 4 or 8")
    sparsity_type: str | None = flag(
        None, "Wanda's spelling: 2:4 is --prunen 2 --prunem 4", choices=list(PATTERNS)
    )
    ratios: str = flag(
        "uniform", "the same sparsity for every block (default), or OWL: blocks with more outliers "
        "keep more, the mean stays; costs one more pass over the text", choices=["uniform", "owl"],
    )  # fmt: skip
    owl_lambda: float = flag(
        0.08, "OWL: the most and the least pruned block differ by twice this (default .08)"
    )
    owl_m: float = flag(
        5.0, "OWL: a weight is an outlier above this many times its block's mean (default 5)"
    )


@dataclass(frozen=True, kw_only=True)
class Which:
    """which linears"""

    minlayer: int = flag(-1, "first block (default: all)")
    maxlayer: int = flag(1000, "first block that is not pruned")
    prune_only: str = flag(
        "", "only linears whose name holds PART, e.g. mlp or down_proj", metavar="PART"
    )
    invert: bool = flag(False, "prune what these three flags leave, leave the rest")


@dataclass(frozen=True, kw_only=True)
class How:
    """how"""

    nsamples: int = flag(128, "calibration windows (default 128)")
    seqlen: int | None = flag(
        None, "tokens per window (default: the model's context, at most 2048)"
    )
    format: str = flag(
        "dense", "how the result is stored: dense (default, loads everywhere, saves nothing) or "
        "bitmask (zeros are not stored; only the harness reads it)", choices=layouts.PRUNED,
    )  # fmt: skip
    ignore: list[str] = flag([], **IGNORE)
    bos: str = flag("auto", **BOS)


@dataclass(frozen=True, kw_only=True)
class Pruning(Amount, Which, How, Shared):
    """What the three commands are told; each adds its own, and the name of its method."""

    SEPARATORS: ClassVar[tuple[str, ...]] = ("_",)

    model: str = word("model", "folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    dataset: str | None = word(
        "dataset", "text: wikitext2, ptb, c4, pileval, alpaca, dolly, stdlib (embedded), or a "
        "local .txt/.jsonl/.parquet/.csv file or folder; magnitude pruning needs it for --ratios "
        "owl only", None,
    )  # fmt: skip

    @property
    def pattern(self) -> tuple[int, int]:
        """(n, m) from its two spellings.

        Raises:
            UserError: they do not agree.
        """
        given = (self.prunen, self.prunem)
        if self.sparsity_type is None:
            return given
        wanted = PATTERNS[self.sparsity_type]
        if given not in ((0, 0), wanted):
            raise UserError(
                f"--sparsity_type {self.sparsity_type} contradicts --prunen {self.prunen} --prunem "
                f"{self.prunem}; give one of them."
            )
        return wanted


def run(make: Callable[[], Pruning]) -> int:
    """Make the settings, prune, report, and return the exit code."""
    return cli.run(lambda: _run(make()))


def _run(settings: Pruning) -> None:
    method, amount = settings.method, _amount(settings.sparsity, *settings.pattern)
    out = settings.out or f"{Path(settings.model).name}-{method}-{amount}"

    from harness import distributed
    from harness.checkpoint import card
    from sparse.layerwise import run

    with distributed.group():
        rows = run(replace(settings, out=out), card.command_line())
        lead = distributed.rank() == 0
    if lead and not settings.dry_run:
        print_table(rows)
        print(honest_line(rows, Path(out), settings.format))
        print(f"written to {out}")


def _amount(sparsity: float | None, n: int, m: int) -> str:
    """The end of a default name: 50, 2of4."""
    return f"{n}of{m}" if m else f"{100 * (sparsity or 0):g}"


def print_table(rows: list[dict]) -> None:
    """Sparsity and relative output error per kind of linear, over the blocks."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["name"].split(f".{row['block']}.", 1)[1], []).append(row)
    print("| linear | sparsity | mean error | worst error | in block |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, of_kind in kinds.items():
        zeros = sum(row["zeros"] for row in of_kind) / sum(row["weights"] for row in of_kind)
        cells = ["", "", ""]
        if of_kind[0]["error"] is not None:
            worst = max(of_kind, key=lambda row: row["error"])
            mean = sum(row["error"] for row in of_kind) / len(of_kind)
            cells = [f"{mean:.3g}", f"{worst['error']:.3g}", str(worst["block"])]
        print(f"| {kind} | {zeros:.4f} | {' | '.join(cells)} |")


def honest_line(rows: list[dict], out: Path, layout: str) -> str:
    """What the zeros are worth: shares, bytes on disk, and that nothing here runs them faster."""
    from harness.checkpoint import load
    from harness.metrics import footprint

    config = load.load_config(out)
    size = footprint.stored_size(out, config)
    packed = f", {size.disk_bytes / 1e6:.3f} MB as {layout}" if layout in layouts.PACKED else ""
    item = config.dtype.itemsize
    zeros, weights = (sum(row[key] for row in rows) for key in ("zeros", "weights"))
    dense = size.parameters * item
    bitmask = dense - sum(max(0, row["zeros"] * item - row["weights"] / 8) for row in rows)
    sizes = f"{dense / 1e6:.3f} MB dense, {bitmask / 1e6:.3f} MB as bitmask{packed}"
    return (
        f"{zeros / weights:.1%} of the pruned linears, {zeros / size.parameters:.1%} of the model "
        f"are zeros; on disk {sizes}. It runs no faster: no kernel here skips unstructured or n:m "
        "zeros (on a CPU, CSR wins only near 90 % of them)."
    )
