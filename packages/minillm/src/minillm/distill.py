"""``python -m minillm.distill TEACHER STUDENT --data dolly``: the whole chain in one command."""

import argparse
import shlex
import sys
from dataclasses import dataclass, fields

from harness import cli
from harness.errors import UserError
from harness.settings import REQUIRED, flag, make_parser, word
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


def _splits(text: str) -> bool:
    try:
        return shlex.split(text) is not None
    except ValueError:
        return False


def _more(whose: str):
    return flag("", f"of {whose}", metavar='"FLAGS"', check=(_splits, "a quote is not closed"))


@dataclass(frozen=True, kw_only=True)
class Steps:
    """more flags of single steps, in quotes: they win"""

    sft_teacher: str = _more("the teacher's fine-tuning")
    sft: str = _more("the student's")
    minillm: str = _more("MiniLLM")
    evaluate: str = _more("the evaluations")
    all: str = _more("the three trainings")


@dataclass(frozen=True, kw_only=True)
class Settings(Steps, flags.Shared):
    """Supervised fine-tuning of the student (and of the teacher, if asked), MiniLLM from there,
    and Rouge-L of all of them: the commands that are printed, one after another. One that fails
    ends the chain, with its reason and exit code; run again, the chain goes on there.
    """

    teacher: str = word("TEACHER", "folder, hub id or embedded name")
    student: str = word("STUDENT", "folder, hub id or embedded name")
    data: str = flag(
        REQUIRED, "instructions: dolly, alpaca, stdlib-doc (embedded), or a local table or folder",
        metavar="DATA",
    )  # fmt: skip
    lm_data: str | None = flag(
        None, "plain text for MiniLLM's language-modelling part", metavar="TEXT"
    )
    enable_sft_teacher: bool = flag(False, "fine-tune the teacher first")
    preset: str | None = presets.preset()
    teacher_preset: str | None = flag(
        None, "the same for the teacher's fine-tuning", choices=presets.names(), metavar="NAME"
    )


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "minillm.distill", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> int:
    from minillm.chain import StepFailed, run

    try:
        results = run(settings)
    except StepFailed as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.code
    if results:
        from harness.commands import report

        print(report.comparison(results))
    return cli.DONE


class Distiller:
    """``Distiller(teacher, student, data="dolly", ...).distill()``: the command from Python.

    Keywords are the fields of :class:`Settings`; flags of single steps as one text, as there.

    Raises:
        UserError: a keyword or value that is none.
    """

    def __init__(self, teacher: str, student: str, **settings):
        unknown = sorted(set(settings) - {field.name for field in fields(Settings)})
        if unknown:
            raise UserError(f"{', '.join(unknown)}: no flag of python -m minillm.distill.")
        given = {name: value for name, value in settings.items() if value is not None}
        self.settings = Settings(teacher=teacher, student=student, **{"data": "dolly", **given})

    def distill(self) -> list[dict]:
        """Run the chain, as `chain.run`; the distilled model is in the folder OUT/minillm."""
        from minillm.chain import run

        return run(self.settings)


if __name__ == "__main__":
    sys.exit(main())
