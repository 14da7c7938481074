"""Examples: what is predicted, what is left out and said."""

import json
import random

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import families
from harness.checkpoint import load
from harness.data import example_sets, stdlib
from harness.data.instructions import alpaca_prompt
from harness.errors import UserError
from harness.training import batching

LIMITS = {"max_length": 24, "max_prompt_length": 12, "name": "set"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    families.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def pair(prompt, response):
    return {"prompt": prompt, "response": response}


def test_labels_are_the_response_and_the_end(tokenizer):
    pairs = [pair("def add(left", ", right):\n    return left"), pair("left", "ü")]
    found = example_sets.examples(tokenizer, pairs, **LIMITS)
    batch = batching.collate([found[0], found[1]], pad=tokenizer.eos_token_id)
    assert batch["input_ids"].dtype == torch.long and batch["read"] == sum(found.lengths)
    for row, (prompt, response) in enumerate((p["prompt"], p["response"]) for p in pairs):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        start = len(tokenizer(prompt)["input_ids"])
        assert ids[:start].tolist() == tokenizer(prompt)["input_ids"]
        predicted = labels[labels != batching.IGNORED]
        assert tokenizer.decode(predicted[:-1]) == response
        assert predicted[-1] == tokenizer.eos_token_id
        places = (labels != batching.IGNORED).nonzero()[:, 0]
        assert places.tolist() == list(range(start - 1, start - 1 + len(predicted)))
        assert torch.equal(ids[places + 1], predicted)
        assert batch["attention_mask"][row].tolist() == [
            int(i < found.lengths[row]) for i in range(len(ids))
        ]
    assert batch["tokens"] == int((batch["labels"] != batching.IGNORED).sum())


def test_prompt_and_response_are_one_text():
    """Tokens as a model will read them; one that spans the border is predicted."""
    tokenizer = load.load_tokenizer(load.resolve("tiny-llama"))
    cases = {
        ("def ad", "d(a, b): pass"): "Ġadd",
        ("x = ", " 3"): "ĠĠ",
        ("Answer:\n", "\n\nyes"): "ĊĊĊ",
        ("    ret", "urn number"): "return",
        ("def add", "(a, b): pass"): "(",
    }
    encoded = example_sets.encode(tokenizer, *map(list, zip(*cases, strict=True)))
    for (texts, first), (prompt, answer) in zip(cases.items(), encoded, strict=True):
        ids = tokenizer("".join(texts))["input_ids"]
        assert prompt + answer == [*ids, tokenizer.eos_token_id]
        assert tokenizer.convert_ids_to_tokens(answer[0]) == first
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        next(example_sets.encode(tokenizer, ["a"], ["b"]))


def test_what_is_left_out_or_cut_is_counted(tokenizer, capsys):
    pairs = [
        pair("range", "print"), pair("for", "  \n"), pair("é" * 30, "x"), pair("left", "ü" * 30),
        pair("for", ""),
    ]  # fmt: skip
    found = example_sets.examples(tokenizer, pairs, **LIMITS)
    counts = found.counts
    assert (counts.examples, counts.empty, counts.long_prompts, counts.cut) == (2, 2, 1, 1)
    assert found.sources == [0, 3] and found.lengths[1] == 24
    said = capsys.readouterr().err
    assert "2 examples" in said and "2 left out, their response is empty" in said
    assert "1 left out, their prompt has more than 12" in said and "1 cut at 24" in said
    with pytest.raises(
        UserError, match=r"of 2 rows none is left: 1 have an empty .* 1 a prompt of"
    ):
        example_sets.examples(tokenizer, pairs[1:3], **LIMITS)
    with pytest.raises(UserError, match=r"--max-prompt-length 24: expected less than"):
        example_sets.examples(tokenizer, pairs, **LIMITS | {"max_prompt_length": 24})


def test_tokens_are_kept_and_found_again(tokenizer, monkeypatch, capsys):
    pairs = [pair("range", "print")]
    first = example_sets.examples(tokenizer, pairs, **LIMITS)
    said = capsys.readouterr().err
    monkeypatch.setattr(example_sets, "encode", None)
    again = example_sets.examples(tokenizer, pairs, **LIMITS)
    assert again.key == first.key and torch.equal(again[0][0], first[0][0])
    assert capsys.readouterr().err == said
    with pytest.raises(TypeError):
        example_sets.examples(tokenizer, pairs, **LIMITS | {"max_length": 23})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" if row else "\n" for row in rows))
    return str(path)


def test_the_originals_rows_are_read(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi.", "prompt": "HI:", "input": "", "output": ["hi", "hello"]},
    ]
    write(tmp_path / "set" / "train.jsonl", rows)
    write(tmp_path / "set" / "valid.jsonl", rows[:1])
    expected = [pair(alpaca_prompt("Add.", "1, 2"), "3"), pair("HI:", "hi")]
    assert example_sets.pairs(str(tmp_path / "set"), "train") == expected
    assert example_sets.pairs(str(tmp_path / "set"), "validation") == expected[:1]


def test_missing_columns_are_named_with_their_line(tmp_path):
    good = {"prompt": "a", "response": "b"}
    file = write(tmp_path / "rows.jsonl", [good, None, good, {"prompt": "a", "reply": "b"}])
    with pytest.raises(UserError, match=r"rows.jsonl, line 4: prompt, reply; expected prompt and"):
        example_sets.pairs(file, "train")


def test_a_value_that_is_no_text_is_shown(tmp_path):
    for value, shown in ((5, "5"), (None, "None")):
        file = write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": value}])
        with pytest.raises(UserError, match=rf"prompt, response \({shown} is no text\); expected"):
            example_sets.pairs(file, "train")
        with pytest.raises(UserError, match=rf"response \({shown} is no text\); expected"):
            example_sets.pairs(file, "train", generated=True)


def test_a_set_alone_is_not_dealt(tokenizer, tmp_path):
    rows = [pair(f"p{i}", "r") for i in range(30)]
    file = write(tmp_path / "rows.jsonl", rows)
    for split, count in (("train", 28), ("validation", 1)):
        assert example_sets.pairs(file, split, alone=True) == rows
        assert len(example_sets.pairs(file, split)) == count
    (tmp_path / "texts").mkdir()
    for name, letter in (("train", "a"), ("valid", "b")):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{letter} " * 300)
    for part, letter in (("train", "a"), ("validation", "b")):
        found = example_sets.windows(
            tokenizer, str(tmp_path / "texts"), length=16, part=part, alone=True
        )
        assert len(found) == 600 // 16 and letter in tokenizer.decode(found[0][0])


def test_generated_responses_are_the_models_not_the_humans(tmp_path):
    (tmp_path / "set").mkdir()
    row = {"prompt": "p", "output": "human", "gen_answer": "model"}
    write(tmp_path / "set" / "train.jsonl", [row])
    assert example_sets.pairs(str(tmp_path / "set"), "train", generated=True) == [
        pair("p", "model")
    ]
    file = write(tmp_path / "set.jsonl", [{"prompt": "p", "output": "human"}])
    with pytest.raises(UserError, match=r"line 1: prompt, output; expected prompt and response"):
        example_sets.pairs(file, "train", generated=True)
    with pytest.raises(UserError, match=r"minillm.generate TEACHER --data dolly"):
        example_sets.pairs("dolly", "train", generated=True)


def test_a_text_in_windows(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(families.TEXT * 9)
    found = example_sets.windows(tokenizer, str(tmp_path / "text.txt"), length=16)
    ids = tokenizer(families.TEXT * 9)["input_ids"]
    assert [found[i][0].tolist() for i in range(len(found))] == [
        ids[i : i + 16] for i in range(0, len(ids) - 15, 16)
    ]
    assert set(found.firsts) == {1}
    with pytest.raises(UserError, match="tokens fill 0 windows of 9999; use"):
        example_sets.windows(tokenizer, str(tmp_path / "text.txt"), length=9999)


def test_a_text_in_two_parts(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    draw = random.Random(0)
    file.write_text("".join(draw.choices("abcdefgh", k=2400)))
    whole, train, held = (
        [tuple(row[0].tolist()) for row in (found[i] for i in range(len(found)))]
        for found in (
            example_sets.windows(tokenizer, str(file), length=16, part=part)
            for part in (None, "train", "validation")
        )
    )
    assert len(held) == len(whole) // 20 > 1 and sorted(train + held) == sorted(whole)
    some = example_sets.windows(tokenizer, str(file), length=16, part="train", limit=9)
    chosen = [train.index(tuple(some[i][0].tolist())) for i in range(9)]
    assert chosen == sorted(chosen) and chosen[-1] > 20  # from all over it, in order


def test_stdlib_is_held_out_by_its_calibration_split(tokenizer, monkeypatch):
    monkeypatch.setattr(stdlib, "text", lambda split: f"{split} " * 300)
    for part, split in (("train", "train"), ("validation", "calibration")):
        found = example_sets.windows(tokenizer, "stdlib", length=16, part=part)
        assert split in tokenizer.decode(found[0][0]) and len(found) > 50


def test_texts_and_instructions_are_told_apart(tmp_path):
    rows = {
        "text": ['{"text": "a", "id": "b"}'], "plain": ['"a"', '"b"'],
        "pairs": ['{"text": "a", "prompt": "p", "output": "r"}'], "lists": ['[["p", "r"]]'],
        "neither": ['{"prompt": "p"}'],
    }  # fmt: skip
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    texts = [name for name in rows if example_sets.is_text(str(tmp_path / f"{name}.jsonl"))]
    assert texts == ["text", "plain"]
    named = ("stdlib", "wikitext2", "alpaca", "stdlib-doc", "misspelt")
    assert [example_sets.is_text(name) for name in named] == [True, True, False, False, False]


def test_a_prompt_may_be_predicted_too(tokenizer):
    found = example_sets.examples(tokenizer, [pair("range", "print")], whole=True, **LIMITS)
    alone = example_sets.examples(tokenizer, [pair("range", "print")], **LIMITS)
    assert found.firsts == [1] and alone.firsts == [len(tokenizer("range")["input_ids"])]
    assert found.lengths == alone.lengths
