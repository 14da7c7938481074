"""``python -m sparse.magnitude MODEL --sparsity .5 ...``"""

import argparse
import sys
from dataclasses import dataclass
from typing import ClassVar

from harness.settings import flag, make_parser
from sparse import command

EXAMPLES = """\
examples:
  python -m sparse.magnitude tiny-llama --sparsity .5 --out tiny-50
  python -m sparse.magnitude facebook/opt-125m --prunen 2 --prunem 4 --out opt-2of4
  python -m sparse.magnitude MODEL c4 --sparsity .7 --ratios owl --out owl-70
then:
  harness eval tiny-50 --ppl stdlib
"""


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """magnitude"""

    per_row: bool = flag(
        False, "every row loses the same share (default: the smallest of the whole matrix go)"
    )


@dataclass(frozen=True, kw_only=True)
class Settings(Magnitude, command.Pruning):
    """Magnitude pruning, the baseline: drop the smallest weights of every linear. Looks at no data.
    A Hugging Face checkpoint in, a Hugging Face checkpoint out.
    """

    method: ClassVar[str] = "magnitude"


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    return make_parser(Settings, "sparse.magnitude", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command.run(lambda: Settings(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
