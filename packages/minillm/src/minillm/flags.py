"""Settings that the training commands share, and their flags under the original's names; a flag may
be written with hyphens or underscores. No torch up here."""

from dataclasses import dataclass
from math import ceil

import harness.training.flags
from harness.settings import AT_LEAST_1, BELOW_1, POSITIVE, REQUIRED, flag

# Parameters up to, learning rate, epochs: what the original trained GPT-2, OPT and LLaMA with.
PUBLISHED = (
    (200e6, 5e-4, 20),
    (600e6, 1e-4, 20),
    (1.2e9, 1e-4, 10),
    (3e9, 5e-5, 10),
    (float("inf"), 1e-5, 10),
)
LORA = (5e-4, 20)


@dataclass(frozen=True, kw_only=True)
class Shared(harness.training.flags.Shared):
    """shared by all commands"""

    SEPARATORS = ("-", "_")


@dataclass(frozen=True, kw_only=True)
class Data:
    """data"""

    data: str = flag(
        REQUIRED, "instructions: dolly, alpaca, stdlib-doc (embedded), or a local table or folder "
        "with columns prompt and response, or instruction, input and output", metavar="DATA",
    )  # fmt: skip
    dev_data: str | None = flag(None, "validation examples (default: --data's own)", metavar="DATA")
    train_num: int | None = flag(None, "training examples, at most", check=AT_LEAST_1)
    dev_num: int = flag(1000, "validation examples, at most (default 1000)", check=AT_LEAST_1)
    max_length: int | None = flag(
        None, "of prompt and response (default 512, or the model's context if that is shorter); "
        "longer examples are cut", metavar="TOKENS",
    )  # fmt: skip
    max_prompt_length: int | None = flag(
        None, "longer prompts are left out, and counted (default: half of --max-length)",
        metavar="TOKENS",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """how long and how fast"""

    batch_size: int = flag(8, "examples per forward and process (default 8)")
    gradient_accumulation_steps: int = flag(1, "forwards per optimizer step (default 1)")
    eval_batch_size: int | None = flag(None, "default: --batch-size", check=AT_LEAST_1)
    lr: float | None = flag(None, "default: what was published for the size", metavar="R")
    lr_min: float = flag(1e-7, "end of cosine (default 1e-7)", metavar="R")
    lr_decay_style: str = flag("cosine", "default cosine", choices=["cosine", "constant"])
    warmup_iters: int = flag(0, "default 0")
    epochs: float | None = flag(
        None, "default: what was published for the size", metavar="N", check=POSITIVE
    )
    total_iters: int | None = flag(None, "optimizer steps, instead of --epochs", check=POSITIVE)
    weight_decay: float = flag(1e-2, "default 1e-2", metavar="W")
    clip_grad: float = flag(1.0, "default 1.0", metavar="C")
    eval_interval: int | None = flag(
        None, "steps between looks at the validation set (default: an epoch)", check=POSITIVE
    )
    save_interval: int | None = flag(
        None, "steps between saved states, which a killed run goes on from (default: at each look)",
        check=POSITIVE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Peft:
    """LoRA (merged at the end)"""

    peft: str | None = flag(None, "train LoRA (default: all weights)", choices=["lora"])
    peft_lora_r: int = flag(8, "rank (default 8)")
    peft_lora_alpha: int = flag(32, "default 32")
    peft_lora_dropout: float = flag(0.1, "default 0.1", metavar="P", check=BELOW_1)
    densify: bool = flag(False, "let LoRA fill the zeros of a pruned model")
    peft_path: str | None = flag(
        None, "adapter that is merged into MODEL at the start", metavar="FOLDER"
    )
    teacher_peft_path: str | None = flag(None, "adapter of the teacher", metavar="FOLDER")


def lora(settings) -> dict | None:
    """Arguments of `harness.training.lora.add`, or None, from settings with Peft's."""
    if not settings.peft:
        return None
    return {
        "r": settings.peft_lora_r, "alpha": settings.peft_lora_alpha,
        "dropout": settings.peft_lora_dropout, "seed": settings.seed,
    }  # fmt: skip


def lengths(settings, *contexts: int | None) -> tuple[int, int]:
    """(--max-length, --max-prompt-length) of settings that have them, for models with these
    contexts.

    Raises:
        UserError: a model's context is shorter than what was asked for.
    """
    from harness.checkpoint.load import example_length

    longest = example_length("--max-length", settings.max_length, 512, *contexts)
    return longest, settings.max_prompt_length or longest // 2


def training(settings, parameters: int, examples: int, ranks: int):
    """`training.engine.Training` of the settings, and a sentence on where its numbers come from.

    Args:
        settings: Schedule, Engine and Peft in one. parameters: of the student, for what was
            published. examples: rows an epoch goes through.
    """
    from harness.training.engine import Training

    rate, epochs = LORA if settings.peft else next(p[1:] for p in PUBLISHED if parameters <= p[0])
    kind = "for LoRA" if settings.peft else f"nearest to {parameters / 1e6:.1f} M parameters"
    why = (
        f" (published {kind})"
        if None in (settings.lr, settings.total_iters or settings.epochs)
        else ""
    )
    rate = rate if settings.lr is None else settings.lr
    epochs = settings.epochs or epochs
    batch = settings.batch_size * settings.gradient_accumulation_steps * ranks
    plan = Training(
        rate, settings.total_iters or max(1, ceil(epochs * examples / max(1, batch))),
        settings.batch_size, settings.gradient_accumulation_steps, settings.warmup_iters,
        settings.lr_decay_style, min(settings.lr_min, rate), weight_decay=settings.weight_decay,
        clip=settings.clip_grad, zero=settings.zero, offload=settings.offload,
        gradient_checkpointing=settings.gradient_checkpointing, seed=settings.seed,
    )  # fmt: skip
    passes = plan.steps * batch / examples
    return plan, (
        f"{plan.steps} steps of {batch} examples, {passes:.3g} epochs, learning rate {rate:.3g}"
        f"{why}"
    )
