"""``python -m sparse.magnitude MODEL --sparsity .5 ...``"""

import argparse
import sys

from sparse import command

EXAMPLES = """\
examples:
  python -m sparse.magnitude tiny-llama --sparsity .5 --out tiny-50
  python -m sparse.magnitude facebook/opt-125m --prunen 2 --prunem 4 --out opt-2of4
  python -m sparse.magnitude MODEL c4 --sparsity .7 --ratios owl --out owl-70
then:
  harness eval tiny-50 --ppl stdlib
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m sparse.magnitude",
        description="Magnitude pruning, the baseline: drop the smallest weights of every linear. "
        "Looks at no data. A Hugging Face checkpoint in, a Hugging Face checkpoint out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = p.add_argument_group("magnitude")
    own.add_argument(
        "--per_row",
        action="store_true",
        help="every row loses the same share (default: the smallest of the whole matrix go)",
    )
    command.add_flags(p, data="text, for --ratios owl only")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command.run(args, "magnitude", per_row=args.per_row)


if __name__ == "__main__":
    sys.exit(main())
