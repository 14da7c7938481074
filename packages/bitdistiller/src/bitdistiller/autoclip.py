"""``python -m bitdistiller.autoclip MODEL DATASET --w_bit 2 ...``: search the clipping ranges."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from harness import cli
from harness.checkpoint import layouts
from harness.errors import UserError
from harness.settings import BOS, IGNORE, Shared, flag, make_parser, word

EXAMPLES = """\
examples:
  python -m bitdistiller.autoclip tiny-llama stdlib --w_bit 2 --n_samples 16 --out tiny-clip-w2
  python -m bitdistiller.autoclip meta-llama/Llama-2-7b-hf pileval --w_bit 2 --q_group_size 128 \\
      --dump_clip clip_cache/llama-2-7b.safetensors
  python -m bitdistiller.autoclip MODEL c4 --quant_type nf3 --out nf3
  torchrun --nproc-per-node 2 -m bitdistiller.autoclip MODEL c4 --out w2   windows dealt to 2 ranks
then:
  harness eval tiny-clip-w2 --ppl stdlib
  python -m bitdistiller.train tiny-llama --clip tiny-clip-w2 ...
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """what to make"""

    w_bit: int | None = flag(None, "bits per weight, 2-8 (default 2; nf3: 3, nf4: 4)")
    q_group_size: int = flag(
        128, "columns that share a range (default 128); -1 is one range per row"
    )
    quant_type: str = flag(
        "int", "asymmetric integers (default), or NormalFloat with a scale for each sign",
        choices=["int", "nf3", "nf4"],
    )  # fmt: skip
    format: str | None = flag(
        None, "how the checkpoint is stored (default compressed-tensors: packed, loads in "
        "transformers and vLLM; gptq: for GPTQ kernels; dense: rounded values at full size, "
        "default and only one for NormalFloat)", choices=layouts.QUANTIZED,
    )  # fmt: skip
    dump_clip: str | None = flag(None, "copy clip.safetensors to FILE too", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class How:
    """how"""

    n_samples: int = flag(
        128, "calibration windows (default 128)",
        names=["--n_samples", "--n-samples", "--nsamples"],
    )  # fmt: skip
    seqlen: int | None = flag(None, "tokens per window (default 1024, or the model's context)")
    calib_dataset: str | None = flag(
        None, "the original's spelling of DATASET (pile is pileval)", metavar="DATASET"
    )
    run_clip: bool = flag(False, "the original's; always done here")
    ignore: list[str] = flag([], **IGNORE)
    bos: str = flag("auto", **BOS)


@dataclass(frozen=True, kw_only=True)
class Settings(Result, How, Shared):
    """Asymmetric clipping: for every group of weights the range, its ends shrunk independently,
    whose rounding hurts the layer's output least. Writes the clipped and rounded checkpoint, and in
    it clip.safetensors, from which training starts.
    """

    SEPARATORS: ClassVar[tuple[str, ...]] = ("_", "-")

    model: str = word("model", "folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    dataset: str | None = word(
        "dataset", "calibration text: pileval (default), wikitext2, ptb, c4, alpaca, dolly, stdlib "
        "(embedded), or a local .txt/.jsonl/.parquet/.csv file or folder", None,
    )  # fmt: skip

    @property
    def text(self) -> str:
        """The dataset from its two spellings.

        Raises:
            UserError: they do not agree.
        """
        named = {"pile": "pileval"}.get(self.calib_dataset, self.calib_dataset)
        if self.dataset and named and self.dataset != named:
            raise UserError(
                f"DATASET {self.dataset} contradicts --calib_dataset {self.calib_dataset}; give "
                "one of them."
            )
        return self.dataset or named or "pileval"


def clip(
    model, dataset: str = "pileval", *, command: str = "bitdistiller.clip(...)", **flags
) -> list[dict]:
    """The command from Python: its flags, with underscores, as keywords (out=, w_bit=, ...).

    Returns:
        One row per linear: block, name, error and error_unclipped (relative, see
        autoclip_run.py), range_kept (mean over the groups).

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    from bitdistiller.autoclip_run import run

    return run(Settings(model=str(model), dataset=dataset, **flags), command)


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    return make_parser(Settings, "bitdistiller.autoclip", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from bitdistiller.autoclip_run import make_grid, run
    from harness import distributed
    from harness.checkpoint import card

    kind = settings.quant_type
    if kind == "int":
        kind = f"w{make_grid(settings.w_bit, settings.q_group_size, kind).bits}"
    out = settings.out or f"{Path(settings.model).name}-clip-{kind}"
    with distributed.group():
        rows = run(replace(settings, out=out), card.command_line())
        lead = distributed.rank() == 0
    if lead and not settings.dry_run:
        _print_table(rows)
        print(f"written to {out}")


def _print_table(rows: list[dict]) -> None:
    """Per kind of linear, means over the blocks: relative output error, share of the range kept."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["name"].split(f".{row['block']}.", 1)[1], []).append(row)
    print("| linear | error, full range | error, clipped | range kept |")
    print("| --- | ---: | ---: | ---: |")
    for kind, some in kinds.items():
        before, after, kept = (
            sum(row[key] for row in some) / len(some)
            for key in ("error_unclipped", "error", "range_kept")
        )
        print(f"| {kind} | {before:.3g} | {after:.3g} | {kept:.1%} |")
    print("error: |change of a group's output|² / |its output|², groups of columns summed apart")


if __name__ == "__main__":
    sys.exit(main())
