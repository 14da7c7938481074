"""Training examples against what the tokenizer and the files say."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import families
from harness.data import corpora, training_data
from harness.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    families.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_text_is_cut_once_and_a_part_is_held_out(tokenizer, tmp_path):
    text = "".join(f"line {number}\n" for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    source = str(tmp_path / "text.txt")
    train, held = training_data.load(tokenizer, source, seqlen=20, held_out=5)
    assert len(held) == 5 and all(first == 1 for _, first in train + held)
    ids = tokenizer(text)["input_ids"]
    expected = sorted(tuple(ids[i : i + 20]) for i in range(0, len(ids) - 19, 20))
    assert sorted(tuple(ids.tolist()) for ids, _ in train + held) == expected
    again = training_data.load(tokenizer, source, seqlen=20, held_out=5)
    other = training_data.load(tokenizer, source, seqlen=20, held_out=5, seed=1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(train, again[0], strict=True))
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(train, other[0], strict=True))
    assert len(training_data.load(tokenizer, source, seqlen=20, held_out=5, limit=3)[0]) == 3
    # Never more than a tenth.
    assert len(training_data.load(tokenizer, source, seqlen=20, held_out=999)[1]) == (
        len(expected) // 10
    )


def test_only_responses_are_predicted(tokenizer, tmp_path):
    rows = [{"instruction": f"add {i}", "input": "to 1", "output": f"{i + 1}"} for i in range(40)]
    source = tmp_path / "sums.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_data.is_instructions(str(source))
    train, held = training_data.load(tokenizer, str(source), seqlen=500, held_out=9)
    assert {len(train), len(held)} == {
        36,
        2,
    }  # as dealt by harness.data.instructions: a twentieth held out
    pairs = {
        pair["prompt"]: pair["response"] for pair in corpora.instructions(str(source), "train")
    }
    for ids, first in train:
        prompt, response = (tokenizer.decode(part) for part in (ids[:first], ids[first:]))
        assert response == pairs.pop(prompt) + tokenizer.eos_token
    assert not pairs
    whole, _ = training_data.load(
        tokenizer, str(source), seqlen=500, held_out=9, train_on_inputs=True
    )
    assert {first for _, first in whole} == {1}
    with pytest.raises(UserError, match="0 training and 0 validation examples"):
        training_data.load(tokenizer, str(source), seqlen=10, held_out=9)


def test_stdlib_is_validated_on_modules_it_is_not_trained_on(tokenizer, monkeypatch):
    texts = {"train": "a = 1\n" * 99, "calibration": "b = 2\n" * 99}
    monkeypatch.setattr(training_data.stdlib, "text", texts.__getitem__)
    train, held = training_data.load(tokenizer, "stdlib", seqlen=8, held_out=4)
    assert all("b" not in tokenizer.decode(ids) for ids, _ in train)
    assert len(held) == 4 and all("a" not in tokenizer.decode(ids) for ids, _ in held)


def test_c4_is_read_until_there_is_enough(tokenizer, monkeypatch):
    documents = [f"document {number} " * 5 for number in range(1000)]
    monkeypatch.setattr(corpora, "corpus_documents", lambda name, split: documents)
    read = []
    encode = training_data._encode
    monkeypatch.setattr(
        training_data, "_encode", lambda t, text: read.append(text) or encode(t, text)
    )
    train, held = training_data.load(tokenizer, "c4", seqlen=16, held_out=2, limit=10)
    assert (len(train), len(held)) == (10, 1) and len(read) < 20
    assert len(set(read)) == len(read) and read != documents[: len(read)]
