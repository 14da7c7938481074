"""Flags that bitdistiller's training commands share, and how they are spelt. No torch up here."""

import argparse


def add(group, *names: str, **more) -> None:
    """A flag with underscores, and its spellings with hyphens."""
    both = (spelling for name in names for spelling in (name, "--" + name[2:].replace("_", "-")))
    group.add_argument(*dict.fromkeys(both), **more)


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: expected True or False")
    return text.lower() == "true"


def add_switch(group, name: str, default: bool, help: str) -> None:
    """NAME, or NAME True or False as the original has it."""
    add(group, name, nargs="?", const=True, default=default, type=_yes, metavar="BOOL", help=help)


def add_data(p):
    """What is trained on; returns the group."""
    g = p.add_argument_group("data")
    add(
        g, "--data", "--data_path", required=True, metavar="DATA",
        help="instructions: a table with columns prompt and response (or the original's rows "
        "[[prompt, response]]), stdlib-doc, alpaca, dolly; or a text: stdlib, wikitext2, c4, a "
        ".txt ..., of which every token is predicted",
    )  # fmt: skip
    add(
        g, "--model_max_length", type=int, metavar="TOKENS",
        help="of prompt and response, or a window of text (default 1024, or the model's context if "
        "that is shorter)",
    )  # fmt: skip
    add(g, "--max_train_samples", type=int, metavar="N", help="training examples, at most")
    add_switch(g, "--train_on_inputs", False, "the prompts are learned too")
    return g
