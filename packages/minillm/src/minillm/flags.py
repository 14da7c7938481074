"""Flags that the training commands share, under the original's names; a flag may be written with
hyphens or underscores. No torch up here."""

import argparse
from math import ceil

from harness.errors import UserError

# Parameters up to, learning rate, epochs: what the original trained GPT-2, OPT and LLaMA with.
PUBLISHED = (
    (200e6, 5e-4, 20),
    (600e6, 1e-4, 20),
    (1.2e9, 1e-4, 10),
    (3e9, 5e-5, 10),
    (float("inf"), 1e-5, 10),
)
LORA = (5e-4, 20)


def add(group, name: str, **more) -> None:
    """A flag, and its spelling with underscores."""
    other = "--" + name[2:].replace("-", "_")
    group.add_argument(*dict.fromkeys([name, other]), **more)


def add_data(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("data")
    add(
        g,
        "--data",
        required=True,
        metavar="DATA",
        help="instructions: dolly, alpaca, stdlib-doc (embedded), or a local table or folder with "
        "columns prompt and response, or instruction, input and output",
    )
    add(g, "--dev-data", metavar="DATA", help="validation examples (default: --data's own)")
    add(g, "--train-num", type=int, metavar="N", help="training examples, at most")
    add(
        g, "--dev-num", type=int, default=1000, metavar="N",
        help="validation examples, at most (default 1000)",
    )  # fmt: skip
    add(
        g, "--max-length", type=int, metavar="TOKENS",
        help="of prompt and response (default 512, or the model's context if that is shorter); "
        "longer examples are cut",
    )  # fmt: skip
    add(
        g, "--max-prompt-length", type=int, metavar="TOKENS",
        help="longer prompts are left out, and counted (default: half of --max-length)",
    )  # fmt: skip


def add_schedule(p: argparse.ArgumentParser):
    """Batches, epochs and the optimizer; returns the group."""
    g = p.add_argument_group("how long and how fast")
    add(
        g, "--batch-size", type=int, default=8, metavar="N",
        help="examples per forward and process (default 8)",
    )  # fmt: skip
    add(
        g, "--gradient-accumulation-steps", type=int, default=1, metavar="N",
        help="forwards per optimizer step (default 1)",
    )  # fmt: skip
    add(g, "--eval-batch-size", type=int, metavar="N", help="default: --batch-size")
    add(g, "--lr", type=float, metavar="R", help="default: what was published for the size")
    add(g, "--lr-min", type=float, default=1e-7, metavar="R", help="end of cosine (default 1e-7)")
    add(
        g, "--lr-decay-style", default="cosine", choices=["cosine", "constant"],
        help="default cosine",
    )  # fmt: skip
    add(g, "--warmup-iters", type=int, default=0, metavar="N", help="default 0")
    add(g, "--epochs", type=float, metavar="N", help="default: what was published for the size")
    add(g, "--total-iters", type=int, metavar="N", help="optimizer steps, instead of --epochs")
    add(g, "--weight-decay", type=float, default=1e-2, metavar="W", help="default 1e-2")
    add(g, "--clip-grad", type=float, default=1.0, metavar="C", help="default 1.0")
    add(
        g, "--eval-interval", type=int, metavar="N",
        help="steps between looks at the validation set (default: an epoch)",
    )  # fmt: skip
    add(
        g, "--save-interval", type=int, metavar="N",
        help="steps between saved states, which a killed run goes on from (default: at each look)",
    )  # fmt: skip
    return g


def add_engine(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("DeepSpeed (more processes: deepspeed or torchrun before the command)")
    add(
        g, "--zero", type=int, default=0, choices=range(4),
        help="what processes share: 1 optimizer states, 2 and gradients, 3 and weights (default 0)",
    )  # fmt: skip
    add(g, "--offload", action="store_true", help="optimizer states in CPU memory; 3: weights too")
    add(
        g, "--gradient-checkpointing", action="store_true",
        help="less memory, a third more time: activations are made again in the backward pass",
    )  # fmt: skip
    # The deepspeed launcher hands this to every process, which has it from its environment too.
    add(g, "--local-rank", type=int, help=argparse.SUPPRESS)


def add_peft(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("LoRA (merged at the end)")
    add(g, "--peft", choices=["lora"], help="train LoRA (default: all weights)")
    add(g, "--peft-lora-r", type=int, default=8, metavar="N", help="rank (default 8)")
    add(g, "--peft-lora-alpha", type=int, default=32, metavar="N", help="default 32")
    add(g, "--peft-lora-dropout", type=float, default=0.1, metavar="P", help="default 0.1")
    add(g, "--densify", action="store_true", help="let LoRA fill the zeros of a pruned model")
    add(g, "--peft-path", metavar="FOLDER", help="adapter that is merged into MODEL at the start")
    add(g, "--teacher-peft-path", metavar="FOLDER", help="adapter of the teacher")


def lora(args: argparse.Namespace) -> dict | None:
    """Arguments of `minillm.models.add_lora`, or None."""
    if not args.peft:
        return None
    return {
        "r": args.peft_lora_r, "alpha": args.peft_lora_alpha, "dropout": args.peft_lora_dropout,
        "seed": args.seed,
    }  # fmt: skip


def lengths(args: argparse.Namespace, *contexts: int | None) -> tuple[int, int]:
    """(--max-length, --max-prompt-length), for models with these contexts.

    Raises:
        UserError: a model's context is shorter than what was asked for.
    """
    context = min([c for c in contexts if c], default=None)
    longest = args.max_length or min(512, context or 512)
    if longest < 2 or (context and longest > context):
        raise UserError(
            f"--max-length {longest}: expected 2 to {context or 'any number of'} tokens, the "
            "model's context."
        )
    return longest, args.max_prompt_length or longest // 2


def training(args: argparse.Namespace, parameters: int, examples: int, ranks: int):
    """`training.engine.Training` of these flags, and a sentence on where its numbers come from.

    Args:
        parameters: of the student, for what was published. examples: rows an epoch goes through.
    """
    from harness.training.engine import Training

    rate, epochs = LORA if args.peft else next(p[1:] for p in PUBLISHED if parameters <= p[0])
    kind = "for LoRA" if args.peft else f"nearest to {parameters / 1e6:.1f} M parameters"
    why = f" (published {kind})" if None in (args.lr, args.total_iters or args.epochs) else ""
    rate = rate if args.lr is None else args.lr
    epochs = args.epochs or epochs
    batch = args.batch_size * args.gradient_accumulation_steps * ranks
    for name in ("epochs", "total_iters", "eval_interval", "save_interval", "train_num", "dev_num"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")
    made = Training(
        rate, args.total_iters or max(1, ceil(epochs * examples / max(1, batch))),
        args.batch_size, args.gradient_accumulation_steps, args.warmup_iters, args.lr_decay_style,
        min(args.lr_min, rate), weight_decay=args.weight_decay, clip=args.clip_grad,
        zero=args.zero, offload=args.offload,
        gradient_checkpointing=args.gradient_checkpointing, seed=args.seed,
    )  # fmt: skip
    passes = made.steps * batch / examples
    return made, (
        f"{made.steps} steps of {batch} examples, {passes:.3g} epochs, learning rate {rate:.3g}"
        f"{why}"
    )
