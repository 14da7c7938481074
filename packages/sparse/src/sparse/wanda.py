"""``python -m sparse.wanda MODEL DATASET --sparsity .5 ...``"""

import argparse
import sys
from dataclasses import dataclass
from typing import ClassVar

from harness.settings import flag, make_parser
from sparse import command

EXAMPLES = """\
examples:
  python -m sparse.wanda tiny-llama stdlib --sparsity .5 --out tiny-50
  python -m sparse.wanda meta-llama/Llama-2-7b-hf c4 --sparsity_ratio .5 --sparsity_type 2:4 \\
      --out llama-2of4
  python -m sparse.wanda MODEL c4 --sparsity .7 --ratios owl --out owl-70
then:
  harness eval tiny-50 --ppl stdlib
"""


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Wanda"""

    use_variant: bool = flag(
        False, "rows may lose different shares: each drops its weights up to the same share of its "
        "summed scores",
    )  # fmt: skip
    true_sequential: bool = flag(
        False, command.TRUE_SEQUENTIAL, names=["--true-sequential", "--true_sequential"]
    )


@dataclass(frozen=True, kw_only=True)
class Settings(Wanda, command.Pruning):
    """Wanda: in every row of every linear drop the weights with the least |weight| times norm of
    their input. No weight is changed otherwise; two forwards of a little text are all it costs. A
    Hugging Face checkpoint in, a Hugging Face checkpoint out.
    """

    method: ClassVar[str] = "wanda"


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    return make_parser(Settings, "sparse.wanda", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command.run(lambda: Settings(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
