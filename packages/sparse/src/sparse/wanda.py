"""``python -m sparse.wanda MODEL DATASET --sparsity .5 ...``"""

import argparse
import sys

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


def parser() -> argparse.ArgumentParser:
    """The command's arguments; the original's spellings are taken too."""
    p = argparse.ArgumentParser(
        prog="python -m sparse.wanda",
        description="Wanda: in every row of every linear drop the weights with the least |weight| "
        "times norm of their input. No weight is changed otherwise; two forwards of a little text "
        "are all it costs. A Hugging Face checkpoint in, a Hugging Face checkpoint out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = p.add_argument_group("Wanda")
    own.add_argument(
        "--use_variant",
        action="store_true",
        help="rows may lose different shares: each drops its weights up to the same share of its "
        "summed scores",
    )
    own.add_argument(
        "--true-sequential",
        action="store_true",
        help="prune a block's layers one after another, each on the effect of the earlier ones; "
        "one forward instead of two",
    )
    command.add_flags(p, data="calibration text")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command.run(
        args, "wanda", use_variant=args.use_variant, true_sequential=args.true_sequential
    )


if __name__ == "__main__":
    sys.exit(main())
