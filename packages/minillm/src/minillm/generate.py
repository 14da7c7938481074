"""``python -m minillm.generate TEACHER --data dolly --out FILE.jsonl``: responses of a teacher to
the training prompts, for sequence-level distillation."""

import argparse
import sys

from harness import cli
from minillm import flags

EXAMPLES = """\
examples:
  python -m minillm.generate tiny-llama --data stdlib-doc --gen-num 64 --out generated.jsonl
  python -m minillm.generate TEACHER --data dolly --engine vllm --out generated.jsonl
      the same in vLLM, much faster on a GPU
  torchrun --nproc-per-node 8 -m minillm.generate TEACHER --data dolly --out generated.jsonl
then:
  python -m minillm.finetune gpt2 --data generated.jsonl --type seqkd --dev-data dolly
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m minillm.generate",
        description="Let a teacher respond to the prompts of an instruction set: temperature 1, "
        "from the whole distribution, as the original does. Each line of the result holds a prompt "
        "and the teacher's response; a killed run goes on, and ends with the same bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="TEACHER", help="folder, hub id or embedded name")
    g = p.add_argument_group("prompts")
    flags.add(
        g, "--data", required=True, metavar="DATA",
        help="instructions: dolly, alpaca, stdlib-doc (embedded), or a local table or folder; the "
        "prompts of its training part",
    )  # fmt: skip
    flags.add(g, "--gen-num", type=int, metavar="N", help="prompts, at most")
    add_lengths(g)
    sampling = add_sampling(p)
    flags.add(
        sampling, "--no-repeat-ngram-size", type=int, default=0, metavar="N",
        help="no N tokens in a row twice (default 0: anything goes)",
    )  # fmt: skip
    flags.add(p, "--local-rank", type=int, help=argparse.SUPPRESS)
    cli.add_shared_flags(p)
    return p


def add_lengths(g) -> None:
    """--max-length and --max-prompt-length, as `minillm.flags.lengths` reads them."""
    flags.add(
        g, "--max-length", type=int, metavar="TOKENS",
        help="of prompt and response (default 512, or the model's context if that is shorter)",
    )  # fmt: skip
    flags.add(
        g, "--max-prompt-length", type=int, metavar="TOKENS",
        help="longer prompts are left out, and counted (default: half of --max-length); the rest "
        "of --max-length is for the response",
    )  # fmt: skip


def add_sampling(p: argparse.ArgumentParser):
    """What engine responds, and how it draws; returns the group."""
    g = p.add_argument_group("responses")
    flags.add(
        g, "--engine", default="transformers", choices=["transformers", "vllm"],
        help="default transformers",
    )  # fmt: skip
    flags.add(g, "--temperature", type=float, default=1.0, metavar="T", help="default 1; 0: greedy")
    flags.add(g, "--top-p", type=float, default=1.0, metavar="P", help="default 1: all")
    flags.add(g, "--top-k", type=int, default=0, metavar="K", help="default 0: all")
    flags.add(
        g, "--batch-size", type=int, metavar="N",
        help="prompts at a time in each process, and what a kill may cost (default 16; 1024 in "
        "vLLM)",
    )  # fmt: skip
    return g


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from harness import distributed
    from harness.training import engine
    from minillm.generate_run import generate

    args.out = args.out or f"{Path(args.model).name}-generated.jsonl"
    with engine.group():
        counts = generate(args)
        lead = distributed.rank() == 0
    if lead and counts:
        print(", ".join(f"{value} {name}" for name, value in counts.items()))
        print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
