"""``python -m bitdistiller.cache_teacher MODEL --data FILE``: the dense model's probabilities,
once."""

import argparse
import sys
from pathlib import Path

from bitdistiller import flags
from harness import cli
from harness.errors import UserError

EXAMPLES = """\
examples:
  python -m bitdistiller.cache_teacher tiny-llama --data stdlib-doc --out cache
  python -m bitdistiller.train tiny-llama --clip clipped --data stdlib-doc --teacher_cache cache
      no teacher is loaded; --data and what else says which examples must be the same
  torchrun --nproc-per-node 8 -m bitdistiller.cache_teacher MODEL --data generated.jsonl
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m bitdistiller.cache_teacher",
        description="Write the dense model's probabilities at every label of a training set: the "
        "top-k log-probabilities and the mass of the rest, 4 k + 4 bytes a label (6 k + 4 above "
        "65,536 tokens). `bitdistiller.train --teacher_cache` trains from them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="MODEL", help="the dense one: folder, hub id, embedded name")
    flags.add_data(p)
    flags.add(p, "--topk", type=int, default=64, metavar="K", help="tokens a label (default 64)")
    flags.add(
        p, "--batch_size", type=int, default=8, metavar="N", help="examples at a time (default 8)"
    )
    flags.add(p, "--local_rank", type=int, help=argparse.SUPPRESS)
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from harness import distributed
    from harness.training import cache_writer

    args.out = args.out or f"{Path(args.model).name}-cache"
    with distributed.group():
        note = cache(args)
        lead = distributed.rank() == 0
    if lead and note:
        print(cache_writer.summary(note))
        print(f"written to {args.out}")


def cache(args) -> dict | None:
    """Run the command with its parsed arguments, on every rank; returns what
    `harness.training.cache_writer.cache` does."""
    from bitdistiller import train_examples
    from harness import distributed, precision
    from harness.checkpoint import load
    from harness.checkpoint.weights import Weights
    from harness.data import example_sets
    from harness.training import batching, cache_writer

    device = distributed.start(load.pick_device(args.device))
    source, out = load.resolve(args.model), Path(args.out)
    cache_writer.check(out, args.overwrite or args.dry_run, args.batch_size, args.dry_run)
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise UserError(f"--max_train_samples {args.max_train_samples}: at least 1.")
    config = load.load_config(source)
    tokenizer = load.load_tokenizer(source)
    longest = train_examples.length(args.model_max_length, config)
    examples = train_examples.read(args, tokenizer, longest, "train")
    example_sets.check_tokens([examples], config)
    dtype = precision.choose(args.dtype, Weights(source).dtype, device, args.model)
    return cache_writer.cache(
        lambda: load.load_model(source, device=device, dtype=dtype),
        examples, out, teacher=args.model, source=source, data=args.data,
        settings={"dtype": precision.name(dtype)}, top_k=args.topk,
        vocabulary=config.get_text_config().vocab_size, batch=args.batch_size,
        pad=batching.pad_id(tokenizer), overwrite=args.overwrite,
        resume=args.resume, dry_run=args.dry_run,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
