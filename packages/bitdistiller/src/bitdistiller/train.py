"""``python -m bitdistiller.train MODEL --clip FOLDER --data FILE --bits 2``: quantization-aware
self-distillation."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bitdistiller import flags
from bitdistiller.flags import switch
from harness import cli
from harness.settings import (
    AT_LEAST_1,
    IGNORE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    flag,
    make_parser,
    refuse,
    word,
)

LOSSES = ("cakld", "forward", "reverse", "jsd", "ce")
QUANT_TYPES = ("int", "int2-asym", "nf3", "nf4", "ste-n2f3")
ORIGINAL_NAMES = {"int2-asym": ("int", 2), "ste-n2f3": ("nf3", 3)}
BITS = {"int": 2, "nf3": 3, "nf4": 4}
EXAMPLES = """\
examples:
  python -m bitdistiller.autoclip tiny-llama stdlib --w_bit 2 --out clipped
  python -m bitdistiller.train tiny-llama --clip clipped --data stdlib --model_max_length 256 \\
      --learning_rate 5e-4 --max_steps 300 --ppl stdlib --ppl_limit 64 --out tiny-w2
  python -m bitdistiller.train MODEL --clip clipped --data generated.jsonl --out w2
      responses from bitdistiller.generate; the original's schedule
  python -m bitdistiller.train MODEL --clip clipped --quant_type nf3 --data generated.jsonl
  python -m bitdistiller.train MODEL --start blockwise --learn scales --data c4 --out w2
      EfficientQAT's second stage
  deepspeed --num_gpus 8 --module bitdistiller.train MODEL --clip clipped --data generated.jsonl \\
      --gradient_checkpointing --out w2
then:
  python -m bitdistiller.export w2 --format compressed-tensors --out w2-packed
"""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """what the weights become"""

    clip: str | None = flag(
        None, "from bitdistiller.autoclip (default: no clipping)", metavar="PATH"
    )
    bits: int | None = flag(None, "2 to 8 (default 2; nf3 has 3, nf4 has 4)")
    q_group_size: int = flag(128, "columns that share a scale; -1: a row (default 128)")
    quant_type: str = flag(
        "int", "int (default; int2-asym is 2 bits of it): with a zero point; nf3 (ste-n2f3), nf4: "
        "NormalFloat with a scale for each sign", choices=QUANT_TYPES,
    )  # fmt: skip
    learn: str | None = flag(
        None, "weights (default): grids follow them; scales alone (default with --start); all: "
        "weights, scales and zero points", choices=["weights", "scales", "all"],
    )  # fmt: skip
    start: str | None = flag(
        None, "a result of bitdistiller.blockwise or of this command, to go on from",
        metavar="FOLDER",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data(flags.Data):
    """data"""

    eval_data: str | None = flag(None, "held-out examples (default: --data's own)", metavar="DATA")
    max_eval_samples: int = flag(500, "held-out examples, at most (default 500)", check=AT_LEAST_1)


@dataclass(frozen=True, kw_only=True)
class Towards:
    """towards what"""

    train_kd: bool = switch(True, "towards the dense model; False is --kd_loss_type ce")
    kd_loss_type: str = flag(
        "cakld", "cakld (default): beta KL(student || teacher) + (1 - beta) KL(teacher || "
        "student); its two parts alone; jsd at .5; ce: cross entropy of the labels, without a "
        "teacher", choices=LOSSES,
    )  # fmt: skip
    cakld_steps: int = flag(
        10, "beta is the teacher's mean confidence over so many batches (default 10)",
        check=POSITIVE,
    )  # fmt: skip
    beta: float | None = flag(None, "beta by hand, 0 to 1", metavar="B", check=SHARE)
    teacher_cache: str | None = flag(
        None, "the dense model's probabilities, from bitdistiller.cache_teacher; no teacher is "
        "loaded", metavar="FOLDER",
    )  # fmt: skip
    original_loss: bool = switch(
        False, "the original's: prompts count, sums over tokens, means over examples"
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """how long and how fast"""

    num_train_epochs: float = flag(4.0, "default 4", metavar="N", check=POSITIVE)
    max_steps: int | None = flag(None, "optimizer steps, instead of epochs", check=POSITIVE)
    per_device_train_batch_size: int = flag(
        16, "examples per forward and process (default 16)",
        names=[
            "--per_device_train_batch_size", "--per-device-train-batch-size", "--batch_size",
            "--batch-size",
        ],
    )  # fmt: skip
    per_device_eval_batch_size: int | None = flag(None, "default: as for training", check=POSITIVE)
    gradient_accumulation_steps: int = flag(1, "forwards per optimizer step (default 1)")
    learning_rate: float = flag(8e-6, "default 8e-6", metavar="R")
    lr_scheduler_type: str = flag("constant", "default constant", choices=["constant", "cosine"])
    warmup_steps: int = flag(0, "default 0", check=NOT_NEGATIVE)
    weight_decay: float = flag(0.0, "default 0", metavar="W", check=NOT_NEGATIVE)
    max_grad_norm: float = flag(1.0, "default 1", metavar="C", check=NOT_NEGATIVE)
    eval_steps: int | None = flag(
        None, "steps between looks; the best one's weights are the result (default: an epoch)",
        check=POSITIVE,
    )  # fmt: skip
    save_steps: int | None = flag(
        None, "steps between saved states, which a killed run goes on from (default: at each look)",
        check=POSITIVE,
    )  # fmt: skip
    ppl: str | None = flag(
        None, "a look is the token perplexity of this text's test split, which then chooses: "
        "report another's (default: the held-out examples' loss)", metavar="TEXT",
    )  # fmt: skip
    ppl_limit: int | None = flag(None, "its first N windows", check=POSITIVE)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """DeepSpeed (more processes: deepspeed or torchrun before the command)"""

    zero: int = flag(
        2, "what processes share: 1 optimizer states, 2 and gradients (default), 3 and weights",
        choices=range(4),
    )  # fmt: skip
    offload: bool = switch(False, "optimizer states in CPU memory; --zero 3: weights too")
    gradient_checkpointing: bool = switch(False, "less memory, a third more time")
    bf16: bool = switch(False, "--dtype bfloat16")


@dataclass(frozen=True, kw_only=True)
class Settings(Weights, Data, Towards, Schedule, Engine, flags.Shared):
    """Train a model's weights while it computes with their quantized values, towards its own
    dense self. The result is an ordinary checkpoint of the quantized values, the best seen: the
    file is the model.
    """

    model: str | None = word("MODEL", "folder, hub id or embedded name", None)
    model_name_or_path: str | None = flag(None, "the same, as the original has it", metavar="MODEL")
    ignore: list[str] = flag([], **IGNORE)
    out: str | None = flag(
        None, "where the result is written", metavar="PATH",
        names=["--out", "--output_dir", "--output-dir"],
    )  # fmt: skip
    seed: int = flag(42, "of every random choice (default 42)")

    def __post_init__(self):
        super().__post_init__()
        bits = self.grid()[0]
        refuse(
            (self.model and self.model_name_or_path,
             "MODEL and --model_name_or_path: give one of the two."),
            (not self.model and not self.model_name_or_path,
             "no model is named; give MODEL (or --model_name_or_path)."),
            (self.bits not in (None, bits),
             f"--bits {self.bits}: {self.quant_type} has {bits}; use --quant_type int."),
            (self.bf16 and self.dtype not in ("auto", "bfloat16"),
             f"--bf16 and --dtype {self.dtype}: give one of the two."),
            (self.kd_loss_type == "ce" and self.teacher_cache,
             "--kd_loss_type ce has no teacher; leave --teacher_cache out."),
            (self.beta is not None and self.kd_loss_type != "cakld",
             f"--kd_loss_type {self.kd_loss_type} has no beta; leave --beta out."),
            (self.ppl and self.eval_data,
             "--ppl and --eval_data: a look is at one of the two; leave the other out."),
            (self.ppl_limit is not None and not self.ppl,
             "--ppl_limit counts windows of --ppl; give --ppl TEXT, or leave it out."),
        )  # fmt: skip

    def grid(self) -> tuple[int | None, int, str]:
        """Bits where they are known, columns that share a scale, and int, nf3 or nf4."""
        kind, bits = ORIGINAL_NAMES.get(self.quant_type, (self.quant_type, self.bits))
        return bits, self.q_group_size, kind

    def completed(self) -> "Settings":
        """With what follows from other flags."""
        bits, _, kind = self.grid()
        model = self.model or self.model_name_or_path
        return replace(
            self,
            model=model,
            model_name_or_path=None,
            out=self.out or f"{Path(model).name}-qat-w{bits or BITS[kind]}",
            learn=self.learn or ("scales" if self.start else "weights"),
            dtype="bfloat16" if self.bf16 else self.dtype,
            kd_loss_type=self.kd_loss_type if self.train_kd else "ce",
            train_on_inputs=self.train_on_inputs or self.original_loss,
        )


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "bitdistiller.train", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from transformers.utils import logging

    from bitdistiller.train_run import run
    from harness.training import engine, meter

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if result := engine.on_lead(run, settings):
        print(meter.table(result))
        print(f"written to {settings.completed().out}")


if __name__ == "__main__":
    sys.exit(main())
