"""``python -m bitdistiller.cache_teacher MODEL --data FILE``: the dense model's probabilities,
once."""

import argparse
import sys
from pathlib import Path

from harness.errors import UserError

from bitdistiller import flags
from harness import cli

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
    from harness import distributed, teacher_caching

    args.out = args.out or f"{Path(args.model).name}-cache"
    with distributed.group():
        note = cache(args)
        lead = distributed.rank() == 0
    if lead and note:
        print(teacher_caching.summary(note))
        print(f"written to {args.out}")


def cache(args) -> dict | None:
    """Run the command with its parsed arguments, on every rank; returns what
    `harness.teacher_caching.cache` does."""
    from harness.tensors import Weights

    from bitdistiller import material
    from harness import batching, checkpoint, distributed, example_sets, precision, teacher_caching

    device = distributed.start(checkpoint.pick_device(args.device))
    source, out = checkpoint.resolve(args.model), Path(args.out)
    teacher_caching.check(out, args.overwrite or args.dry_run, args.batch_size, args.dry_run)
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise UserError(f"--max_train_samples {args.max_train_samples}: at least 1.")
    config = checkpoint.load_config(source)
    tokenizer = checkpoint.load_tokenizer(source)
    longest = material.length(args.model_max_length, config)
    examples = material.read(args, tokenizer, longest, "train")
    example_sets.check_tokens([examples], config)
    dtype = precision.choose(args.dtype, Weights(source).dtype, device, args.model)
    return teacher_caching.cache(
        lambda: checkpoint.load_model(source, device=device, dtype=dtype),
        examples, out, teacher=args.model, source=source, data=args.data,
        settings={"dtype": precision.name(dtype)}, top_k=args.topk,
        vocabulary=config.get_text_config().vocab_size, batch=args.batch_size,
        pad=batching.pad_id(tokenizer), resume=args.resume, dry_run=args.dry_run,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
