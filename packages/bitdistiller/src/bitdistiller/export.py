"""``python -m bitdistiller.export RESULT --format ...``: a trained result, packed."""

import argparse
import sys

from harness import cli

EXAMPLES = """\
examples:
  python -m bitdistiller.export llama-2bit --out llama-2bit-packed
  python -m bitdistiller.export llama-3bit --format gptq --out llama-3bit-for-kernels
then:
  harness eval llama-2bit-packed --ppl wikitext2
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bitdistiller.export",
        description="Store what python -m bitdistiller.train or .blockwise made as the integers it "
        "stands for. Nothing is rounded again: the packed model computes with the same weights, "
        "bit for bit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("result", metavar="RESULT", help="the folder that training wrote")
    p.add_argument(
        "--format",
        default="compressed-tensors",
        choices=["compressed-tensors", "gptq", "dense"],
        help="compressed-tensors (default): transformers reads it, and vLLM at 4 bits; gptq: for "
        "GPTQ kernels, scales in float16; dense: ordinary safetensors",
    )
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from bitdistiller.export_run import export
    from harness.checkpoint import card

    export(
        args.result, args.format, out=args.out, dtype=args.dtype, overwrite=args.overwrite,
        resume=args.resume, dry_run=args.dry_run, command=card.command_line(),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
