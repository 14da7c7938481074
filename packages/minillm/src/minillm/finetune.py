"""``python -m minillm.finetune MODEL --data dolly``: SFT, and distillation on given responses."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from harness import cli
from harness.settings import SHARE, flag, make_parser, refuse, word
from harness.training.flags import Engine
from minillm import flags, presets

LOSSES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
EXAMPLES = """\
examples:
  python -m minillm.finetune tiny-llama-student --data stdlib-doc --total-iters 200 --out sft
      supervised fine-tuning; the original's learning rate and epochs for the model's size
  python -m minillm.finetune gpt2 --data dolly --type kd --teacher TEACHER --out kd
      word-level distillation: half cross entropy, half forward KL to the teacher
  python -m minillm.generate TEACHER --data dolly --out generated.jsonl
  python -m minillm.finetune gpt2 --data generated.jsonl --type seqkd --dev-data dolly --out seqkd
      sequence-level distillation: trained on what the teacher wrote
  python -m minillm.finetune gpt2 --data dolly --preset gpt2-base --out sft
      what was published for GPT-2's smallest; flags beside it win
  deepspeed --num_gpus 8 --module minillm.finetune MODEL --data dolly --zero 2 --out sft
  torchrun --nproc-per-node 8 -m minillm.finetune MODEL --data dolly --zero 3 --out sft
then:
  python -m minillm.evaluate kd --data dolly
"""


@dataclass(frozen=True, kw_only=True)
class Towards:
    """towards what"""

    type: str = flag(
        "sft", "sft (default); kd: the teacher's distribution too; seqkd: responses that a teacher "
        "wrote, from minillm.generate (and its distribution, with --teacher)",
        choices=["sft", "kd", "seqkd"],
    )  # fmt: skip
    teacher: str | None = flag(None, "folder, hub id or embedded name", metavar="MODEL")
    teacher_cache: str | None = flag(
        None, "the teacher's probabilities, from minillm.cache_teacher; no teacher is loaded",
        metavar="FOLDER",
    )  # fmt: skip
    kd_ratio: float = flag(
        0.5, "R divergence + (1 - R) cross entropy (default 0.5)", metavar="R", check=SHARE
    )
    loss: str = flag("forward_kl", "default forward_kl", choices=LOSSES)
    align: str | None = flag(None, "for a teacher with another tokenizer", choices=["uld"])


@dataclass(frozen=True, kw_only=True)
class Schedule(flags.Schedule):
    """how long and how fast"""

    eval_gen: bool = flag(
        False, "each look also samples responses to the validation prompts, and takes their Rouge-L"
    )
    select: str | None = flag(
        None, "what the best checkpoint is best by (default: rouge with --eval-gen, as in the "
        "original; MiniLLM starts from the best by loss)", choices=["loss", "rouge"],
    )  # fmt: skip
    greedy: bool = flag(False, "--eval-gen takes the likeliest tokens")


@dataclass(frozen=True, kw_only=True)
class Settings(Towards, flags.Data, Schedule, Engine, flags.Peft, flags.Shared):
    """Fine-tune a causal language model on instructions: SFT, word-level (kd) or sequence-level
    (seqkd) distillation. The result is an ordinary checkpoint, the best seen.
    """

    model: str = word("MODEL", "folder, hub id or embedded name")
    preset: str | None = presets.preset()
    packing: bool = flag(
        False, "several examples in a row of --max-length tokens: no padding (sft, seqkd without a "
        "teacher)",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        taught = self.teacher or self.teacher_cache
        refuse(
            (self.select == "rouge" and not self.eval_gen,
             "--select rouge needs responses to look at; add --eval-gen."),
            (self.type == "kd" and not taught,
             "--type kd needs a teacher: --teacher MODEL, or --teacher-cache FOLDER."),
            (self.type == "sft" and taught,
             "--type sft has no teacher; use --type kd, or leave the teacher out."),
            (self.teacher and self.teacher_cache,
             "--teacher and --teacher-cache: give one of the two."),
            (self.align and not self.teacher,
             f"--align {self.align} needs the teacher in memory; give --teacher MODEL."),
            (self.align and self.loss != "forward_kl",
             f"--align {self.align} is a loss of its own; leave --loss {self.loss} out."),
            (self.packing and taught,
             "--packing is for training without a teacher; leave it out."),
        )  # fmt: skip

    def completed(self) -> "Settings":
        """With what follows from other flags where it is left open: --out, --select."""
        return replace(
            self,
            out=self.out or f"{Path(self.model).name}-{self.type}",
            select=self.select or ("rouge" if self.eval_gen else "loss"),
        )


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "minillm.finetune", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = presets.parse(parser(), argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from harness.training import engine, meter
    from minillm.finetune_run import run

    if result := engine.on_lead(run, settings):
        print(meter.table(result))
        print(f"written to {settings.completed().out}")


if __name__ == "__main__":
    sys.exit(main())
