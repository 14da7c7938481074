"""Settings that bitdistiller's training commands share, and how their flags are spelt: with
underscores, or with hyphens. No torch up here."""

import argparse
from dataclasses import dataclass

import harness.training.flags
from harness.settings import AT_LEAST_1, REQUIRED, flag


@dataclass(frozen=True, kw_only=True)
class Shared(harness.training.flags.Shared):
    """shared by all commands"""

    SEPARATORS = ("_", "-")


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: expected True or False")
    return text.lower() == "true"


def switch(default: bool, help: str):
    """A flag, alone or with True or False as the original has it."""
    return flag(default, help, nargs="?", const=True, type=_yes, metavar="BOOL")


@dataclass(frozen=True, kw_only=True)
class Data:
    """data"""

    data: str = flag(
        REQUIRED, "instructions: a table with columns prompt and response (or the original's rows "
        "[[prompt, response]]), stdlib-doc, alpaca, dolly; or a text: stdlib, wikitext2, c4, a "
        ".txt ..., of which every token is predicted", metavar="DATA",
        names=["--data", "--data_path", "--data-path"],
    )  # fmt: skip
    model_max_length: int | None = flag(
        None, "of prompt and response, or a window of text (default 1024, or the model's context "
        "if that is shorter)", metavar="TOKENS",
    )  # fmt: skip
    max_train_samples: int | None = flag(None, "training examples, at most", check=AT_LEAST_1)
    train_on_inputs: bool = switch(False, "the prompts are learned too")
