"""``python -m bitdistiller.train MODEL --clip FOLDER --data FILE --bits 2``: quantization-aware
self-distillation."""

import argparse
import sys

from bitdistiller import flags
from harness import cli

LOSSES = ("cakld", "forward", "reverse", "jsd", "ce")
QUANT_TYPES = ("int", "int2-asym", "nf3", "nf4", "ste-n2f3")
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


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m bitdistiller.train",
        description="Train a model's weights while it computes with their quantized values, "
        "towards its own dense self. The result is an ordinary checkpoint of the quantized values, "
        "the best seen: the file is the model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", nargs="?", metavar="MODEL", help="folder, hub id or embedded name")
    flags.add(p, "--model_name_or_path", metavar="MODEL", help="the same, as the original has it")
    _add_grid(p)
    data = flags.add_data(p)
    flags.add(data, "--eval_data", metavar="DATA", help="held-out examples (default: --data's own)")
    flags.add(
        data, "--max_eval_samples", type=int, default=500, metavar="N",
        help="held-out examples, at most (default 500)",
    )  # fmt: skip
    _add_objective(p)
    _add_schedule(p)
    _add_engine(p)
    cli.add_ignore(p)
    cli.add_shared_flags(p, seed=42)
    return p


def _add_grid(p) -> None:
    g = p.add_argument_group("what the weights become")
    flags.add(g, "--clip", metavar="PATH", help="from bitdistiller.autoclip (default: no clipping)")
    flags.add(g, "--bits", type=int, metavar="N", help="2 to 8 (default 2; nf3 has 3, nf4 has 4)")
    flags.add(
        g, "--q_group_size", type=int, default=128, metavar="N",
        help="columns that share a scale; -1: a row (default 128)",
    )  # fmt: skip
    flags.add(
        g, "--quant_type", default="int", choices=QUANT_TYPES,
        help="int (default; int2-asym is 2 bits of it): with a zero point; nf3 (ste-n2f3), nf4: "
        "NormalFloat with a scale for each sign",
    )  # fmt: skip
    flags.add(
        g, "--learn", choices=["weights", "scales", "all"],
        help="weights (default): grids follow them; scales alone (default with --start); all: "
        "weights, scales and zero points",
    )  # fmt: skip
    flags.add(
        g, "--start", metavar="FOLDER",
        help="a result of bitdistiller.blockwise or of this command, to go on from",
    )  # fmt: skip


def _add_objective(p) -> None:
    g = p.add_argument_group("towards what")
    flags.add_switch(g, "--train_kd", True, "towards the dense model; False is --kd_loss_type ce")
    flags.add(
        g, "--kd_loss_type", default="cakld", choices=LOSSES,
        help="cakld (default): beta KL(student || teacher) + (1 - beta) KL(teacher || student); "
        "its two parts alone; jsd at .5; ce: cross entropy of the labels, without a teacher",
    )  # fmt: skip
    flags.add(
        g, "--cakld_steps", type=int, default=10, metavar="N",
        help="beta is the teacher's mean confidence over so many batches (default 10)",
    )  # fmt: skip
    flags.add(g, "--beta", type=float, metavar="B", help="beta by hand, 0 to 1")
    flags.add(
        g, "--teacher_cache", metavar="FOLDER",
        help="the dense model's probabilities, from bitdistiller.cache_teacher; no teacher is "
        "loaded",
    )  # fmt: skip
    flags.add_switch(
        g, "--original_loss", False,
        "the original's: prompts count, sums over tokens, means over examples",
    )  # fmt: skip


def _add_schedule(p) -> None:
    g = p.add_argument_group("how long and how fast")
    flags.add(g, "--num_train_epochs", type=float, default=4.0, metavar="N", help="default 4")
    flags.add(g, "--max_steps", type=int, metavar="N", help="optimizer steps, instead of epochs")
    flags.add(
        g, "--per_device_train_batch_size", "--batch_size", type=int, default=16, metavar="N",
        help="examples per forward and process (default 16)",
    )  # fmt: skip
    flags.add(
        g, "--per_device_eval_batch_size", type=int, metavar="N",
        help="default: as for training",
    )  # fmt: skip
    flags.add(
        g, "--gradient_accumulation_steps", type=int, default=1, metavar="N",
        help="forwards per optimizer step (default 1)",
    )  # fmt: skip
    flags.add(g, "--learning_rate", type=float, default=8e-6, metavar="R", help="default 8e-6")
    flags.add(
        g, "--lr_scheduler_type", default="constant", choices=["constant", "cosine"],
        help="default constant",
    )  # fmt: skip
    flags.add(g, "--warmup_steps", type=int, default=0, metavar="N", help="default 0")
    flags.add(g, "--weight_decay", type=float, default=0.0, metavar="W", help="default 0")
    flags.add(g, "--max_grad_norm", type=float, default=1.0, metavar="C", help="default 1")
    flags.add(
        g, "--eval_steps", type=int, metavar="N",
        help="steps between looks; the best one's weights are the result (default: an epoch)",
    )  # fmt: skip
    flags.add(
        g, "--save_steps", type=int, metavar="N",
        help="steps between saved states, which a killed run goes on from (default: at each look)",
    )  # fmt: skip
    flags.add(
        g, "--ppl", metavar="TEXT",
        help="a look is the token perplexity of this text's test split, which then chooses: report "
        "another's (default: the held-out examples' loss)",
    )  # fmt: skip
    flags.add(g, "--ppl_limit", type=int, metavar="N", help="its first N windows")


def _add_engine(p) -> None:
    g = p.add_argument_group("DeepSpeed (more processes: deepspeed or torchrun before the command)")
    flags.add(
        g, "--zero", type=int, default=2, choices=range(4),
        help="what processes share: 1 optimizer states, 2 and gradients (default), 3 and weights",
    )  # fmt: skip
    flags.add_switch(g, "--offload", False, "optimizer states in CPU memory; --zero 3: weights too")
    flags.add_switch(g, "--gradient_checkpointing", False, "less memory, a third more time")
    flags.add_switch(g, "--bf16", False, "--dtype bfloat16")
    # The deepspeed launcher hands this to every process, which has it from its environment too.
    flags.add(g, "--local_rank", type=int, help=argparse.SUPPRESS)
    flags.add(g, "--output_dir", dest="out", default=argparse.SUPPRESS, help="--out")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from bitdistiller.train_run import train
    from harness import distributed
    from harness.training import engine, meter

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with engine.group():
        result = train(args)
        lead = distributed.rank() == 0
    if lead and result:
        print(meter.table(result))
        print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
