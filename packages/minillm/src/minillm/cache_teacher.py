"""``python -m minillm.cache_teacher TEACHER --data dolly``: the teacher's probabilities, once."""

import argparse
import sys

from harness import cli
from minillm import flags

EXAMPLES = """\
examples:
  python -m minillm.cache_teacher tiny-llama --data stdlib-doc --train-num 200 --out cache
  python -m minillm.finetune tiny-llama-student --data stdlib-doc --train-num 200 --type kd \\
      --teacher-cache cache --out kd
      no teacher is loaded; --data, --train-num and lengths must be the same
  python -m minillm.cache_teacher Qwen/Qwen2.5-7B --student Qwen/Qwen2.5-0.5B --data dolly
  torchrun --nproc-per-node 8 -m minillm.cache_teacher TEACHER --data dolly --out cache
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m minillm.cache_teacher",
        description="Write a teacher's probabilities at every label of a training set: the top-k "
        "log-probabilities and the mass of the rest, 4 k + 4 bytes a label (6 k + 4 above 65,536 "
        "tokens). `minillm.finetune --teacher-cache` trains from them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="TEACHER", help="folder, hub id or embedded name")
    flags.add_data(p)
    flags.add(
        p, "--type", default="kd", choices=["kd", "seqkd"],
        help="seqkd: the responses of a file that minillm.generate wrote (default kd)",
    )  # fmt: skip
    flags.add(p, "--topk", type=int, default=64, metavar="K", help="tokens a label (default 64)")
    flags.add(
        p, "--student", metavar="MODEL",
        help="have its tokenizer checked, and the logits cut that only the teacher has",
    )  # fmt: skip
    flags.add(p, "--teacher-peft-path", metavar="FOLDER", help="adapter of the teacher")
    flags.add(
        p, "--batch-size", type=int, default=8, metavar="N", help="examples at a time (default 8)"
    )
    flags.add(p, "--local-rank", type=int, help=argparse.SUPPRESS)
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from harness import distributed
    from harness.training import cache_writer, engine
    from minillm.cache_teacher_run import cache

    args.out = args.out or f"{Path(args.model).name}-cache"
    with engine.group():
        note = cache(args)
        lead = distributed.rank() == 0
    if lead and note:
        print(cache_writer.summary(note))
        print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
