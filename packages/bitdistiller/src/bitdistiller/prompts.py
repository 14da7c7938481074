"""What a teacher is asked: the original's four sets, in its very words, and local ones.

| set | source | prompt |
| --- | --- | --- |
| wikitext2 | train rows of more than 512 characters | the first 128 |
| alpaca | yahma/alpaca-cleaned | instruction, input if there is one, each with a line end |
| code | nickrosh/Evol-Instruct-Code-80k-v1 | the Alpaca format |
| math | meta-math/MetaMathQA-40K | the Alpaca format and "Let's think step by step." |

The original's Alpaca format has no line end after its last words (arXiv 2402.10631, section 4.1 and
data/generation). No torch up here.
"""

import io
import random
from collections.abc import Iterable
from pathlib import Path

from harness.data import corpora, files, hub, instructions, stdlib
from harness.errors import UserError, nearest

# How many the original took; of the embedded sets as many as of the like.
SAMPLES = {
    "wikitext2": 3000, "alpaca": 5000, "code": 3000, "math": 3000, "stdlib": 3000,
    "stdlib-doc": 3000,
}  # fmt: skip
HUB = {
    "alpaca": "yahma/alpaca-cleaned",
    "code": "nickrosh/Evol-Instruct-Code-80k-v1",
    "math": "meta-math/MetaMathQA-40K",
}
ALIASES = {"wikitext": "wikitext2", "metamath": "math"}
# What a local file can be a copy of, and the column that its rows ask with.
COLUMNS = {"wikitext2": None, "alpaca": "instruction", "code": "instruction", "math": "query"}
LONGER, FRONT = 512, 128  # characters: of a passage, and what is shown of it
EXPECTED = "expected prompt, instruction (input), query or a text"


def parse(name: str) -> tuple[str, str | None, Path | None]:
    """(label, kind, path) of "code", of "FILE" or of "code=FILE".

    The kind is one of `SAMPLES`, or None where a local row's own columns tell it.

    Raises:
        UserError: neither a known set nor a file.
    """
    kind, equals, place = name.partition("=")
    kind = ALIASES.get(kind, kind)
    if equals and kind in COLUMNS:
        if not Path(place).exists():
            raise UserError(f"--dataset {name}: no file or folder {place}.")
        return kind, kind, Path(place)
    if ALIASES.get(name, name) in SAMPLES:
        return kind, kind, None
    if Path(name).exists():
        return label(Path(name)), None, Path(name)
    raise UserError(
        f"dataset {name!r} is neither a file or folder nor one of {', '.join(SAMPLES)}."
        + nearest(name, (*SAMPLES, *ALIASES))
    )


def label(path: Path) -> str:
    """What a local set is called in a file of responses: its name without format and folder."""
    name = path.name.removesuffix(".gz")
    return name.removesuffix(Path(name).suffix if files.kind(path) else "") or "local"


def prompts(name: str) -> list[str]:
    """All prompts of a set's training part, in its order.

    Args:
        name: one of `SAMPLES`; a local file or folder, with columns prompt, instruction (and
            input), query, or a text, or a .txt; or "code=FILE", a local copy of a named set.

    Raises:
        UserError: no such set, the hub cannot be reached, or a row has nothing to ask, by its line.
    """
    _, kind, path = parse(name)
    if path is None and kind == "stdlib":
        pieces = (piece for text in stdlib.documents("train").values() for piece in passages(text))
        return fronts(pieces)
    if path is None and kind == "stdlib-doc":
        return [pair["prompt"] for pair in corpora.instructions("stdlib-doc", "train")]
    if path is None and kind == "wikitext2":
        return fronts(hub.load("wikitext2", "train")["text"])
    if path is None:
        return [prompt(row, kind) for row in hub.fetch(kind, HUB[kind], "train", {})]
    asked = []
    for file in files.select(path, "train")[0]:
        rows = files.rows(file)
        if files.kind(file) == ".txt":
            asked += fronts(paragraphs(rows[0]["text"]))
            continue
        # Chosen once: where it is there and empty, no other column is read.
        order = ("prompt", COLUMNS["math"], COLUMNS["alpaca"], *files.TEXT_COLUMNS)
        asks = next((n for n in order if any(isinstance(r.get(n), str) for r in rows[:100])), None)
        for number, row in enumerate(rows, 1):
            only = {n: row[n] for n in (asks, "input") if n in row} if asks in row else row
            found = prompt(row if kind else only, kind)
            if found is None:
                where = f"{file}, line {files.line_of(file, number)}"
                raise UserError(f"{where}: {files.columns(row)}; {EXPECTED}.")
            # A text that is too short to go on from asks nothing.
            asked += [found] * bool(found)
    return asked


def prompt(row: dict, kind: str | None) -> str | None:
    """What a row asks, as a row of set ``kind`` or as its columns tell: "" where its text is too
    short, None where it has no such columns."""
    if kind is None and isinstance(row.get("prompt"), str):
        return row["prompt"]
    for of in [kind] if kind else ["math", "alpaca"]:
        words = row.get(COLUMNS[of])
        if isinstance(words, str):
            return _asked(words, row.get("input") or "", of)
    if kind not in (None, "wikitext2"):
        return None
    text = next((row[name] for name in files.TEXT_COLUMNS if isinstance(row.get(name), str)), None)
    return None if text is None else "".join(fronts([text]))


def _asked(words: str, more: str, kind: str) -> str:
    if kind == "alpaca":
        return f"{words}\n{more}\n" if more else f"{words}\n"
    if kind == "code":
        return instructions.alpaca_prompt(words, more).removesuffix("\n")
    return instructions.alpaca_prompt(words).removesuffix("\n") + " Let's think step by step."


def fronts(texts: Iterable[str]) -> list[str]:
    """The first 128 characters of those texts that have more than 512."""
    return [text[:FRONT] for text in texts if len(text) > LONGER]


def paragraphs(text: str) -> list[str]:
    """A text's lines, as wikitext2's rows are; where none is long enough, its passages."""
    lines = list(io.StringIO(text, newline="\n"))
    return lines if any(len(line) > LONGER for line in lines) else list(passages(text))


def passages(text: str) -> Iterable[str]:
    """Runs of whole lines of more than 512 characters, one after another, each from the first line
    that says something; the rest at the end is left out."""
    kept = ""
    for line in io.StringIO(text, newline="\n"):
        if kept or line.strip():
            kept += line
        if len(kept) > LONGER:
            yield kept
            kept = ""


def draw(asked: list[str], count: int | None, seed: int) -> list[str]:
    """``count`` of the prompts at random, in the order they were drawn; all, in their own order,
    where there are no more."""
    if count is None or count >= len(asked):
        return asked
    return random.Random(seed).sample(asked, count)
