"""What a file of responses holds, as a table: a line for each set. No torch up here."""

from collections import Counter
from collections.abc import Iterable
from math import ceil
from statistics import fmean
from typing import NamedTuple

HEAD = ("prompts", "prompt, mean", "90 %", "response, mean", "90 %", "not ended", "empty", "again")


class Line(NamedTuple):
    """A row: what set it is of, lengths in one unit, None where it is not known whether the
    response came to an end, nothing in it, the same pair before."""

    dataset: str
    prompt: int
    response: int
    ended: bool | None
    empty: bool
    again: bool


def lines(rows: Iterable[tuple[str, str, str, bool | None]], measure=None) -> list[Line]:
    """A line for each (prompt, response, dataset, ended); ``measure`` has the lengths (prompt,
    response) of every row, which are characters otherwise."""
    seen: Counter = Counter()
    found = []
    for number, (prompt, response, dataset, ended) in enumerate(rows):
        lengths = measure[number] if measure else (len(prompt), len(response))
        again = bool(seen[prompt, response])
        seen[prompt, response] += 1
        found.append(Line(dataset, *lengths, ended, not says(response), again))
    return found


def says(response: str) -> bool:
    """Whether there is a letter or a digit in it."""
    return any(letter.isalnum() for letter in response)


def table(found: list[Line], unit: str) -> str:
    """Markdown: prompts, mean and nine-tenths lengths, and how many did not end, say nothing, or
    are there a second time."""
    names = list(dict.fromkeys(line.dataset for line in found))
    groups = [(name, [line for line in found if line.dataset == name]) for name in names]
    groups += [("all", found)] * (len(groups) > 1)
    rows = [(unit, *HEAD), *((name, *_cells(some)) for name, some in groups)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = [
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([f"| {shown[0]} |", f"|{rule}|", *(f"| {line} |" for line in shown[1:])])


def _cells(some: list[Line]) -> list[str]:
    prompts, responses = ([getattr(line, name) for line in some] for name in ("prompt", "response"))
    ended = [line.ended for line in some if line.ended is not None]
    cut = str(ended.count(False)) if ended else "?"
    counts = (sum(getattr(line, name) for line in some) for name in ("empty", "again"))
    lengths = (f"{f(v):.0f}" for v in (prompts, responses) for f in (fmean, ninth_tenth))
    return [str(len(some)), *lengths, cut, *map(str, counts)]


def ninth_tenth(values: list[int]) -> int:
    """The smallest of the values that nine tenths of them do not exceed."""
    return sorted(values)[ceil(len(values) * 0.9) - 1]
