"""``python -m gptq MODEL DATASET --wbits 4 ...``: parse, quantize and, if asked, evaluate."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from harness import cli
from harness.checkpoint import layouts
from harness.errors import Finished, UserError
from harness.settings import BOS, IGNORE, Shared, flag, make_parser, word

EXAMPLES = """\
examples:
  python -m gptq tiny-llama stdlib --wbits 3 --groupsize 128 --out tiny-w3
  python -m gptq facebook/opt-125m c4 --wbits 4 --groupsize 128 --act-order --true-sequential \\
      --out opt-125m-w4
  python -m gptq MODEL c4 --wbits 4 --sym --groupsize 128 --format gptq --out w4-for-kernels
  torchrun --nproc-per-node 2 -m gptq MODEL c4 --wbits 4 --out w4      windows dealt to 2 ranks
then:
  harness eval opt-125m-w4 --ppl wikitext2 c4 --speed
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """what to make"""

    wbits: int = flag(4, "bits per weight, 2-8 (default 4)")
    groupsize: int = flag(
        -1, "columns that share a scale; -1 is one scale per row (default), 128 is usual"
    )
    sym: bool = flag(False, "symmetric grid, no zero points")
    format: str = flag(
        "compressed-tensors", "how the result is stored (default compressed-tensors: packed, loads "
        "in transformers and vLLM; gptq: for GPTQ kernels; dense: quantized values at full size)",
        choices=layouts.QUANTIZED,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class How:
    """how"""

    percdamp: float = flag(
        0.01, "damping, as a fraction of the Hessian's mean diagonal (default 0.01)",
        check=(lambda value: 0 < value <= 1, "expected a fraction above 0, at most 1"),
    )  # fmt: skip
    nsamples: int = flag(128, "calibration windows (default 128)")
    seqlen: int | None = flag(
        None, "tokens per window (default: the model's context, at most 2048)"
    )
    act_order: bool = flag(False, "round the most important columns first; helps most at 2-3 bits")
    true_sequential: bool = flag(
        False, "quantize a block's layers one after another, each on the effect of the earlier "
        "ones; here also the faster order",
    )  # fmt: skip
    static_groups: bool = flag(
        False, "group grids from the original weights (implied by --act-order in packed formats)"
    )
    nearest: bool = flag(False, "plain round-to-nearest, the baseline; no data")
    mse: bool = flag(False, "search each range by its error")
    ignore: list[str] = flag([], **IGNORE)
    bos: str = flag("auto", **BOS)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """evaluation afterwards"""

    eval: list[str] | None = flag(
        None, "print perplexities of the result (bare: wikitext2 ptb c4, as the original does)",
        nargs="*", metavar="DATASET",
    )  # fmt: skip
    new_eval: bool = flag(False, "with --eval: the original's newer ptb and c4 slices")


@dataclass(frozen=True, kw_only=True)
class Settings(Result, How, Evaluation, Shared):
    """GPTQ: quantize the linear layers of any decoder-only language model to 2-8 bits, using a
    little text to repay rounding errors. A Hugging Face checkpoint in, a Hugging Face checkpoint
    out.
    """

    model: str = word("model", "folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    dataset: str | None = word(
        "dataset", "calibration text: wikitext2, ptb, c4, pileval, alpaca, dolly, stdlib "
        "(embedded), or a local .txt/.jsonl/.parquet/.csv file or folder; not needed with "
        "--nearest", None,
    )  # fmt: skip


def quantize(
    model: str | Path, dataset: str | None = None, *, command: str = "gptq.quantize(...)", **flags
) -> list[dict]:
    """The command from Python: its flags, with underscores, as keywords (out=, wbits=, ...).

    Returns:
        One row per linear with its name and relative output error.

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    from gptq.method import run

    return run(Settings(model=str(model), dataset=dataset, **flags), command)


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    return make_parser(Settings, "gptq", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    if settings.wbits == 16:
        raise UserError(
            "--wbits 16 quantizes nothing; for the baseline: harness eval MODEL --ppl ..."
        )
    kind = "rtn" if settings.nearest else "gptq"
    out = settings.out or f"{Path(settings.model).name}-{kind}-w{settings.wbits}"

    from gptq.method import run
    from harness import distributed
    from harness.checkpoint import card

    with distributed.group():
        try:
            rows = run(replace(settings, out=out), card.command_line())
        except Finished as there:
            if settings.eval is None:
                raise
            distributed.say(str(there))
            rows = None
        lead = distributed.rank() == 0
    if lead and not settings.dry_run:
        if rows is not None:
            _print_table(rows)
            print(f"written to {out}")
        if settings.eval is not None:
            _evaluate(out, settings)


def _print_table(rows: list[dict]) -> None:
    """Relative output error per kind of linear: mean and worst over the blocks."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        if row["error"] is not None:
            kinds.setdefault(row["name"].split(f".{row['block']}.", 1)[1], []).append(row)
    if not kinds:
        return
    print("| linear | mean error | worst error | in block |\n| --- | ---: | ---: | ---: |")
    for kind, of_kind in kinds.items():
        worst = max(of_kind, key=lambda row: row["error"])
        mean = sum(row["error"] for row in of_kind) / len(of_kind)
        print(f"| {kind} | {mean:.3g} | {worst['error']:.3g} | {worst['block']} |")


def _evaluate(out: str, settings: Settings) -> None:
    from harness.checkpoint import load
    from harness.data import corpora
    from harness.metrics import perplexity

    model = load.load_model(out, device=settings.device, dtype=settings.dtype)
    tokenizer = load.load_tokenizer(out)
    seqlen = load.window_length(model.config, settings.seqlen)
    for name in settings.eval or ["wikitext2", "ptb", "c4"]:
        windows = corpora.evaluation(tokenizer, name, seqlen=seqlen, new_eval=settings.new_eval)
        value = perplexity.perplexity(model, windows).value
        print(f"{name}: token perplexity {value:.3f} (seqlen {seqlen}, non-overlapping)")


if __name__ == "__main__":
    sys.exit(main())
