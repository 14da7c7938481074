"""Rows of instruction tables as {"prompt", "response"} text, by the columns they have."""

import random

# The Alpaca prompt format: models tuned on it expect these very words.
INTRO = "Below is an instruction that describes a task"
WITH_INPUT = ", paired with an input that provides further context"
REQUEST = ". Write a response that appropriately completes the request.\n\n"
RESPONSES = ("response", "output", "completion", "answer")


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The Alpaca format of an instruction and its optional input, up to "### Response:\\n"."""
    head = INTRO + (WITH_INPUT if context else "") + REQUEST
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"{head}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def example(row: dict) -> dict[str, str] | None:
    """One row as {"prompt", "response"}, or None where it has no such columns.

    A `prompt` column is taken as it stands; `instruction` with an optional `input` or `context`
    goes through the Alpaca format.
    """
    response = next((row[name] for name in RESPONSES if isinstance(row.get(name), str)), None)
    if response is None:
        return None
    if isinstance(row.get("prompt"), str):
        return {"prompt": row["prompt"], "response": response}
    if isinstance(row.get("instruction"), str):
        context = row.get("input") or row.get("context") or ""
        return {"prompt": alpaca_prompt(row["instruction"], context), "response": response}
    return None


def deal(examples: list, split: str) -> list:
    """The part of `examples` for a split: a twentieth each (1 to 500) for validation and test.

    The order is shuffled with a fixed seed, so the three parts are disjoint on every machine.
    """
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    held = max(1, min(500, len(order) // 20))
    cuts = {"test": order[:held], "validation": order[held : 2 * held], "train": order[2 * held :]}
    return [examples[index] for index in sorted(cuts[split])]
