"""``python -m minillm.generate TEACHER --data dolly --out FILE.jsonl``: responses of a teacher to
the training prompts, for sequence-level distillation."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from harness import cli
from harness.settings import AT_LEAST_1, REQUIRED, flag, make_parser, word
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


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """tokens of prompt and response, as `minillm.flags.lengths` reads them"""

    max_length: int | None = flag(
        None, "of prompt and response (default 512, or the model's context if that is shorter)",
        metavar="TOKENS",
    )  # fmt: skip
    max_prompt_length: int | None = flag(
        None, "longer prompts are left out, and counted (default: half of --max-length); the rest "
        "of --max-length is for the response", metavar="TOKENS",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Prompts(Lengths):
    """prompts"""

    data: str = flag(
        REQUIRED, "instructions: dolly, alpaca, stdlib-doc (embedded), or a local table or folder; "
        "the prompts of its training part", metavar="DATA",
    )  # fmt: skip
    gen_num: int | None = flag(None, "prompts, at most", check=AT_LEAST_1)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """responses"""

    engine: str = flag("transformers", "default transformers", choices=["transformers", "vllm"])
    temperature: float = flag(1.0, "default 1; 0: greedy", metavar="T")
    top_p: float = flag(1.0, "default 1: all", metavar="P")
    top_k: int = flag(0, "default 0: all", metavar="K")
    batch_size: int | None = flag(
        None, "prompts at a time in each process, and what a kill may cost (default 16; 1024 in "
        "vLLM)", check=AT_LEAST_1,
    )  # fmt: skip
    no_repeat_ngram_size: int = flag(0, "no N tokens in a row twice (default 0: anything goes)")


@dataclass(frozen=True, kw_only=True)
class Settings(Prompts, Responses, flags.Shared):
    """Let a teacher respond to the prompts of an instruction set: temperature 1, from the whole
    distribution, as the original does. Each line of the result holds a prompt and the teacher's
    response; a killed run goes on, and ends with the same bytes.
    """

    model: str = word("TEACHER", "folder, hub id or embedded name")

    def completed(self) -> "Settings":
        """With the default of --out where it is left open."""
        return replace(self, out=self.out or f"{Path(self.model).name}-generated.jsonl")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "minillm.generate", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from harness.training import engine
    from minillm.generate_run import run

    if counts := engine.on_lead(run, settings):
        print(", ".join(f"{value} {name}" for name, value in counts.items()))
        print(f"written to {settings.completed().out}")


if __name__ == "__main__":
    sys.exit(main())
