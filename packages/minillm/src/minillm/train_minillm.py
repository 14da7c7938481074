"""``python -m minillm.train_minillm STUDENT --teacher T --data dolly``: on-policy distillation."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from harness import cli
from harness.settings import BELOW_1, POSITIVE, REQUIRED, SHARE, flag, make_parser, word
from harness.training.flags import Engine
from minillm import flags, presets

EXAMPLES = """\
examples:
  python -m minillm.train_minillm sft-student --teacher sft-teacher --data stdlib-doc \\
      --lm-data stdlib --total-iters 64 --out minillm
  python -m minillm.train_minillm STUDENT --teacher T --data dolly --lm-data wikitext2 --out minillm
      the published settings; STUDENT is the fine-tuned student of the best validation loss
  python -m minillm.train_minillm STUDENT --teacher T --data dolly --teacher-mixed-alpha 0 \\
      --no-length-norm --no-single-step-reg --out plain
      the paper's ablations: each part has a flag that leaves it out
  torchrun --nproc-per-node 8 -m minillm.train_minillm STUDENT --teacher T --data dolly --zero 2
      rollouts and batches dealt to 8 processes: the same mini-batches as of one
then:
  python -m minillm.evaluate minillm --data dolly
"""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """rollouts and their gradient"""

    num_rollouts: int = flag(256, "responses per phase, over all processes (default 256)")
    ppo_epochs: int = flag(4, "times that a phase's rollouts are gone through (default 4)")
    chunk_size: int = flag(
        16, "responses written at a time in each process (default 16); speed, not the result",
        check=POSITIVE,
    )  # fmt: skip
    teacher_mixed_alpha: float = flag(
        0.2, "the teacher's part of the distribution that rollouts are drawn from (default 0.2; 0: "
        "the student alone)", metavar="A",
    )  # fmt: skip
    gamma: float = flag(0.95, "discount (default 0.95)", metavar="G")
    reward_scaling: float = flag(0.5, "rewards are divided by it (default 0.5)", metavar="S")
    cliprange_reward: float = flag(100.0, "and cut at +- C (default 100)", metavar="C")
    cliprange: float = flag(
        0.2, "of the ratio of new to old probability times the weight (default 0.2; inf: none)",
        metavar="C",
    )  # fmt: skip
    length_norm: bool = flag(True, "rewards are averaged over the tokens that are left (default)")
    single_step_reg: bool = flag(
        True, "the next token's reverse KL over the whole vocabulary (default)"
    )
    future_rewards: bool = flag(
        False, "a token is paid the rewards after it only, as the paper's equation has it beside "
        "the single-step term; the original's code counts its own reward, too",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """language modelling on plain text, beside the rollouts"""

    lm_data: str | None = flag(
        None, "wikitext2, c4, stdlib (embedded), or a local file or folder (default: none)",
        metavar="TEXT",
    )  # fmt: skip
    lm_coef: float = flag(1.0, "its weight (default 1)", metavar="C")
    kd_ratio: float = flag(
        0.5, "there, R forward KL to the teacher + (1 - R) cross entropy (default 0.5)",
        metavar="R", check=SHARE,
    )  # fmt: skip
    lm_num: int = flag(
        30_000, "windows of --max-length tokens, at most (default 30000)", check=POSITIVE
    )


@dataclass(frozen=True, kw_only=True)
class Schedule(flags.Schedule):
    """how long and how fast"""

    batch_size: int = flag(8, "rollouts per forward and process (default 8)", check=POSITIVE)
    gradient_accumulation_steps: int | None = flag(
        None, "forwards per optimizer step (default: as many as make 64 rollouts a step)",
        check=POSITIVE,
    )  # fmt: skip
    eval_batch_size: int | None = flag(None, "default: --chunk-size", check=POSITIVE)
    lr: float = flag(5e-6, "default 5e-6", metavar="R")
    lr_min: float = flag(5e-6, "end of cosine (5e-6)", metavar="R")
    lr_decay_style: str = flag("constant", "default constant", choices=["cosine", "constant"])
    warmup_iters: int = flag(100, "default 100")
    epochs: float = flag(10, "over the prompts, at most (default 10)", metavar="N", check=POSITIVE)
    total_iters: int = flag(5000, "optimizer steps, at most (default 5000)", check=POSITIVE)
    weight_decay: float = flag(1e-6, "default 1e-6", metavar="W")
    eval_interval: int = flag(
        100, "steps between looks at the validation prompts (default 100)", check=POSITIVE
    )
    save_interval: int | None = flag(
        None, "steps between saved states (default: at each look); a state is saved when the phase "
        "is over", check=POSITIVE,
    )  # fmt: skip
    select: str = flag(
        "reverse-kl", "what the best checkpoint is best by (default reverse-kl, to the teacher on "
        "the student's own responses; rouge: their Rouge-L)", choices=["reverse-kl", "rouge"],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(flags.Data, Policy, LanguageModel, Schedule, Engine, flags.Peft, flags.Shared):
    """MiniLLM: the student writes responses to prompts and learns to lower its reverse KL to
    the teacher on them, by policy gradient. The result is an ordinary checkpoint, the best
    seen.
    """

    model: str = word("STUDENT", "folder, hub id or embedded name")
    teacher: str = flag(REQUIRED, "folder, hub id or embedded", metavar="MODEL")
    preset: str | None = presets.preset()
    # Nothing is dropped here: a rollout's probabilities must be those that its tokens had.
    peft_lora_dropout: float = flag(0.0, "default 0", metavar="P", check=BELOW_1)

    def completed(self) -> "Settings":
        """With the default of --out where it is left open."""
        return replace(self, out=self.out or f"{Path(self.model).name}-minillm")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "minillm.train_minillm", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = presets.parse(parser(), argv, "minillm")
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from harness.training import engine
    from minillm.train_minillm_run import run

    if result := engine.on_lead(run, settings):
        _print_table(result)
        print(f"written to {settings.completed().out}")


def _print_table(result: dict) -> None:
    """The student's own responses before and after: what was looked at on validation prompts."""
    rows = {row["step"]: row for row in result["rows"]}
    print("| | reverse KL | Rouge-L | tokens |\n| --- | ---: | ---: | ---: |")
    for label, step in (
        ("before", 0),
        (f"written (step {result['best_step']})", result["best_step"]),
    ):
        row = rows[step]
        print(f"| {label} | {row['reverse_kl']:.4f} | {row['rouge_l']:.2f} | {row['length']:.1f} |")
    speed = result["tokens"] / max(result["seconds"], 1e-9)
    print(
        f"{result['steps']} steps, {result['tokens']} tokens, {result['seconds']:.0f} s, "
        f"{speed:,.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
