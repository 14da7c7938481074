"""The embedded corpora: the running Python's own standard library as text, instructions and quiz.

Every machine that runs this has the text, so nothing is downloaded. Modules are dealt to train,
calibration and test by a hash of their dotted name: a module held out when the embedded models were
trained (on Python 3.11) is held out under every other version of Python too.
"""

import ast
import hashlib
import io
import os
import random
import sysconfig
import tokenize
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "calibration", "test")
SEPARATOR = "\n\n"
SUMMARY = "\n\n# In one line, this function does the following:\n"
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
# Generated tables: code pages that are near-copies of each other would leak from train into test,
# and the build configuration holds paths of the machine that Python was built on.
GENERATED = {"encodings", "pydoc_data"}
BUILD = "_sysconfigdata"
# Characters; together about 450 tokens at most, so that a question and its choice fit 512.
QUIZ_BEFORE, QUIZ_CONTEXT = 600, 800


class Function(NamedTuple):
    """A documented function, its parts as the source has them; `before` is what precedes it."""

    name: str
    before: str
    head: str
    docstring: str
    body: str
    summary: str


def split_of(module: str) -> str:
    """The split of a dotted module name: 90 % train, 5 % calibration, 5 % test, by SHA-256."""
    draw = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % 100
    return "train" if draw < 90 else "calibration" if draw < 95 else "test"


def decode(raw: bytes) -> str | None:
    """Python source as text with "\\n" line ends, or None where it is not decodable."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")


def documents(split: str, root: Path | None = None) -> dict[str, str]:
    """Dotted module name -> source, sorted by name, of one of `SPLITS`.

    `root` is the folder to read (default: the running Python's standard library). Tests, generated
    tables, installed packages and files that cannot be decoded are left out.
    """
    return _documents(root or Path(sysconfig.get_path("stdlib")))[split]


@lru_cache(maxsize=2)
def _documents(root: Path) -> dict[str, dict[str, str]]:
    """:func:`documents` of every split, from one walk over the files."""
    sources = {}
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root).parts
        left_out = SKIPPED if inside else SKIPPED | GENERATED
        folders[:] = [name for name in folders if name not in left_out]
        for file in files:
            parts = (*inside, file.removesuffix(".py"))
            if not file.endswith(".py") or parts[0].startswith(BUILD) or parts[-1] in left_out:
                continue
            if not all(part.isidentifier() for part in parts):
                continue
            text = decode((Path(folder) / file).read_bytes())
            if text and text.strip():
                sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = text
    splits: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for name in sorted(sources):
        splits[split_of(name)][name] = sources[name]
    return splits


def text(split: str) -> str:
    """All sources of a split, joined by two newlines."""
    return SEPARATOR.join(documents(split).values())


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _dedent(text: str, columns: int) -> str:
    return "\n".join(line[min(columns, _indent(line)) :] for line in text.split("\n"))


def _ending(lines: list[str]) -> str:
    """The last whole lines, of at most `QUIZ_BEFORE` characters, each with its line break."""
    kept, size = [], 0
    for line in reversed(lines):
        size += len(line) + 1
        if size > QUIZ_BEFORE:
            break
        kept.append(line + "\n")
    return "".join(reversed(kept))


@lru_cache(maxsize=4)
def functions(split: str) -> tuple[Function, ...]:
    """Every documented function of a split with code after its docstring, in file order."""
    return tuple(_functions(documents(split)))


def _functions(sources: dict[str, str]) -> list[Function]:
    described = []
    for module, source in sources.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        nodes = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
            doc = ast.get_docstring(node)
            if not doc or len(node.body) < 2:
                continue
            first = node.body[0]
            start = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
            # A docstring on the line of the def, or code after it on its line, has no clean cut.
            if first.lineno == node.lineno or node.body[1].lineno == first.end_lineno:
                continue
            described.append(
                Function(
                    name=f"{module}.{node.name}",
                    before=_ending(lines[:start]),
                    head="\n".join(lines[start : first.lineno - 1]),
                    docstring="\n".join(lines[first.lineno - 1 : first.end_lineno]),
                    body="\n".join(lines[first.end_lineno : node.end_lineno]),
                    summary=doc.splitlines()[0].strip(),
                )
            )
    return described


def instructions(split: str) -> list[dict[str, str]]:
    """`stdlib-doc`: function source without its docstring -> the docstring's first line.

    `split` is one of `SPLITS`. Each example is {"prompt", "response"}; equal prompts occur once.
    """
    seen, examples = set(), []
    for function in functions(split):
        source = f"{function.head}\n{function.body}"
        prompt = _dedent(source, _indent(function.head)) + SUMMARY
        if function.summary and prompt not in seen:
            seen.add(prompt)
            examples.append({"prompt": prompt, "response": function.summary})
    return examples


def _opening(body: str) -> str | None:
    """The first line of code of a body; the next one too where the first says little."""
    lines = [line.rstrip() for line in body.split("\n")]
    lines = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    if not lines:
        return None
    wanted = 1 if len(lines[0].strip()) >= 20 else 2
    opening = "\n".join(lines[:wanted])
    return opening if 10 <= len(opening.strip()) <= 160 else None


def _copied(pool: list[tuple[Function, str]]) -> list[Function]:
    """The functions of those modules of train that may hold a copy of one in `pool`: most do not,
    and to parse them all takes ten seconds."""
    starts = {tuple(part.split("\n")[0] for part in (f.head, f.docstring)) for f, _ in pool}

    def may_hold(source: str) -> bool:
        lines = set(source.splitlines())
        return any(head in lines and docstring in lines for head, docstring in starts)

    return _functions({n: s for n, s in documents("train").items() if may_hold(s)})


@lru_cache(maxsize=1)
def questions() -> tuple[dict, ...]:
    """`stdlib-quiz`: which of four openings follows this function's head and docstring?

    Functions come from the test and calibration splits, and none that train holds a copy of is
    asked. Each question is {"question": str, "choices": [str] * 4, "answer": int}: the source up
    to the end of the docstring (with at most `QUIZ_BEFORE` characters that precede the function),
    and choices that begin with their line break, so that question + choice is the text to score.
    The three wrong choices are the true openings of other held-out functions with the same
    indentation and as many lines, drawn (seeded) from the dozen nearest in length. Every position
    is the right one equally often, up to one.
    """
    pool = [
        (function, opening)
        for function in (*functions("test"), *functions("calibration"))
        if (opening := _opening(function.body))
    ]
    seen = {(function.head, function.docstring) for function in _copied(pool)}
    chosen = []
    for function, opening in pool:
        key = (function.head, function.docstring)
        if key not in seen and len("".join(key)) <= QUIZ_CONTEXT:
            seen.add(key)
            chosen.append((function, opening))
    draw = random.Random(0)
    draw.shuffle(chosen)  # the first n questions are then a fair sample of all
    asked = []
    for function, opening in chosen:
        others = {
            other
            for _, other in pool
            if other != opening
            and _indent(other) == _indent(opening)
            and other.count("\n") == opening.count("\n")
            and other not in function.body
        }
        nearby = sorted(others, key=lambda other: (abs(len(other) - len(opening)), other))[:12]
        if len(nearby) < 3:
            continue
        place = len(asked) % 4
        choices = draw.sample(nearby, 3)
        choices.insert(place, opening)
        asked.append(
            {
                "question": f"{function.before}{function.head}\n{function.docstring}",
                "choices": ["\n" + choice for choice in choices],
                "answer": place,
            }
        )
    return tuple(asked)
