"""``python -m sparse.recover PRUNED --dataset alpaca``: parse, tune, and say what it brought."""

import argparse
import sys

from harness import cli

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
  torchrun --nproc-per-node 4 -m sparse.recover PRUNED --dataset alpaca --out RECOVERED
      each batch dealt to 4 GPUs or CPU processes; accelerate launch --multi_gpu does the same
then:
  harness eval RECOVERED --ppl wikitext2 --divergence-from DENSE
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are LLM-Pruner's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m sparse.recover",
        description="Recover what pruning cost: tune a pruned checkpoint with LoRA (merged at the "
        "end) or whole, alone or with the dense model as teacher. The result has the layout and "
        "sizes of PRUNED, and is the best seen by validation loss.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="PRUNED", help="folder, hub id or embedded name")
    p.add_argument(
        "--dataset",
        "--data_path",
        required=True,
        help="instructions (alpaca, dolly, stdlib-doc, or a local table with prompts and "
        "responses), or text (c4, wikitext2, ptb, pileval, stdlib, or a local file or folder)",
    )
    what = p.add_argument_group("what is trained, and towards what")
    what.add_argument(
        "--tune", default="lora", choices=["lora", "full"], help="LoRA (default) or all weights"
    )
    what.add_argument("--lora_r", type=int, default=8, metavar="N", help="rank (default 8)")
    what.add_argument(
        "--lora_alpha", type=int, default=16, metavar="N", help="scale times rank (default 16)"
    )
    what.add_argument("--lora_dropout", type=float, default=0.05, metavar="P", help="default 0.05")
    what.add_argument(
        "--lora_target_modules",
        metavar="A,B",
        help="linears by name, q_proj,v_proj ... (default: all of the blocks)",
    )
    what.add_argument("--teacher", metavar="DENSE", help="distil from this model, too")
    what.add_argument(
        "--kd_weight",
        type=float,
        default=0.5,
        metavar="W",
        help="with --teacher: W divergence + (1 - W) cross entropy (default 0.5)",
    )
    what.add_argument(
        "--kd_loss",
        default="forward_kl",
        choices=["forward_kl", "reverse_kl", "jsd"],
        help="with --teacher: which divergence (default forward_kl)",
    )
    what.add_argument(
        "--densify", action="store_true", help="let the zeros of a sparse model be filled"
    )
    data = p.add_argument_group("data")
    data.add_argument(
        "--cutoff_len",
        type=int,
        metavar="TOKENS",
        help="per example (default: instructions 256; text 1024, or the context if it is shorter)",
    )
    data.add_argument(
        "--val_set_size",
        type=int,
        metavar="N",
        help="held-out examples, at most (default: instructions 2000; text 32)",
    )
    data.add_argument(
        "--max_train_samples",
        type=int,
        metavar="N",
        help="training examples, at most (default: instructions all; text 30000)",
    )
    data.add_argument(
        "--train_on_inputs",
        action="store_true",
        help="predict the prompts of instructions as well as the responses",
    )
    how = p.add_argument_group("how long and how fast")
    how.add_argument("--num_epochs", type=float, default=2, metavar="N", help="default 2")
    how.add_argument("--max_steps", type=int, metavar="N", help="stop after so many steps")
    how.add_argument(
        "--max_minutes",
        type=float,
        metavar="M",
        help="stop after so long; the learning rate falls with the clock, and the result's bytes "
        "depend on the machine",
    )
    how.add_argument(
        "--learning_rate",
        type=float,
        metavar="R",
        help="default at width 4096: LoRA 1e-4 on instructions, 3e-4 on text; --tune full 2e-5 and "
        "6e-5; in inverse proportion to the width of others",
    )
    how.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help="examples per step, over all processes (default: instructions 64; text 8)",
    )
    how.add_argument(
        "--micro_batch_size",
        type=int,
        default=4,
        metavar="N",
        help="of them at a time in each process (default 4); memory, not the result",
    )
    how.add_argument(
        "--warmup_steps",
        type=int,
        default=100,
        metavar="N",
        help="default 100, at most a tenth of the run",
    )
    how.add_argument(
        "--eval_steps",
        type=int,
        metavar="N",
        help="steps between looks at the validation loss (default: ten looks in all)",
    )
    how.add_argument(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="stop after so many looks without a better loss (default 5, half a run; 0: never)",
    )
    how.add_argument(
        "--save_steps",
        type=int,
        metavar="N",
        help="steps between saves of the state (always: one at each look)",
    )
    how.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="less memory, a third more time: activations are made again in the backward pass",
    )
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    options = vars(args)
    targets = options.pop("lora_target_modules")
    out = options.pop("out") or f"{Path(args.model).name}-recovered"

    from harness import distributed
    from harness.checkpoint import card
    from sparse.recover_run import recover

    with distributed.group():
        result = recover(
            options.pop("model"),
            options.pop("dataset"),
            out=out,
            lora_target_modules=targets.split(",") if targets else None,
            command=card.command_line(),
            **options,
        )
        lead = distributed.rank() == 0
    if lead and result:
        _print_table(result)
        print(f"written to {out}")


def _print_table(result) -> None:
    """Validation loss and perplexity: before, after and, where there is one, of the teacher."""
    from math import exp

    rows = {"before": result.before, f"after (step {result.step})": result.after}
    if result.teacher is not None:
        rows["teacher"] = result.teacher
    print("| | validation loss | perplexity |\n| --- | ---: | ---: |")
    for label, loss in rows.items():
        print(f"| {label} | {loss:.4f} | {exp(min(loss, 700)):.3f} |")
    line = f"{result.steps} steps, {result.tokens} tokens, {result.seconds:.0f} s"
    if result.teacher is not None and result.before > result.teacher:
        won = (result.before - result.after) / (result.before - result.teacher)
        line += f"; {won:.0%} of the loss of log-perplexity against the teacher is won back"
    print(line)


if __name__ == "__main__":
    sys.exit(main())
