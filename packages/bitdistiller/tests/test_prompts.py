"""What the teacher is asked: the original's words, letter for letter, and local files."""

import json
from pathlib import Path

import pytest

from bitdistiller.prompts import draw, parse, passages, prompts
from harness.data import corpora, stdlib
from harness.errors import UserError

WIKITEXT = Path(__file__).parents[4] / "shared/data/wikitext-2"
LONG = "x" * 513
HEAD = "Below is an instruction that describes a task"
REST = "Write a response that appropriately completes the request.\n\n### Instruction:\nAsk"
# set -> where it is, its rows, what is asked
ORIGINAL = {
    "wikitext2": (
        ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
        [{"text": " = Title = \n"}, {"text": "y" * 512}, {"text": " two words" + LONG}],
        [" two words" + "x" * 118],
    ),
    "alpaca": (
        ("yahma/alpaca-cleaned", {}),
        [{"instruction": "Ask", "input": "", "output": "no"},
         {"instruction": "Ask", "input": "in", "output": "no"}],
        ["Ask\n", "Ask\nin\n"],
    ),
    "code": (
        ("nickrosh/Evol-Instruct-Code-80k-v1", {}),
        [{"instruction": "Ask", "output": "no"},
         {"instruction": "Ask", "input": "in", "output": "no"}],
        [f"{HEAD}. {REST}\n\n### Response:",
         f"{HEAD}, paired with an input that provides further context. {REST}\n\n### Input:\nin"
         "\n\n### Response:"],
    ),
    "math": (
        ("meta-math/MetaMathQA-40K", {}),
        [{"query": "Ask", "response": "no"}],
        [f"{HEAD}. {REST}\n\n### Response: Let's think step by step."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_originals_sets_in_its_words(name, monkeypatch, tmp_path):
    (repository, options), rows, asked = ORIGINAL[name]

    def load(given, split, **more):
        assert (given, split, more) == (repository, "train", options)
        return rows if name != "wikitext2" else {"text": [row["text"] for row in rows]}

    monkeypatch.setattr("datasets.load_dataset", load)
    assert prompts(name) == asked
    copy = tmp_path / "copy.jsonl"
    copy.write_text("\n".join(map(json.dumps, rows)))
    assert prompts(f"{name}={copy}") == asked
    assert parse(f"{name}={copy}") == (name, name, copy)


def test_other_names_of_the_same_sets():
    assert parse("wikitext")[:2] == parse("wikitext2")[:2]
    assert parse("metamath")[:2] == parse("math")[:2]


def test_the_columns_of_a_local_table_tell_what_it_is(tmp_path):
    rows = [
        {"prompt": "As it stands", "response": "no"},
        {"instruction": "Ask", "input": "in", "output": "no"},
        {"query": "Ask", "response": "no"},
        {"text": "short"},
        {"text": LONG},
    ]
    table = tmp_path / "rows.json"
    table.write_text(json.dumps(rows))
    math = ORIGINAL["math"][2][0]
    assert prompts(str(table)) == ["As it stands", "Ask\nin\n", math, "x" * 128]
    assert parse(str(table)) == ("rows", None, table)
    with pytest.raises(UserError, match=r"rows\.json, line 1: prompt, response; expected prompt"):
        prompts(f"code={table}")


def test_a_row_with_nothing_to_ask_is_named_by_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"answer": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: answer; expected prompt"):
        prompts(str(tmp_path / "a.jsonl"))


def test_a_text_gives_its_long_lines_or_runs_of_short_ones(tmp_path):
    # U+2028 and \x0b end no line of a text file.
    wide = f" a\u2028b\x0b{LONG}\n"
    (tmp_path / "wide.txt").write_text(f"{wide}short\n" * 2)
    assert prompts(str(tmp_path / "wide.txt")) == [wide[:128]] * 2
    lines = ["\n", *(f"{'  ' * (number % 3)}line {number}\n" for number in range(200))]
    (tmp_path / "narrow.txt").write_text("".join(lines))
    found = prompts(str(tmp_path / "narrow.txt"))
    runs = list(passages("".join(lines)))
    assert found == [run[:128] for run in runs] and len(found) > 2
    assert "".join(lines[1:]).startswith("".join(runs))
    assert all(512 < len(run) < 530 and run.endswith("\n") for run in runs)


def test_the_embedded_sets_are_of_the_training_part(monkeypatch):
    found = prompts("stdlib")
    assert len(found) > 5000 and {len(prompt) for prompt in found} == {128}
    assert all(prompt.strip() for prompt in found)
    train = "".join(stdlib.documents("train").values())
    assert all(prompt in train for prompt in found[::500])
    monkeypatch.setattr(corpora, "instructions", lambda *which: [{"prompt": " ".join(which)}])
    assert prompts("stdlib-doc") == ["stdlib-doc train"]


@pytest.mark.realdata
def test_wikitext_rows_are_the_lines_of_its_file():
    if not WIKITEXT.is_dir():
        pytest.skip("no ../shared/data/wikitext-2")
    found = prompts(f"wikitext2={WIKITEXT}")
    with (WIKITEXT / "valid.txt").open(newline="") as file:
        expected = [line[:128] for line in file if len(line) > 512]
    assert found == expected and len(found) > 500


def test_the_draw_follows_from_the_seed():
    every = [str(number) for number in range(50)]
    drawn = draw(every, 9, 42)
    assert drawn == draw(every, 9, 42) != draw(every, 9, 43)
    assert len(set(drawn)) == 9 and set(drawn) < set(every) and drawn != sorted(drawn, key=int)
    assert draw(every, 50, 1) == draw(every, 90, 1) == draw(every, None, 1) == every


@pytest.mark.parametrize(
    "name, message",
    [
        ("wikitex", "Did you mean 'wikitext'"),
        ("code=nowhere.jsonl", "no file or folder nowhere.jsonl"),
        ("stdlib=nowhere.jsonl", "neither a file or folder nor one of wikitext2, alpaca"),
    ],
)
def test_unknown_sets_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        prompts(name)
