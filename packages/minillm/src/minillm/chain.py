"""The steps of ``minillm.distill``: which commands they are, and one after another."""

import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint import load, recipe, runs
from harness.commands import report
from harness.errors import UserError
from minillm import presets

# Settings that are flags of single steps.
MORE = ("sft_teacher", "sft", "minillm", "evaluate", "all")


class StepFailed(Exception):
    """A step that ended with an exit code, and the last that it said."""

    def __init__(self, step: str, code: int, reason: str):
        super().__init__(f"{step} ended with exit code {code}: {reason}")
        self.code = code


@dataclass(frozen=True)
class Step:
    """A command of this package, ``python -m minillm.COMMAND WORDS``, and what it makes."""

    name: str
    command: str
    words: list[str]
    result: Path

    def __str__(self) -> str:
        return shlex.join(["python", "-m", f"minillm.{self.command}", *self.words])


def steps(settings) -> list[Step]:
    """The chain's commands, for a `minillm.distill.Settings`."""
    out = Path(settings.out or f"{Path(settings.student).name}-distilled")
    made = []

    def add(name: str, command: str, result: str, *words) -> str:
        path = out / result
        made.append(Step(name, command, [*map(str, words), "--out", str(path)], path))
        return str(path)

    more = {name: shlex.split(getattr(settings, name)) for name in MORE}
    data = ["--data", settings.data]
    training = [*data, *_numerics(settings), "--seed", settings.seed, *_resume(settings)]
    teacher, student = settings.teacher, settings.student
    if settings.enable_sft_teacher:
        own = _preset(settings.teacher_preset, settings.teacher, "sft")
        teacher = add(
            "SFT of the teacher", "finetune", "teacher", teacher, *training, *own, *more["all"],
            *more["sft_teacher"],
        )  # fmt: skip
    # MiniLLM starts from the student of the lowest validation loss, as published.
    sft = add(
        "SFT of the student", "finetune", "sft", student, *training,
        *_preset(settings.preset, settings.student, "sft"), *more["all"], *more["sft"],
    )  # fmt: skip
    text = ["--lm-data", settings.lm_data] if settings.lm_data else []
    last = add(
        "MiniLLM", "train_minillm", "minillm", sft, "--teacher", teacher, *training, *text,
        *_preset(settings.preset, settings.student, "minillm"), *more["all"], *more["minillm"],
    )  # fmt: skip
    looks = [*data, *_numerics(settings), *_preset(settings.preset, settings.student, "evaluate")]
    for name, model in (("teacher", teacher), ("SFT student", sft), ("MiniLLM student", last)):
        file = f"results-{name.split()[0].lower()}.json"
        add(f"evaluation of the {name}", "evaluate", file, model, *looks, *more["evaluate"])
    return made


def _numerics(settings) -> list[str]:
    return ["--device", settings.device, "--dtype", settings.dtype]


def _resume(settings) -> list[str]:
    return [] if settings.resume else ["--no-resume"]


def _preset(name: str | None, model: str, section: str) -> list[str]:
    """The words of a section; embedded models have a preset of their name."""
    name = name or (model if model in load.EMBEDDED else None)
    if name is None or section not in presets.load(name):
        return []
    return presets.words(name, section)


def run(settings) -> list[dict] | None:
    """Run the chain; finished steps are kept.

    Returns:
        The results of the teacher and both students, as `commands.report` has them; None with
        --dry-run.

    Raises:
        StepFailed: a step ended with another exit code than 0.
        UserError: the folder holds another chain's results.
    """
    chain = steps(settings)
    for step in chain:
        # Before the first has run for a day, the last is known to be understood.
        _call(step, lambda step=step: _module(step).parser().parse_args(step.words) and 0)
        _say(f"{step.name}: {step}")
    if settings.dry_run:
        return None
    if settings.overwrite and _rank() == 0:
        for step in chain:
            _forget(step)
    for number, step in enumerate(chain, 1):
        there = None if settings.overwrite else _made_by(step)
        if there == str(step):
            _say(f"[{number}/{len(chain)}] {step.name}: made before, kept")
            _sweep(step)
            continue
        if there:
            raise UserError(
                f"{step.result} is there, made by `{there}`; choose another --out, or start afresh "
                "with --overwrite."
            )
        _say(f"[{number}/{len(chain)}] {step.name}")
        step.result.parent.mkdir(parents=True, exist_ok=True)
        _call(step, lambda step=step: _module(step).main(step.words))
    return [report.load(step.result) for step in chain if step.command == "evaluate"]


def _made_by(step: Step) -> str | None:
    """The command that made a step's checkpoint; None where there is none. What an evaluation has
    measured it knows itself."""
    steps = recipe.steps(step.result)
    return str(steps[-1].get("command")) if steps else None


def _forget(step: Step) -> None:
    runs.RunFolder(step.result).forget()
    shutil.rmtree(step.result, ignore_errors=True)
    if step.result.is_file():
        step.result.unlink()


def _sweep(step: Step) -> None:
    if _rank() == 0:
        run = runs.RunFolder(step.result)
        run.hold()
        run.sweep()
        run.release()


def _module(step: Step):
    return importlib.import_module(f"minillm.{step.command}")


def _call(step: Step, body: Callable[[], int]) -> None:
    heard = _Heard(sys.stderr)
    with _typed(_module(step), step.words), redirect_stderr(heard):
        try:
            code = body()
        except SystemExit as stop:  # argparse's, at a flag that it does not know
            code = stop.code
    if code:
        raise StepFailed(step.name, code, heard.last.removeprefix("error: "))


@contextmanager
def _typed(module, words: list[str]):
    """Inside, the step's own command is what model cards show, and what repeats it."""
    kept, sys.argv = sys.argv, [module.__file__, *words]
    try:
        yield
    finally:
        sys.argv = kept


class _Heard:
    """stderr, of which the last line is remembered."""

    def __init__(self, stream):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> int:
        lines = [line for line in text.splitlines() if line.strip()]
        self.last = lines[-1].strip() if lines else self.last
        return self.stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr)
