"""``python -m minillm.evaluate CKPT --data dolly``: Rouge-L of sampled responses, five seeds."""

import argparse
import sys
from dataclasses import dataclass

from harness import cli
from harness.settings import AT_LEAST_1, REQUIRED, flag, make_parser, word
from minillm import flags, generate

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


@dataclass(frozen=True, kw_only=True)
class Data(generate.Lengths):
    """data"""

    data: list[str] = flag(
        REQUIRED, "dolly, alpaca, self-inst, vicuna, s-ni, unni, stdlib-doc (embedded), or a local "
        "table or folder; a list of outputs is several references", metavar="SET,SET", nargs="+",
    )  # fmt: skip
    dev_num: int | None = flag(None, "prompts of each set, at most", check=AT_LEAST_1)


@dataclass(frozen=True, kw_only=True)
class Responses(generate.Responses):
    """responses"""

    no_repeat_ngram_size: int = flag(
        6, "no N tokens in a row twice, prompt included (default 6, as the original evaluates; 0: "
        "anything goes)",
    )  # fmt: skip
    seeds: list[int] = flag(
        list(SEEDS), "one evaluation each (default 10 20 30 40 50)", nargs="+", metavar="S"
    )


@dataclass(frozen=True, kw_only=True)
class Settings(Data, Responses, flags.Shared):
    """Rouge-L of a model's responses to held-out prompts: sampled at temperature 1, the best of
    each prompt's references, x 100; mean and standard deviation over the seeds. The results
    join those of `harness eval`.
    """

    model: str = word("MODEL", "folder, hub id or embedded name")
    # Each of --seeds takes its place.
    seed: int = flag(0, argparse.SUPPRESS)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "minillm.evaluate", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from harness.commands import report
    from harness.training import engine
    from minillm.evaluate_run import run

    if outcome := engine.on_lead(run, settings):
        results, path = outcome
        print(report.markdown(results))
        print(f"\nresults: {path}")


if __name__ == "__main__":
    sys.exit(main())
