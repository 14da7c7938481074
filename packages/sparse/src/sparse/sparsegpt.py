"""``python -m sparse.sparsegpt MODEL DATASET --sparsity .5 ...``"""

import argparse
import sys
from dataclasses import dataclass

from harness.checkpoint import layouts
from harness.settings import flag, make_parser
from sparse import command

EXAMPLES = """\
examples:
  python -m sparse.sparsegpt tiny-llama stdlib --sparsity .5 --out tiny-50
  python -m sparse.sparsegpt facebook/opt-125m c4 --prunen 2 --prunem 4 --out opt-2of4
  python -m sparse.sparsegpt MODEL c4 --sparsity .7 --ratios owl --out owl-70
  python -m sparse.sparsegpt MODEL c4 --sparsity .5 --wbits 4 --format compressed-tensors \\
      --out sparse-w4                        prune and quantize together, stored packed
  torchrun --nproc-per-node 2 -m sparse.sparsegpt MODEL c4 --sparsity .5      2 ranks
then:
  harness eval tiny-50 --ppl stdlib
"""


@dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """SparseGPT"""

    percdamp: float = flag(
        0.01, "damping, as a fraction of the Hessian's mean diagonal (default 0.01)",
        check=(lambda value: 0 < value <= 1, "expected a fraction above 0, at most 1"),
    )  # fmt: skip
    blocksize: int = flag(
        128, "columns whose mask is chosen together (default 128; not for n:m)",
        check=(lambda value: value >= 1, "expected a positive number of columns"),
    )  # fmt: skip
    true_sequential: bool = flag(
        False, command.TRUE_SEQUENTIAL, names=["--true-sequential", "--true_sequential"]
    )
    gmp: bool = flag(
        False, "the baseline: the smallest weights of every matrix go, nothing is repaid; no data "
        "(what python -m sparse.magnitude does)",
    )  # fmt: skip
    wbits: int = flag(16, "quantize what stays to 2-8 bits (default 16: not)")
    groupsize: int = flag(
        -1, "with --wbits: columns that share a scale; -1 is one per row (default)"
    )
    sym: bool = flag(False, "with --wbits: no zero points")
    format: str = flag(
        "dense", "how the result is stored: dense (default, loads everywhere, saves nothing), "
        "bitmask (zeros are not stored; only the harness reads it), or packed integers with "
        "--wbits", choices=[*layouts.PRUNED, *layouts.PACKED],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(SparseGPT, command.Pruning):
    """SparseGPT: drop weights of any decoder-only language model in one shot, and let the weights
    that stay repay what was lost, using a little text. A Hugging Face checkpoint in, a Hugging Face
    checkpoint out.
    """

    @property
    def method(self) -> str:
        return "magnitude" if self.gmp else "sparsegpt"


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    return make_parser(Settings, "sparse.sparsegpt", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command.run(lambda: Settings(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
