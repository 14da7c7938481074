"""``python -m sparse.sparsegpt MODEL DATASET --sparsity .5 ...``"""

import argparse
import sys

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


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m sparse.sparsegpt",
        description="SparseGPT: drop weights of any decoder-only language model in one shot, and "
        "let the weights that stay repay what was lost, using a little text. A Hugging Face "
        "checkpoint in, a Hugging Face checkpoint out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = p.add_argument_group("SparseGPT")
    own.add_argument(
        "--percdamp",
        type=float,
        default=0.01,
        help="damping, as a fraction of the Hessian's mean diagonal (default 0.01)",
    )
    own.add_argument(
        "--blocksize",
        type=int,
        default=128,
        help="columns whose mask is chosen together (default 128; not for n:m)",
    )
    own.add_argument(
        "--true-sequential",
        action="store_true",
        help="prune a block's layers one after another, each on the effect of the earlier ones; "
        "here also the faster order",
    )
    own.add_argument(
        "--gmp",
        action="store_true",
        help="the baseline: the smallest weights of every matrix go, nothing is repaid; no data "
        "(what python -m sparse.magnitude does)",
    )
    own.add_argument(
        "--wbits", type=int, default=16, help="quantize what stays to 2-8 bits (default 16: not)"
    )
    own.add_argument(
        "--groupsize",
        type=int,
        default=-1,
        help="with --wbits: columns that share a scale; -1 is one per row (default)",
    )
    own.add_argument("--sym", action="store_true", help="with --wbits: no zero points")
    command.add_flags(p, data="calibration text (not needed with --gmp)", packed=True)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.gmp:
        return command.run(args, "magnitude", wbits=args.wbits)
    return command.run(
        args, "sparsegpt", percdamp=args.percdamp, blocksize=args.blocksize, wbits=args.wbits,
        groupsize=args.groupsize, sym=args.sym, true_sequential=args.true_sequential,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
