"""``python -m bitdistiller.blockwise MODEL [DATASET] --bits 2 ...``: EfficientQAT's first stage."""

import argparse
import sys

from harness import cli

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


def parser() -> argparse.ArgumentParser:
    """The command's arguments; EfficientQAT's names are understood too."""
    p = argparse.ArgumentParser(
        prog="python -m bitdistiller.blockwise",
        description="Train a model's blocks one after another so that each gives, with quantized "
        "weights, what it gave dense (EfficientQAT's Block-AP). Weights, scales and zero points "
        "are trained; one block is in memory at a time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", help="folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    p.add_argument(
        "dataset",
        nargs="?",
        default="pileval",
        help="text: wikitext2, ptb, c4, pileval (default), alpaca, dolly, stdlib (embedded), or a "
        "local .txt/.jsonl/.parquet/.csv file or folder",
    )
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--bits", "--wbits", type=int, default=2, help="bits per weight, 2-8 (default 2)"
    )
    what.add_argument(
        "--q_group_size", "--q-group-size", "--group_size", "--group-size",
        type=int,
        default=128,
        help="columns that share a scale; -1 is one scale per row (default 128)",
    )  # fmt: skip
    what.add_argument(
        "--clip",
        metavar="PATH",
        help="what python -m bitdistiller.autoclip made, folder or clip.safetensors (default: "
        "begin at the full ranges)",
    )
    how = p.add_argument_group("how")
    how.add_argument(
        "--nsamples", "--train_size", "--train-size",
        type=int,
        default=4096,
        help="windows to train on (default 4096); memory holds two hidden states of each of their "
        "tokens",
    )  # fmt: skip
    how.add_argument(
        "--val_size", "--val-size",
        type=int,
        default=64,
        help="further windows that the printed errors are measured on (default 64)",
    )  # fmt: skip
    how.add_argument(
        "--seqlen", "--training_seqlen", "--training-seqlen",
        type=int,
        help="tokens per window (default: the model's context, at most 2048)",
    )  # fmt: skip
    how.add_argument(
        "--batch_size", "--batch-size", type=int, default=2, help="windows per step (default 2)"
    )
    how.add_argument("--epochs", type=int, default=2, help="per block (default 2)")
    how.add_argument(
        "--quant_lr", "--quant-lr",
        type=float,
        default=1e-4,
        help="first learning rate of scales and zero points (default 1e-4); it falls to a "
        "twentieth along a cosine",
    )  # fmt: skip
    how.add_argument(
        "--weight_lr", "--weight-lr",
        type=float,
        help="the same of the weights (default 2e-5 at 2 bits, else 1e-5)",
    )  # fmt: skip
    cli.add_ignore(how)
    cli.add_bos(how)
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from bitdistiller.blockwise_run import train_blocks
    from harness.checkpoint import card

    out = args.out or f"{Path(args.model).name}-blockwise-w{args.bits}"
    rows = train_blocks(
        args.model, args.dataset, out=out, bits=args.bits, group_size=args.q_group_size,
        clip=args.clip, nsamples=args.nsamples, val_size=args.val_size, seqlen=args.seqlen,
        batch_size=args.batch_size, epochs=args.epochs, quant_lr=args.quant_lr,
        weight_lr=args.weight_lr, device=args.device, dtype=args.dtype, seed=args.seed,
        ignore=args.ignore, bos=args.bos, overwrite=args.overwrite, resume=args.resume,
        dry_run=args.dry_run, command=card.command_line(),
    )  # fmt: skip
    if args.dry_run:
        return
    print("| block | relative error before | after |\n| ---: | ---: | ---: |")
    for index, row in {row["block"]: row for row in rows}.items():
        print(f"| {index} | {row['before']:.3g} | {row['error']:.3g} |")
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())
