"""The settings of every command are its flags, no more and no fewer, with the same defaults."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from harness import cli, settings
from harness.commands.eval_settings import EvalSettings
from harness.errors import UserError

ROOT = Path(__file__).parents[1]
# Every module of a package that has settings, the words it cannot do without.
WORDS = {
    "gptq.cli": ["m"],
    "bitdistiller.autoclip": ["m"],
    "bitdistiller.blockwise": ["m"],
    "bitdistiller.export": ["m"],
    "bitdistiller.cache_teacher": ["m", "--data", "d"],
    "bitdistiller.generate": ["--dataset", "d"],
    "bitdistiller.train": ["m", "--data", "d"],
    "minillm.cache_teacher": ["m", "--data", "d"],
    "minillm.distill": ["t", "m", "--data", "d"],
    "minillm.evaluate": ["m", "--data", "d"],
    "minillm.finetune": ["m", "--data", "d"],
    "minillm.generate": ["m", "--data", "d"],
    "sparse.llm_pruner": ["m"],
    "sparse.recover": ["m", "--dataset", "d"],
    "sparse.magnitude": ["m"],
    "sparse.sparsegpt": ["m"],
    "sparse.wanda": ["m"],
    "minillm.train_minillm": ["m", "--teacher", "t", "--data", "d"],
}


def test_all_are_here():
    files = ROOT.glob("packages/*/src/*/*.py")
    there = {f"{p.parent.name}.{p.stem}" for p in files if "make_parser(" in p.read_text("utf-8")}
    assert there == set(WORDS)


@pytest.mark.parametrize("module", [*WORDS, "harness.cli"])
def test_settings_are_the_flags(module):
    found = importlib.import_module(module)
    if found is cli:
        cls, args = EvalSettings, cli.build_parser().parse_args(["eval", "m"])
        del args.command
    else:
        cls, args = found.Settings, found.parser().parse_args(WORDS[module])
    assert set(vars(args)) == {field.name for field in dataclasses.fields(cls)}
    required = ("model", "teacher", "student", "data", "dataset")
    given = {name: value for name, value in vars(args).items() if name in required and value}
    asked = cls(**vars(args))
    assert cls(**given) == asked
    with pytest.raises(dataclasses.FrozenInstanceError):
        asked.seed = 1
    # What argparse refuses on the command line, Python users are refused too.
    with pytest.raises(UserError, match="--dtype float8: expected auto, float32"):
        dataclasses.replace(asked, dtype="float8")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (settings.POSITIVE, (1, 0.5), (0, -1, float("inf"), float("nan"))),
        (settings.NOT_NEGATIVE, (0, 2), (-1, float("inf"), float("nan"))),
        (settings.AT_LEAST_1, (1, 9), (0, -3)),
        (settings.SHARE, (0, 0.5, 1), (-0.1, 1.1, float("nan"))),
    ],
)
def test_values_are_checked_by_their_flag(check, good, bad):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings(settings.Shared):
        """Nothing."""

        some_number: float | None = settings.flag(None, "", check=check)

    for value in (None, *good):
        Settings(some_number=value)
    for value in bad:
        with pytest.raises(UserError, match=rf"--some-number {value}: {check[1]}\."):
            Settings(some_number=value)
