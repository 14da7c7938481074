"""Local text and tables: .txt, .jsonl, .json, .csv (also .gz of these), .parquet, or a folder.

A folder's files are sorted by path; a file belongs to train, validation or test when its name, or
a folder on the way to it, begins so (`train-00000.parquet`, `test/0000.jsonl`, `valid.txt`).
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from harness.errors import UserError, one_line

LONGEST_LINE = 64_000_000  # characters, as of a whole JSON file
LONGEST_WHOLE = 256_000_000
KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
TEXT_COLUMNS = ("text", "content", "document", "sentence", "raw_content", "body", "article")
PREFIXES = {"train": ("train",), "validation": ("val", "dev"), "test": ("test",)}
STAND_INS = {"train": "validation", "validation": "test", "test": "validation"}


def kind(path: Path) -> str | None:
    """The file's format as one of `KINDS`, seen through a final .gz, or None."""
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix == ".parquet" and path.name.lower().endswith(".gz"):
        return None
    return suffix if suffix in KINDS else None


def split_of(path: Path, folder: Path) -> str | None:
    """train, validation or test by the beginning of a name below `folder`, else None."""
    for part in path.relative_to(folder).parts:
        for split, prefixes in PREFIXES.items():
            if part.lower().startswith(prefixes):
                return split
    return None


def select(source: Path, split: str) -> tuple[list[Path], bool]:
    """The files of `source` for a split, and whether the other splits have other files.

    A single file, or a folder whose names tell no split, gives all it has and False. A folder that
    names splits gives those of this one, or of the one in `STAND_INS`, and True. Raises UserError
    where there is nothing to read.
    """
    if source.is_file():
        if kind(source) is None:
            raise UserError(f"{source}: unknown format; expected {', '.join(KINDS)} (or .gz)")
        return [source], False
    splits = {p: split_of(p, source) for p in sorted(source.rglob("*")) if p.is_file() and kind(p)}
    if not splits:
        raise UserError(f"{source}: no {', '.join(KINDS)} file in this folder")
    if not any(splits.values()):
        return list(splits), False
    for wanted in (split, STAND_INS[split]):
        chosen = [path for path, of in splits.items() if of == wanted]
        if chosen:
            return chosen, True
    raise UserError(
        f"{source}: its files are named for {', '.join(sorted(set(splits.values()) - {None}))}; "
        f"expected a file named {split}* too"
    )


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """The file as UTF-8 text, unpacked; whatever its bytes lead to is one line."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a text file; one without end is an error."""
    number = 0
    with _reading(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"{path}, line {number}: longer than {LONGEST_LINE / 1e6:.0f} M characters; "
                    "cut it into rows, or give plain text a name in .txt"
                )
            yield number, line


def pieces(path: Path) -> Iterator[str]:
    """A text file from its beginning, piece by piece."""
    with _reading(path) as file:
        while piece := file.read(1 << 20):
            yield piece


def _json_rows(path: Path) -> list:
    text = "".join(_bounded(path))
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Many .json files hold one row per line.
        if "\n" in text.strip() and text.lstrip().startswith(("{", "[[")):
            return list(_jsonl_rows(path))
        raise UserError(f"{path}: not JSON ({one_line(error)})") from error
    if isinstance(whole, dict):
        tables = [value for value in whole.values() if isinstance(value, list)]
        whole = tables[0] if len(tables) == 1 else [whole]
    if not isinstance(whole, list):
        raise UserError(f"{path}: expected a list of objects, found {type(whole).__name__}")
    return whole


def _bounded(path: Path) -> Iterator[str]:
    size = 0
    for piece in pieces(path):
        size += len(piece)
        if size > LONGEST_WHOLE:
            raise UserError(
                f"{path}: more than {LONGEST_WHOLE / 1e6:.0f} M characters in one JSON value; "
                "write it as .jsonl, a row a line"
            )
        yield piece


def _jsonl_rows(path: Path) -> Iterator:
    for number, line in lines(path):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or one_line(error)
                raise UserError(f"{path}, line {number}: not JSON ({reason})") from error


def _csv_rows(path: Path) -> Iterator[dict]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(line for _, line in lines(path))
    try:
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: more fields than the first line names"
                )
            yield row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole parquet file ({one_line(error)})") from error


def _fields(row):
    """A row that is no object as one: a string, or BitDistiller's [[prompt, response]]."""
    if isinstance(row, str):
        return {"text": row}
    pair = row[0] if isinstance(row, list) and len(row) == 1 else row
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair):
        return {"prompt": pair[0], "response": pair[1]}
    return row


def line_of(path: Path, number: int) -> int:
    """The line on which row ``number`` (from 1) begins: blank lines are no rows, nor is the head of
    a csv file, whose rows may have several lines."""
    if kind(path) == ".jsonl":
        full = (line for line, text in lines(path) if text.strip())
        return next(islice(full, number - 1, None))
    if kind(path) == ".csv":
        return next(islice(_csv_starts(path), number, None))
    return number


def _csv_starts(path: Path) -> Iterator[int]:
    reader = csv.reader(line for _, line in lines(path))
    start = 1
    for row in reader:
        if row:
            yield start
        start = reader.line_num + 1


def columns(row: dict) -> str:
    """The names of a row's columns, for an error, and what is in them where that is no text."""
    names = (
        str(name) if isinstance(value, str) else f"{name} ({value!r:.20} is no text)"
        for name, value in row.items()
    )
    return ", ".join(names) or "no columns"


def rows(path: Path) -> list[dict]:
    """:func:`stream` as a list."""
    return list(stream(path))


def stream(path: Path) -> Iterator[dict]:
    """The rows of one file as dicts, one after another; .txt and plain strings become
    {"text": ...}, and a list [[prompt, response]] an instruction.

    Raises UserError naming file and line where it is not what its name says.
    """
    form = kind(path)
    if form == ".txt":
        yield {"text": "".join(pieces(path))}
        return
    reader = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }[form]
    for number, row in enumerate(map(_fields, reader(path)), 1):
        fault = _fault(row, form)
        if fault:
            raise UserError(f"{path}, line {line_of(path, number)}: {fault}")
        yield row


def _fault(row, form: str) -> str | None:
    if not isinstance(row, dict):
        return f"expected an object or [[prompt, response]], found {row!r:.60}"
    if form not in (".jsonl", ".json"):
        return None
    try:
        # What UTF-8 cannot hold comes from JSON's escapes alone, and no tokenizer takes it.
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return f"{half!a} is half of a character; expected Unicode text, mend the row or drop it"
    return None
