"""Local text and tables: .txt, .jsonl, .json, .csv (also .gz of these), .parquet, or a folder.

A folder's files are sorted by path; a file belongs to train, validation or test when its name, or
a folder on the way to it, begins so (`train-00000.parquet`, `test/0000.jsonl`, `valid.txt`).
"""

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError

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
    found = {p: split_of(p, source) for p in sorted(source.rglob("*")) if p.is_file() and kind(p)}
    if not found:
        raise UserError(f"{source}: no {', '.join(KINDS)} file in this folder")
    if not any(found.values()):
        return list(found), False
    for wanted in (split, STAND_INS[split]):
        chosen = [path for path, of in found.items() if of == wanted]
        if chosen:
            return chosen, True
    raise UserError(
        f"{source}: its files are named for {', '.join(sorted(set(found.values()) - {None}))}; "
        f"expected a file named {split}* too"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from error


def _json_rows(path: Path) -> list:
    text = "".join(line for _, line in _lines(path))
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        # Many .json files hold one row per line.
        if "\n" in text.strip() and text.lstrip().startswith(("{", "[[")):
            return _jsonl_rows(path)
        raise UserError(f"{path}: not JSON ({error})") from error
    if isinstance(whole, dict):
        tables = [value for value in whole.values() if isinstance(value, list)]
        whole = tables[0] if len(tables) == 1 else [whole]
    if not isinstance(whole, list):
        raise UserError(f"{path}: expected a list of objects, found {type(whole).__name__}")
    return whole


def _jsonl_rows(path: Path) -> list:
    rows = []
    for number, line in _lines(path):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
    return rows


def _csv_rows(path: Path) -> list[dict]:
    csv.field_size_limit(sys.maxsize)
    return list(csv.DictReader(line for _, line in _lines(path)))


def _parquet_rows(path: Path) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a whole parquet file ({error})") from error


def _fields(row):
    """A row that is no object as one: a string, or BitDistiller's [[prompt, response]]."""
    if isinstance(row, str):
        return {"text": row}
    pair = row[0] if isinstance(row, list) and len(row) == 1 else row
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair):
        return {"prompt": pair[0], "response": pair[1]}
    return row


def line_of(path: Path, number: int) -> int:
    """The line of row ``number`` (from 1): blank lines of a jsonl file are no rows."""
    if kind(path) == ".jsonl":
        full = (line for line, text in _lines(path) if text.strip())
        return next(line for row, line in enumerate(full, 1) if row == number)
    return number


def rows(path: Path) -> list[dict]:
    """The rows of one file as dicts; .txt and plain strings become {"text": ...}, and a list
    [[prompt, response]] an instruction.

    Raises UserError naming file and line where it is not what its name says.
    """
    form = kind(path)
    if form == ".txt":
        return [{"text": "".join(line for _, line in _lines(path))}]
    reader = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }[form]
    found = [_fields(row) for row in reader(path)]
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {line_of(path, number)}: expected an object or "
                f"[[prompt, response]], found {row!r:.60}"
            )
    return found


def text_column(row: dict, path: Path) -> str:
    """The name of the column that holds the text; UserError listing the columns if unclear."""
    for name in TEXT_COLUMNS:
        if isinstance(row.get(name), str):
            return name
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    raise UserError(
        f"{path}: no text column among {', '.join(map(str, row)) or 'no columns'}; "
        f"name one of them '{TEXT_COLUMNS[0]}'"
    )
