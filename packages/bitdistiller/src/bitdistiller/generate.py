"""``python -m bitdistiller.generate MODEL --dataset wikitext2,alpaca --out FILE.jsonl``: what the
dense model says, which its quantized twin is then trained on."""

import argparse
import sys
from dataclasses import dataclass

from bitdistiller import flags
from harness import cli
from harness.settings import AT_LEAST_1, REQUIRED, flag, make_parser, word

EXAMPLES = """\
examples:
  python -m bitdistiller.generate MODEL --dataset wikitext2,alpaca --out teacher.jsonl
      3000 and 5000 prompts, in vLLM on all GPUs, as published for LLaMA-2
  python -m bitdistiller.generate MODEL --dataset code=evol.jsonl --engine transformers
      a local copy of the set, and no vLLM
  torchrun --nproc-per-node 8 -m bitdistiller.generate MODEL --dataset math --engine transformers
  python -m bitdistiller.generate tiny-llama --dataset stdlib,stdlib-doc --max_sample 100 \\
      --max_new_tokens 64 --engine transformers --out teacher.jsonl
then:
  python -m bitdistiller.mix teacher.jsonl --out mix.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """prompts"""

    dataset: str = flag(
        REQUIRED, "wikitext2, alpaca, code, math; stdlib, stdlib-doc (embedded); local files or "
        "folders; code=FILE: a local copy of a set", metavar="A,B",
        names=["--dataset", "--dataset_name", "--dataset-name"],
    )  # fmt: skip
    max_sample: str | None = flag(
        None, "prompts, at most, drawn at random: for each set, or one number for all (default: "
        "3000, alpaca 5000, all of a local file)", metavar="N,M",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Responses:
    """responses"""

    engine: str = flag(
        "vllm", "default vllm; transformers needs no further install, and is much slower on a GPU",
        choices=["vllm", "transformers"],
    )  # fmt: skip
    max_new_tokens: int | None = flag(
        None, "of a response, at most (default 1024, or half of the model's context if that is "
        "less); prompts that leave no room for them are left out", check=AT_LEAST_1,
    )  # fmt: skip
    temperature: float = flag(0.7, "default 0.7; 0: greedy", metavar="T")
    top_p: float = flag(1.0, "default 1: all", metavar="P")
    batch_size: int | None = flag(
        None, "prompts at a time in each process, and what a kill may cost (default 16; 1024 in "
        "vLLM)", check=AT_LEAST_1,
    )  # fmt: skip
    tensor_parallel_size: int | None = flag(
        None, "GPUs that share the model in vLLM (default: all)", check=AT_LEAST_1
    )


@dataclass(frozen=True, kw_only=True)
class Settings(Prompts, Responses, flags.Shared):
    """Let the dense model respond to the prompts of one or several sets. Each line of the
    result holds a prompt, the response, the set, and whether the response came to an end; a
    killed run goes on, and ends with the same bytes.
    """

    model: str | None = word("MODEL", "folder, hub id or embedded name", None)
    base_model: str | None = flag(None, "the same as a flag", metavar="MODEL")
    seed: int = flag(42, "of every random choice (default 42)")
    out_path: str | None = flag(
        None, "instead of --out: a folder for a file that is named after sets and sampling",
        metavar="FOLDER",
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "bitdistiller.generate", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from bitdistiller.generate_run import run
    from harness import distributed

    with distributed.group():
        report = run(settings)
        lead = distributed.rank() == 0
    if lead and report:
        print(report)


if __name__ == "__main__":
    sys.exit(main())
