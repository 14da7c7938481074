"""``python -m minillm.evaluate CKPT --data dolly``: Rouge-L of sampled responses, five seeds."""

import argparse
import sys

from harness import cli
from minillm import flags
from minillm.generate import add_lengths, add_sampling

SEEDS = (10, 20, 30, 40, 50)
EXAMPLES = """\
examples:
  python -m minillm.evaluate tiny-llama-student --data stdlib-doc --dev-num 50
  python -m minillm.evaluate CKPT --data dolly,self-inst,vicuna,s-ni,unni
      the published table
  python -m minillm.evaluate CKPT --data test.jsonl --engine vllm --no-repeat-ngram-size 0
  torchrun --nproc-per-node 8 -m minillm.evaluate CKPT --data dolly
then:
  harness compare CKPT OTHER
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m minillm.evaluate",
        description="Rouge-L of a model's responses to held-out prompts: sampled at temperature 1, "
        "the best of each prompt's references, x 100; mean and standard deviation over the seeds. "
        "The results join those of `harness eval`.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="MODEL", help="folder, hub id or embedded name")
    g = p.add_argument_group("data")
    flags.add(
        g, "--data", required=True, metavar="SET,SET", nargs="+",
        help="dolly, alpaca, self-inst, vicuna, s-ni, unni, stdlib-doc (embedded), or a local "
        "table or folder; a list of outputs is several references",
    )  # fmt: skip
    flags.add(g, "--dev-num", type=int, metavar="N", help="prompts of each set, at most")
    add_lengths(g)
    sampling = add_sampling(p)
    flags.add(
        sampling, "--no-repeat-ngram-size", type=int, default=6, metavar="N",
        help="no N tokens in a row twice, prompt included (default 6, as the original evaluates; "
        "0: anything goes)",
    )  # fmt: skip
    flags.add(
        sampling, "--seeds", type=int, nargs="+", default=list(SEEDS), metavar="S",
        help="one evaluation each (default 10 20 30 40 50)",
    )  # fmt: skip
    flags.add(p, "--local-rank", type=int, help=argparse.SUPPRESS)
    cli.add_shared_flags(p)
    # Each of --seeds takes its place.
    next(a for a in p._actions if a.dest == "seed").help = argparse.SUPPRESS
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from harness import distributed
    from harness.commands import report
    from harness.training import engine
    from minillm.evaluate_run import evaluate

    with engine.group():
        found = evaluate(args)
        lead = distributed.rank() == 0
    if lead and found:
        results, path = found
        print(report.markdown(results))
        print(f"\nresults: {path}")


if __name__ == "__main__":
    sys.exit(main())
