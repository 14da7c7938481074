"""``python -m minillm.distill TEACHER STUDENT --data dolly``: the whole chain in one command."""

import argparse
import shlex
import sys

from harness import cli
from harness.errors import UserError
from minillm import flags, presets

EXAMPLES = """\
examples:
  python -m minillm.distill tiny-llama tiny-llama-student --data stdlib-doc --lm-data stdlib \\
      --enable-sft-teacher
  python -m minillm.distill gpt2-xl gpt2 --data dolly --lm-data wikitext2 --enable-sft-teacher \\
      --preset gpt2-base --teacher-preset gpt2-xl --out gpt2-from-xl
  python -m minillm.distill facebook/opt-1.3b facebook/opt-125m --data dolly \\
      --sft "--epochs 3 --lr 5e-5" --minillm "--total-iters 500" --evaluate "--seeds 10 20"
  deepspeed --num_gpus 8 --module minillm.distill TEACHER STUDENT --data dolly --all "--zero 2"
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m minillm.distill",
        description="Supervised fine-tuning of the student (and of the teacher, if asked), MiniLLM "
        "from there, and Rouge-L of all of them: the commands that are printed, one after another. "
        "One that fails ends the chain, with its reason and exit code; run again, the chain goes "
        "on there.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("teacher", metavar="TEACHER", help="folder, hub id or embedded name")
    p.add_argument("student", metavar="STUDENT", help="folder, hub id or embedded name")
    flags.add(
        p, "--data", required=True, metavar="DATA",
        help="instructions: dolly, alpaca, stdlib-doc (embedded), or a local table or folder",
    )  # fmt: skip
    flags.add(
        p, "--lm-data", metavar="TEXT", help="plain text for MiniLLM's language-modelling part"
    )
    flags.add(p, "--enable-sft-teacher", action="store_true", help="fine-tune the teacher first")
    presets.add(p)
    flags.add(
        p, "--teacher-preset", choices=presets.names(), metavar="NAME",
        help="the same for the teacher's fine-tuning",
    )  # fmt: skip
    g = p.add_argument_group("more flags of single steps, in quotes: they win")
    for name, what in (
        ("--sft-teacher", "the teacher's fine-tuning"),
        ("--sft", "the student's"),
        ("--minillm", "MiniLLM"),
        ("--evaluate", "the evaluations"),
        ("--all", "the three trainings"),
    ):
        flags.add(g, name, default="", metavar='"FLAGS"', type=_words, help=f"of {what}")
    flags.add(p, "--local-rank", type=int, help=argparse.SUPPRESS)
    cli.add_shared_flags(p)
    return p


def _words(text: str) -> list[str]:
    return shlex.split(text)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from minillm.chain import StepFailed, run

    try:
        results = run(args)
    except StepFailed as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.code
    if results:
        from harness.commands import report

        print(report.comparison(results))
    return cli.DONE


class Distiller:
    """``Distiller(teacher, student, data="dolly", ...).distill()``: the command from Python.

    Settings are the flags' names with underscores; flags of single steps as one text, as there.
    """

    def __init__(self, teacher: str, student: str, **settings):
        words = [teacher, student]
        for name, value in {"data": "dolly", **settings}.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words += [flag] if value else [f"--no-{flag[2:]}"] if name == "resume" else []
            elif value is not None:
                words.append(f"{flag}={value}")
        known = {action.dest for action in parser()._actions}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise UserError(f"{', '.join(unknown)}: no flag of python -m minillm.distill.")
        self.args = parser().parse_args(words)

    def distill(self) -> list[dict]:
        """Run the chain, as `chain.run`; the distilled model is in the folder OUT/minillm."""
        from minillm.chain import run

        return run(self.args)


if __name__ == "__main__":
    sys.exit(main())
