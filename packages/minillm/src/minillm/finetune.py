"""``python -m minillm.finetune MODEL --data dolly``: SFT, and distillation on given responses."""

import argparse
import sys

from harness import cli
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


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m minillm.finetune",
        description="Fine-tune a causal language model on instructions: SFT, word-level (kd) or "
        "sequence-level (seqkd) distillation. The result is an ordinary checkpoint, the best seen.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="MODEL", help="folder, hub id or embedded name")
    presets.add(p)
    what = p.add_argument_group("towards what")
    flags.add(
        what, "--type", default="sft", choices=["sft", "kd", "seqkd"],
        help="sft (default); kd: the teacher's distribution too; seqkd: responses that a teacher "
        "wrote, from minillm.generate (and its distribution, with --teacher)",
    )  # fmt: skip
    flags.add(what, "--teacher", metavar="MODEL", help="folder, hub id or embedded name")
    flags.add(
        what, "--teacher-cache", metavar="FOLDER",
        help="the teacher's probabilities, from minillm.cache_teacher; no teacher is loaded",
    )  # fmt: skip
    flags.add(
        what, "--kd-ratio", type=float, default=0.5, metavar="R",
        help="R divergence + (1 - R) cross entropy (default 0.5)",
    )  # fmt: skip
    flags.add(what, "--loss", default="forward_kl", choices=LOSSES, help="default forward_kl")
    flags.add(what, "--align", choices=["uld"], help="for a teacher with another tokenizer")
    flags.add_data(p)
    flags.add(
        p, "--packing", action="store_true",
        help="several examples in a row of --max-length tokens: no padding (sft, seqkd without a "
        "teacher)",
    )  # fmt: skip
    how = flags.add_schedule(p)
    flags.add(
        how, "--eval-gen", action="store_true",
        help="each look also samples responses to the validation prompts, and takes their Rouge-L",
    )  # fmt: skip
    flags.add(
        how, "--select", choices=["loss", "rouge"],
        help="what the best checkpoint is best by (default: rouge with --eval-gen, as in the "
        "original; MiniLLM starts from the best by loss)",
    )  # fmt: skip
    flags.add(how, "--greedy", action="store_true", help="--eval-gen takes the likeliest tokens")
    flags.add_engine(p)
    flags.add_peft(p)
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = presets.parse(parser(), argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from harness import distributed
    from harness.training import engine, meter
    from minillm.finetune_run import finetune

    args.out = args.out or f"{Path(args.model).name}-{args.type}"
    with engine.group():
        result = finetune(args)
        lead = distributed.rank() == 0
    if lead and result:
        print(meter.table(result))
        print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
