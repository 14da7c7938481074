"""Files of responses put together."""

import json

import pytest

from bitdistiller.mix import main
from harness.data import example_sets


@pytest.fixture
def place(tmp_path, monkeypatch):
    ours = [
        {"prompt": f"p{i}", "response": f"r{i} ", "dataset": "code", "ended": i % 3 > 0}
        for i in range(12)
    ]
    ours.append(ours[4])
    ours.append(ours[4] | {"response": " ...\n"})
    (tmp_path / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    # The original's .json files hold a list on each line.
    theirs = [[[f"q{i}", f"s{i}"]] for i in range(8)] + [[["p4", "r4 "]], [["q1", "other"]]]
    (tmp_path / "alpaca_T0.7.json").write_text("".join(json.dumps(row) + "\n" for row in theirs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_once_in_another_order(place, capsys):
    assert main(["ours.jsonl", "alpaca_T0.7.json", "--out", "new/mix.jsonl"]) == 0
    found = rows(place / "new/mix.jsonl")
    expected = [(f"p{i}", f"r{i} ") for i in range(12)]
    expected += [(f"q{i}", f"s{i}") for i in range(8)] + [("q1", "other")]
    pairs = [(row["prompt"], row["response"]) for row in found]
    assert sorted(pairs) == sorted(expected) and pairs != expected
    assert [row.get("ended") for row in found if row["prompt"] == "p3"] == [False]
    assert {row["dataset"]: "ended" in row for row in found} == {"code": True, "alpaca_T0.7": False}
    shown = capsys.readouterr().out
    assert "21 of 24 rows" in shown
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert table[2] == ["code", "14", "2", "3", "3", "4", "4", "1", "1"]
    assert table[3][-3:] == ["?", "0", "1"] and table[4][:2] == ["all", "24"]
    # It is what training reads.
    read = example_sets.pairs("new", "train", generated=True)
    assert len(read) == 19 and set(read[0]) == {"prompt", "response"}


def test_the_draw_follows_from_the_seed(place):
    for out, seed in (("a", "42"), ("b", "42"), ("c", "1")):
        words = ["ours.jsonl", "--max_sample", "5", "--seed", seed, "--out", f"{out}.jsonl"]
        assert main(words) == 0
    a, b, c = (place / f"{out}.jsonl" for out in "abc")
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    assert len(rows(a)) == 5


def test_what_a_killed_mix_leaves_is_replaced_by_the_next(place, monkeypatch):
    def killed(*paths):
        raise KeyboardInterrupt

    before = sorted(place.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)
        patched.setattr("pathlib.Path.unlink", lambda *some, **more: None)
        assert main(["ours.jsonl", "--out", "m.jsonl"]) == 130
    left = [place / "m.jsonl.partial.lock", place / "m.jsonl.tmp"]
    assert sorted(place.iterdir()) == sorted([*before, *left])
    assert main(["ours.jsonl", "--out", "m.jsonl"]) == 0
    assert sorted(place.iterdir()) == sorted([*before, place / "m.jsonl"])


def test_what_did_not_end_can_be_left_out(place, capsys):
    assert main(["ours.jsonl", "--drop-unfinished", "--out", "ended.jsonl"]) == 0
    found = rows(place / "ended.jsonl")
    assert len(found) == 8 and all(row["ended"] for row in found)
    words = ["ours.jsonl", "alpaca_T0.7.json", "--drop_unfinished", "--out", "x.jsonl"]
    assert main(words) == 2
    assert "10 rows do not say" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["bad.jsonl"], "bad.jsonl, line 3: prompt, output; expected prompt and response"),
        (["five.csv"], "five.csv, line 3: prompt, response (None is no text); expected"),
        (["five.jsonl"], "five.jsonl, line 1: prompt, response (5 is no text); expected"),
        (["half.jsonl"], "half.jsonl, line 1: '\\ud800' is half of a character"),
        (["ours.jsonl", "--out", "x.csv"], "--out x.csv: expected a name in .jsonl"),
        (["list.json"], "list.json, line 2: expected an object"),
        (["nothing.jsonl"], "nothing.jsonl: no such file"),
        (["dots.jsonl"], "of 1 rows none is left"),
        (["ours.jsonl", "--max_sample", "0"], "--max_sample 0"),
        (["ours.jsonl", "--out", "ours.jsonl"], "ours.jsonl exists"),
    ],
)
def test_bad_input_is_one_clear_line(place, capsys, words, message):
    good = '{"prompt": "a", "response": "b"}\n'
    (place / "bad.jsonl").write_text(good + "\n" + good.replace("response", "output"))
    (place / "list.json").write_text('[["a", "b"]]\n[["a", "b", "c"]]\n')
    (place / "dots.jsonl").write_text(good.replace('"b"', '"..."'))
    (place / "five.csv").write_text("prompt,response\na,b\na\n")
    (place / "five.jsonl").write_text(good.replace('"b"', "5"))
    (place / "half.jsonl").write_text(good.replace('"b"', '"\\ud800"'))
    before = sorted(place.iterdir())
    assert main(["--out", "x.jsonl", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert sorted(place.iterdir()) == before
