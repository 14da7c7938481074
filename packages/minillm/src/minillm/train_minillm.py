"""``python -m minillm.train_minillm STUDENT --teacher T --data dolly``: on-policy distillation."""

import argparse
import sys

from harness import cli
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


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m minillm.train_minillm",
        description="MiniLLM: the student writes responses to prompts and learns to lower its "
        "reverse KL to the teacher on them, by policy gradient. The result is an ordinary "
        "checkpoint, the best seen.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="STUDENT", help="folder, hub id or embedded name")
    p.add_argument("--teacher", required=True, metavar="MODEL", help="folder, hub id or embedded")
    presets.add(p)
    flags.add_data(p)
    _add_policy(p)
    _add_language_model(p)
    _add_schedule(p)
    flags.add_engine(p)
    flags.add_peft(p)
    cli.add_shared_flags(p)
    # Nothing is dropped here: a rollout's probabilities must be those that its tokens had.
    p.set_defaults(peft_lora_dropout=0.0)
    return p


def _add_policy(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("rollouts and their gradient")
    flags.add(
        g, "--num-rollouts", type=int, default=256, metavar="N",
        help="responses per phase, over all processes (default 256)",
    )  # fmt: skip
    flags.add(
        g, "--ppo-epochs", type=int, default=4, metavar="N",
        help="times that a phase's rollouts are gone through (default 4)",
    )  # fmt: skip
    flags.add(
        g, "--chunk-size", type=int, default=16, metavar="N",
        help="responses written at a time in each process (default 16); speed, not the result",
    )  # fmt: skip
    flags.add(
        g, "--teacher-mixed-alpha", type=float, default=0.2, metavar="A",
        help="the teacher's part of the distribution that rollouts are drawn from (default 0.2; "
        "0: the student alone)",
    )  # fmt: skip
    flags.add(g, "--gamma", type=float, default=0.95, metavar="G", help="discount (default 0.95)")
    flags.add(
        g, "--reward-scaling", type=float, default=0.5, metavar="S",
        help="rewards are divided by it (default 0.5)",
    )  # fmt: skip
    flags.add(
        g, "--cliprange-reward", type=float, default=100.0, metavar="C",
        help="and cut at +- C (default 100)",
    )  # fmt: skip
    flags.add(
        g, "--cliprange", type=float, default=0.2, metavar="C",
        help="of the ratio of new to old probability times the weight (default 0.2; inf: none)",
    )  # fmt: skip
    _add_switch(g, "--length-norm", "rewards are averaged over the tokens that are left (default)")
    _add_switch(
        g, "--single-step-reg", "the next token's reverse KL over the whole vocabulary (default)"
    )
    flags.add(
        g, "--future-rewards", action="store_true",
        help="a token is paid the rewards after it only, as the paper's equation has it beside the "
        "single-step term; the original's code counts its own reward, too",
    )  # fmt: skip


def _add_switch(group, name: str, text: str) -> None:
    flags.add(group, name, action=argparse.BooleanOptionalAction, default=True, help=text)


def _add_language_model(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("language modelling on plain text, beside the rollouts")
    flags.add(
        g, "--lm-data", metavar="TEXT",
        help="wikitext2, c4, stdlib (embedded), or a local file or folder (default: none)",
    )  # fmt: skip
    flags.add(g, "--lm-coef", type=float, default=1.0, metavar="C", help="its weight (default 1)")
    flags.add(
        g, "--kd-ratio", type=float, default=0.5, metavar="R",
        help="there, R forward KL to the teacher + (1 - R) cross entropy (default 0.5)",
    )  # fmt: skip
    flags.add(
        g, "--lm-num", type=int, default=30_000, metavar="N",
        help="windows of --max-length tokens, at most (default 30000)",
    )  # fmt: skip


def _add_schedule(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("how long and how fast")
    flags.add(
        g, "--batch-size", type=int, default=8, metavar="N",
        help="rollouts per forward and process (default 8)",
    )  # fmt: skip
    flags.add(
        g, "--gradient-accumulation-steps", type=int, metavar="N",
        help="forwards per optimizer step (default: as many as make 64 rollouts a step)",
    )  # fmt: skip
    flags.add(g, "--eval-batch-size", type=int, metavar="N", help="default: --chunk-size")
    flags.add(g, "--lr", type=float, default=5e-6, metavar="R", help="default 5e-6")
    flags.add(
        g, "--lr-decay-style", default="constant", choices=["cosine", "constant"],
        help="default constant",
    )  # fmt: skip
    flags.add(g, "--lr-min", type=float, default=5e-6, metavar="R", help="end of cosine (5e-6)")
    flags.add(g, "--warmup-iters", type=int, default=100, metavar="N", help="default 100")
    flags.add(
        g, "--total-iters", type=int, default=5000, metavar="N",
        help="optimizer steps, at most (default 5000)",
    )  # fmt: skip
    flags.add(
        g, "--epochs", type=float, default=10, metavar="N",
        help="over the prompts, at most (default 10)",
    )  # fmt: skip
    flags.add(g, "--weight-decay", type=float, default=1e-6, metavar="W", help="default 1e-6")
    flags.add(g, "--clip-grad", type=float, default=1.0, metavar="C", help="default 1.0")
    flags.add(
        g, "--eval-interval", type=int, default=100, metavar="N",
        help="steps between looks at the validation prompts (default 100)",
    )  # fmt: skip
    flags.add(
        g, "--save-interval", type=int, metavar="N",
        help="steps between saved states (default: at each look); a state is saved when the phase "
        "is over",
    )  # fmt: skip
    flags.add(
        g, "--select", default="reverse-kl", choices=["reverse-kl", "rouge"],
        help="what the best checkpoint is best by (default reverse-kl, to the teacher on the "
        "student's own responses; rouge: their Rouge-L)",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = presets.parse(parser(), argv, "minillm")
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from harness import distributed
    from harness.training import engine
    from minillm.train_minillm_run import train

    args.out = args.out or f"{Path(args.model).name}-minillm"
    with engine.group():
        result = train(args)
        lead = distributed.rank() == 0
    if lead and result:
        _print_table(result)
        print(f"written to {args.out}")


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
