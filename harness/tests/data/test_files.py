"""Local text, JSONL, JSON, CSV and parquet files, gzipped or in folders, read for real."""

import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from harness.data import corpora, files
from harness.errors import UserError

TEXTS = ["first, with a comma", 'second "quoted"\nover two lines', "third é"]


def write(path, column="text", texts=TEXTS):
    rows = [{"id": number, column: text} for number, text in enumerate(texts)]
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif name.endswith(".json"):
        content = json.dumps(rows)
    elif name.endswith(".txt"):
        content = "\n\n".join(texts)
    elif name.endswith(".csv"):
        with path.with_suffix(".tmp").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
        content = path.with_suffix(".tmp").read_bytes().decode()
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


class Bytes:
    def __call__(self, text, verbose=True):
        return {"input_ids": list(text.encode())}


def read(path):
    windows = corpora.evaluation(Bytes(), str(path), seqlen=2)
    return bytes(windows.flatten().tolist())


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.parquet"],
)
def test_every_format_gives_the_same_text(tmp_path, name):
    whole = "\n\n".join(TEXTS).encode()
    column = "text" if "txt" in name else "content"
    assert read(write(tmp_path / name, column)) == whole[: len(whole) // 2 * 2]


def test_folders_keep_train_and_test_apart(tmp_path, capsys):
    write(tmp_path / "train-0.jsonl", texts=["A" * 50])
    write(tmp_path / "train-1.jsonl", texts=["B" * 50])
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "0000.parquet", texts=["C" * 50])
    assert set(read(tmp_path)) == {ord("C")}
    windows = corpora.calibration(Bytes(), str(tmp_path), nsamples=20, seqlen=5, seed=0)
    assert set(windows.flatten().tolist()) >= set(b"AB")
    assert ord("C") not in windows
    assert capsys.readouterr().err == ""


def test_one_file_for_both_is_said(tmp_path, capsys):
    path = write(tmp_path / "some.txt")
    corpora.calibration(Bytes(), str(path), nsamples=2, seqlen=5, seed=0)
    assert "one text for calibration and evaluation alike" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl, line 2: not JSON"),
        ("a.json", b"[1", r"a\.json: not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"text": "\\ud800"}',
            r"line 3: '\\ud800' is half of a char",
        ),
        (
            "a.json",
            b'[{"text": "x", "more": ["\\udc00x"]}]',
            r"line 1: '\\udc00' is half of a char",
        ),
        ("a.jsonl", b"3\n", r"line 1: expected an object or .*, found 3"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.txt.gz", b"plain", r"not a whole gzip"),
        ("a.txt.gz", gzip.compress(b"x" * 9999)[:-9], r"not a whole gzip"),
        ("a.parquet", b"PAR1", r"not a whole parquet"),
        ("a.jsonl", b'{"one": "x", "two": "y"}\n', r"no text column among one, two"),
        (
            "a.jsonl",
            b'{"text": 5, "b": null}',
            r"among text \(5 is no text\), b \(None is no text\);",
        ),
        ("a.doc", b"x", r"unknown format; expected \.txt"),
    ],
)
def test_damaged_files_name_themselves(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_of_bitdistiller_are_instructions(tmp_path, name):
    pairs = [["p é", "r"], ["q\n", ""]]
    (tmp_path / name).write_text("\n".join(json.dumps([pair]) for pair in pairs) + "\n")
    expected = [{"prompt": p, "response": r} for p, r in pairs]
    assert files.rows(tmp_path / name) == expected
    (tmp_path / name).write_text(json.dumps([pairs[0]]))
    assert files.rows(tmp_path / name) == expected[:1]


def test_an_escaped_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert files.rows(tmp_path / "a.jsonl") == [{"text": "\U0001f600"}]


@pytest.mark.parametrize(
    ("name", "raw", "lines"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', [1, 3]),
        ("a.csv", 'a,b\n1,x\n\n2,"over\r\nthree\nlines"\n3,y\n', [2, 4, 7]),
    ],
)
def test_rows_know_their_lines(tmp_path, name, raw, lines):
    path = tmp_path / name
    path.write_bytes(raw.encode())
    rows = range(1, len(files.rows(path)) + 1)
    assert [files.line_of(path, row) for row in rows] == lines


def test_folder_without_the_split_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"no .* file in this folder"):
        files.select(tmp_path, "test")
    write(tmp_path / "train.txt")
    with pytest.raises(UserError, match=r"named for train; expected a file named test\*"):
        files.select(tmp_path, "test")
    stand_in = write(tmp_path / "valid.txt")
    assert files.select(tmp_path, "test") == ([stand_in], True)


def test_local_instructions_are_dealt_or_split(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"r{i}"} for i in range(60)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [corpora.instructions(str(path), split) for split in ("train", "validation", "test")]
    assert sorted(p["prompt"] for part in parts for p in part) == sorted(f"p{i}" for i in range(60))
    assert [len(part) for part in parts] == [54, 3, 3]
    (tmp_path / "test.jsonl").write_text(json.dumps({"instruction": "i", "output": "o"}))
    assert len(corpora.instructions(str(tmp_path), "train")) == 60
    assert corpora.instructions(str(tmp_path), "test")[0]["response"] == "o"
    other = write(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="columns id, text; expected messages, or prompt"):
        corpora.instructions(str(other), "train")


def test_local_questions(tmp_path):
    path = tmp_path / "quiz.jsonl"
    good = {"question": "q", "choices": ["x", "y"], "answer": "b"}
    path.write_text(json.dumps(good))
    assert corpora.questions(str(path)) == [{**good, "answer": 1}]
    for bad in ({"answer": 2}, {"answer": "C"}, {"choices": "xy"}, {"question": None}):
        path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **bad}))
        with pytest.raises(UserError, match=r"quiz\.jsonl, row 2"):
            corpora.questions(str(path))
