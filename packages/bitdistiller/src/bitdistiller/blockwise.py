"""``python -m bitdistiller.blockwise MODEL [DATASET] --bits 2 ...``: EfficientQAT's first stage."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from harness import cli
from harness.settings import AT_LEAST_1, BOS, IGNORE, NOT_NEGATIVE, Shared, flag, make_parser, word

EXAMPLES = """\
examples:
  python -m bitdistiller.blockwise tiny-llama stdlib --bits 2 --nsamples 256 --seqlen 256 \\
      --weight_lr 5e-4 --quant_lr 1e-3 --out tiny-blockwise
  python -m bitdistiller.blockwise MODEL c4 --bits 2 --q_group_size 64 --out model-blockwise
then, the second stage:
  python -m bitdistiller.train MODEL --start model-blockwise --learn scales --data ... --out OUT
or as it is:
  python -m bitdistiller.export model-blockwise --out model-packed
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """what to make"""

    bits: int = flag(2, "bits per weight, 2-8 (default 2)", names=["--bits", "--wbits"])
    group_size: int = flag(
        128, "columns that share a scale; -1 is one scale per row (default 128)",
        names=["--q_group_size", "--q-group-size", "--group_size", "--group-size"],
    )  # fmt: skip
    clip: str | None = flag(
        None, "what python -m bitdistiller.autoclip made, folder or clip.safetensors (default: "
        "begin at the full ranges)", metavar="PATH",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class How:
    """how"""

    nsamples: int = flag(
        4096, "windows to train on (default 4096); memory holds two hidden states of each of their "
        "tokens", names=["--nsamples", "--train_size", "--train-size"], check=AT_LEAST_1,
    )  # fmt: skip
    val_size: int = flag(
        64, "further windows that the printed errors are measured on (default 64)",
        check=AT_LEAST_1,
    )  # fmt: skip
    seqlen: int | None = flag(
        None, "tokens per window (default: the model's context, at most 2048)",
        names=["--seqlen", "--training_seqlen", "--training-seqlen"],
    )  # fmt: skip
    batch_size: int = flag(2, "windows per step (default 2)", check=AT_LEAST_1)
    epochs: int = flag(2, "per block (default 2)", check=NOT_NEGATIVE)
    quant_lr: float = flag(
        1e-4, "first learning rate of scales and zero points (default 1e-4; 0 leaves them); it "
        "falls to a twentieth along a cosine", metavar="R", check=NOT_NEGATIVE,
    )  # fmt: skip
    weight_lr: float | None = flag(
        None, "the same of the weights (default 2e-5 at 2 bits, else 1e-5)", metavar="R",
        check=NOT_NEGATIVE,
    )  # fmt: skip
    ignore: list[str] = flag([], **IGNORE)
    bos: str = flag("auto", **BOS)


@dataclass(frozen=True, kw_only=True)
class Settings(Result, How, Shared):
    """Train a model's blocks one after another so that each gives, with quantized weights, what it
    gave dense (EfficientQAT's Block-AP). Weights, scales and zero points are trained; one block is
    in memory at a time.
    """

    SEPARATORS: ClassVar[tuple[str, ...]] = ("_", "-")

    model: str = word("model", "folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    dataset: str = word(
        "dataset", "text: wikitext2, ptb, c4, pileval (default), alpaca, dolly, stdlib (embedded), "
        "or a local .txt/.jsonl/.parquet/.csv file or folder", "pileval",
    )  # fmt: skip


def train_blocks(
    model, dataset: str = "pileval", *, command: str = "bitdistiller.train_blocks(...)", **flags
) -> list[dict]:
    """The command from Python: its flags, with underscores, as keywords (out=, bits=, ...).

    Returns:
        One row per linear: its block's relative error "before" and after ("error").

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    from bitdistiller.blockwise_run import run

    return run(Settings(model=str(model), dataset=dataset, **flags), command)


def parser() -> argparse.ArgumentParser:
    """The command's arguments; EfficientQAT's names are understood too."""
    return make_parser(Settings, "bitdistiller.blockwise", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from bitdistiller.blockwise_run import run
    from harness.checkpoint import card

    out = settings.out or f"{Path(settings.model).name}-blockwise-w{settings.bits}"
    rows = run(replace(settings, out=out), card.command_line())
    if settings.dry_run:
        return
    print("| block | relative error before | after |\n| ---: | ---: | ---: |")
    for index, row in {row["block"]: row for row in rows}.items():
        print(f"| {index} | {row['before']:.3g} | {row['error']:.3g} |")
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())
