"""``python -m sparse.recover PRUNED --dataset alpaca``: parse, tune, and say what it brought."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from harness import cli
from harness.settings import BELOW_1, NOT_NEGATIVE, POSITIVE, REQUIRED, flag, make_parser, word
from harness.training.flags import Engine, Shared

EXAMPLES = """\
examples:
  python -m sparse.recover tiny-pruned --dataset stdlib --max_minutes 5 --out tiny-recovered
  python -m sparse.recover PRUNED --dataset alpaca --out RECOVERED
      LLM-Pruner's published setting: LoRA on all linears, 2 epochs (its code's default is 5),
      learning rate 1e-4 (3e-4) at width 4096, batches of 64 (128)
  python -m sparse.recover PRUNED --dataset c4 --tune full --max_steps 2000 --out RECOVERED
      all weights, on windows of text; a sparse model keeps its zeros
  python -m sparse.recover PRUNED --dataset c4 --teacher DENSE --out RECOVERED
      LoRA, and distillation from the dense model
  torchrun --nproc-per-node 4 -m sparse.recover PRUNED --dataset alpaca --zero 2 --out RECOVERED
      each batch dealt to 4 GPUs or CPU processes; accelerate launch and deepspeed do the same
then:
  harness eval RECOVERED --ppl wikitext2 --divergence-from DENSE
"""


@dataclass(frozen=True, kw_only=True)
class Towards:
    """what is trained, and towards what"""

    tune: str = flag("lora", "LoRA (default) or all weights", choices=["lora", "full"])
    lora_r: int = flag(8, "rank (default 8)", check=POSITIVE)
    lora_alpha: int = flag(16, "scale times rank (default 16)", check=POSITIVE)
    lora_dropout: float = flag(0.05, "default 0.05", metavar="P", check=BELOW_1)
    lora_target_modules: str | None = flag(
        None, "linears by name, q_proj,v_proj ... (default: all of the blocks)", metavar="A,B"
    )
    teacher: str | None = flag(None, "distil from this model, too", metavar="DENSE")
    kd_weight: float = flag(
        0.5, "with --teacher: W divergence + (1 - W) cross entropy (default 0.5)", metavar="W",
        check=(lambda value: 0 < value <= 1, "expected above 0, at most 1"),
    )  # fmt: skip
    kd_loss: str = flag(
        "forward_kl", "with --teacher: which divergence (default forward_kl)",
        choices=["forward_kl", "reverse_kl", "jsd"],
    )  # fmt: skip
    densify: bool = flag(False, "let the zeros of a sparse model be filled")


@dataclass(frozen=True, kw_only=True)
class Data:
    """data"""

    dataset: str = flag(
        REQUIRED, "instructions (alpaca, dolly, stdlib-doc, or a local table with prompts and "
        "responses), or text (c4, wikitext2, ptb, pileval, stdlib, or a local file or folder)",
        names=["--dataset", "--data_path"],
    )  # fmt: skip
    cutoff_len: int | None = flag(
        None, "per example (default: instructions 256; text 1024, or the context if it is shorter)",
        metavar="TOKENS",
    )  # fmt: skip
    val_set_size: int | None = flag(
        None, "held-out examples, at most (default: instructions 2000; text 32)", check=POSITIVE
    )
    max_train_samples: int | None = flag(
        None, "training examples, at most (default: instructions all; text 30000)", check=POSITIVE
    )
    train_on_inputs: bool = flag(
        False, "predict the prompts of instructions as well as the responses"
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """how long and how fast"""

    num_epochs: float = flag(2, "default 2", metavar="N", check=POSITIVE)
    max_steps: int | None = flag(None, "stop after so many steps", check=POSITIVE)
    max_minutes: float | None = flag(
        None, "stop after so long; the learning rate falls with the clock, and the result's bytes "
        "depend on the machine", metavar="M", check=POSITIVE,
    )  # fmt: skip
    learning_rate: float | None = flag(
        None, "default at width 4096: LoRA 1e-4 on instructions, 3e-4 on text; --tune full 2e-5 "
        "and 6e-5; in inverse proportion to the width of others", metavar="R", check=POSITIVE,
    )  # fmt: skip
    batch_size: int | None = flag(
        None, "examples per step, over all processes (default: instructions 64; text 8)",
        check=POSITIVE,
    )  # fmt: skip
    micro_batch_size: int = flag(
        4, "of them at a time in each process (default 4); memory, not the result", check=POSITIVE
    )
    warmup_steps: int = flag(100, "default 100, at most a tenth of the run", check=NOT_NEGATIVE)
    eval_steps: int | None = flag(
        None, "steps between looks at the validation loss (default: ten looks in all)",
        check=POSITIVE,
    )  # fmt: skip
    patience: int = flag(
        5, "stop after so many looks without a better loss (default 5, half a run; 0: never)",
        check=NOT_NEGATIVE,
    )  # fmt: skip
    save_steps: int | None = flag(
        None, "steps between saved states, which a killed run goes on from (default: at each look)",
        check=POSITIVE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(Towards, Data, Schedule, Engine, Shared):
    """Recover what pruning cost: tune a pruned checkpoint with LoRA (merged at the end) or whole,
    alone or with the dense model as teacher. The result has the layout and sizes of PRUNED, and is
    the best seen by validation loss.
    """

    SEPARATORS: ClassVar[tuple[str, ...]] = ("_",)

    model: str = word("PRUNED", "folder, hub id or embedded name")

    def completed(self) -> "Settings":
        """With the default name of the result where none is given."""
        return replace(self, out=self.out or f"{Path(self.model).name}-recovered")


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are LLM-Pruner's where it has them."""
    return make_parser(Settings, "sparse.recover", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from harness.training import engine
    from sparse.recover_run import run

    if result := engine.on_lead(run, settings):
        print_table(result)
        print(f"written to {settings.completed().out}")


def print_table(result: dict) -> None:
    """Validation loss and perplexity: before, after and, where there is one, of the teacher."""
    from math import exp

    before, teacher = result["rows"][0]["validation_loss"], result["teacher"]
    rows = {"before": before, f"after (step {result['best_step']})": result["best"]}
    if teacher is not None:
        rows["teacher"] = teacher
    print("| | validation loss | perplexity |\n| --- | ---: | ---: |")
    for label, loss in rows.items():
        print(f"| {label} | {loss:.4f} | {exp(min(loss, 700)):.3f} |")
    line = f"{result['steps']} steps, {result['tokens']} tokens, {result['seconds']:.0f} s"
    if teacher is not None and before > teacher:
        won = (before - result["best"]) / (before - teacher)
        line += f"; {won:.0%} of the loss of log-perplexity against the teacher is won back"
    print(line)


if __name__ == "__main__":
    sys.exit(main())
