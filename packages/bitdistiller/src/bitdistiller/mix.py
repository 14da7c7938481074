"""``python -m bitdistiller.mix A.jsonl B.jsonl --out mix.jsonl``: files of responses shuffled into
one, without those that are there twice or say nothing."""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

from bitdistiller import prompts, response_table
from harness import cli
from harness.checkpoint import hashes, runs
from harness.data import files
from harness.errors import UserError

EXAMPLES = """\
examples:
  python -m bitdistiller.mix wikitext2.jsonl alpaca.jsonl --max_sample 8000 --out mix.jsonl
  python -m bitdistiller.mix teacher.jsonl --drop_unfinished --out mix.jsonl
then:
  python -m bitdistiller.train MODEL --data mix.jsonl --clip CLIPPED --bits 2
"""


class Row(NamedTuple):
    """As it is written; `ended` is None, and not written, where nobody knows."""

    prompt: str
    response: str
    dataset: str
    ended: bool | None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bitdistiller.mix",
        description="Put files of responses together, as bitdistiller.generate or the original "
        "([[prompt, response]] on each line) wrote them: pairs that are there twice and responses "
        "without a letter or digit are left out, the rest is shuffled.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("data", nargs="+", metavar="FILE", help="tables with prompt and response")
    p.add_argument("--out", required=True, metavar="FILE", help="the .jsonl that is written")
    p.add_argument(
        "--max_sample", "--max-sample", type=int, metavar="N",
        help="rows, at most (default: all)",
    )  # fmt: skip
    p.add_argument(
        "--drop_unfinished", "--drop-unfinished", action="store_true",
        help="leave out responses that were cut at the limit",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=42, help="of the order (default 42)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return p


def main(argv: list[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    return cli.run(lambda: print(mix(args.pop("data"), **args)))


def mix(
    data: list[str],
    out: str | Path,
    *,
    max_sample: int | None = None,
    drop_unfinished: bool = False,
    seed: int = 42,
    overwrite: bool = False,
) -> str:
    """Shuffle the files ``data`` into one, ``out``, of ``max_sample`` rows at most; returns the
    report.

    Raises:
        UserError: a row without the two fields, by its line; nothing left; ``out`` exists or is no
            .jsonl.
    """
    out = Path(out)
    run = runs.RunFolder(out, kind=None)
    run.hold()
    run.check(overwrite)
    if max_sample is not None and max_sample < 1:
        raise UserError(f"--max_sample {max_sample}: at least 1.")
    rows = [row for name in data for row in read(Path(name))]
    if drop_unfinished and any(row.ended is None for row in rows):
        unknown = sum(row.ended is None for row in rows)
        raise UserError(
            f"--drop_unfinished: {unknown} rows do not say whether the response ended (ended: "
            "true or false), as bitdistiller.generate writes it."
        )
    seen = response_table.lines(rows)
    kept = [
        row
        for row, line in zip(rows, seen, strict=True)
        if not (line.again or line.empty or (drop_unfinished and not row.ended))
    ]
    if not kept:
        raise UserError(f"of {len(rows)} rows none is left: they say nothing or did not end.")
    random.Random(seed).shuffle(kept)
    kept = kept[:max_sample]
    fields = ({k: v for k, v in row._asdict().items() if v is not None} for row in kept)
    text = "".join(json.dumps(row) + "\n" for row in fields)
    run.compare({"mix": hashes.text_hash(text)}, overwrite=overwrite)
    run.publish_text(text)
    table = response_table.table(seen, "characters")
    return f"{table}\n{len(kept)} of {len(rows)} rows written to {out}"


def read(path: Path) -> list[Row]:
    """The rows of one file; the set is the file's name where a row does not say it.

    Raises:
        UserError: no such file, or a row without prompt and response, by its line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one that bitdistiller.generate wrote.")
    files.select(path, "train")  # refuses formats that nobody reads
    rows = []
    for number, row in enumerate(files.rows(path), 1):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
            raise UserError(
                f"{path}, line {files.line_of(path, number)}: {files.columns(row)}; "
                "expected prompt and response, both text."
            )
        ended = row.get("ended")
        ended = ended if isinstance(ended, bool) else None
        dataset = str(row.get("dataset") or prompts.label(path))
        rows.append(Row(row["prompt"], row["response"], dataset, ended))
    return rows


if __name__ == "__main__":
    sys.exit(main())
