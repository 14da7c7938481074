"""GPTQ's slices of the named corpora against brute force over fake hub datasets."""

import random

import datasets
import pytest
import torch

from harness.data import corpora, hub
from harness.errors import UserError


class Bytes:
    """A tokenizer of bytes that puts token 256 in front, as LLaMA's puts its BOS."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [256, *text.encode()]}


TOKENIZER = Bytes()


def sentences(count, seed, longest=30):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randint(0, 99)}" for _ in range(draw.randint(1, longest)))
            for _ in range(count)]  # fmt: skip


@pytest.fixture
def loaded(monkeypatch):
    """Replace the hub by small tables; returns the calls made."""
    calls = []
    column = {"ptb-text-only/ptb_text_only": "sentence"}

    def load_dataset(repository, split, **options):
        calls.append((repository, split, options))
        name = column.get(repository, "text")
        if repository in ("tatsu-lab/alpaca", "databricks/databricks-dolly-15k"):
            second = "input" if "alpaca" in repository else "context"
            answer = "output" if "alpaca" in repository else "response"
            rows = [{"instruction": f"do {i}", second: "x" * (i % 2), answer: f"done {i}"}
                    for i in range(100)]  # fmt: skip
            return datasets.Dataset.from_list(rows)
        return datasets.Dataset.from_dict({name: sentences(1500, f"{repository} {split}")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def cut(text, seqlen, limit=None):
    ids = TOKENIZER(text)["input_ids"]
    return [ids[i : i + seqlen] for i in range(0, len(ids) - seqlen + 1, seqlen)][:limit]


@pytest.mark.parametrize(
    ("name", "new_eval", "repository", "split", "joint"),
    [
        ("wikitext2", True, "Salesforce/wikitext", "test", "\n\n"),
        ("ptb", True, "ptb-text-only/ptb_text_only", "test", " "),
        ("ptb", False, "ptb-text-only/ptb_text_only", "validation", "\n\n"),
    ],
)
def test_evaluation_of_joined_text(loaded, name, new_eval, repository, split, joint):
    windows = corpora.evaluation(TOKENIZER, name, seqlen=64, new_eval=new_eval)
    rows = sentences(1500, f"{repository} {split}")
    assert windows.tolist() == cut(joint.join(rows), 64)
    assert windows.dtype == torch.int64
    assert [call[:2] for call in loaded] == [(repository, split)]
    few = corpora.evaluation(TOKENIZER, name, seqlen=64, new_eval=new_eval, limit=3)
    assert few.tolist() == windows[:3].tolist()


@pytest.mark.parametrize(("name", "joint"), [("wikitext2", "\n\n"), ("ptb", " ")])
def test_calibration_draws_the_originals_windows(loaded, name, joint):
    windows = corpora.calibration(TOKENIZER, name, nsamples=5, seqlen=32, seed=7)
    ids = TOKENIZER(joint.join(sentences(1500, f"{hub.SOURCES[name][0]} train")))["input_ids"]
    random.seed(7)
    starts = [random.randint(0, len(ids) - 32 - 1) for _ in range(5)]
    assert windows.tolist() == [ids[start : start + 32] for start in starts]
    other = corpora.calibration(TOKENIZER, name, nsamples=5, seqlen=32, seed=8)
    assert not torch.equal(windows, other)


def test_c4_slices(loaded):
    train, held = (sentences(1500, f"allenai/c4 {split}") for split in ("train", "validation"))
    windows = corpora.calibration(TOKENIZER, "c4", nsamples=4, seqlen=60, seed=0)
    random.seed(0)
    expected = []
    while len(expected) < 4:
        ids = TOKENIZER(train[random.randint(0, len(train) - 1)])["input_ids"]
        if len(ids) > 60:
            start = random.randint(0, len(ids) - 60 - 1)
            expected.append(ids[start : start + 60])
    assert windows.tolist() == expected
    new = corpora.evaluation(TOKENIZER, "c4", seqlen=60)
    assert new.tolist() == cut(" ".join(held[:1100]), 60, 256)
    old = corpora.evaluation(TOKENIZER, "c4", seqlen=60, new_eval=False)
    assert old.shape == (256, 60)
    assert old[0].tolist() != new[0].tolist()
    files = {call[2]["data_files"][call[1]] for call in loaded}
    assert files == {
        "en/c4-train.00000-of-01024.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
    }


def test_pileval_halves_do_not_overlap(loaded):
    rows = sentences(1500, "mit-han-lab/pile-val-backup validation")
    windows = corpora.evaluation(TOKENIZER, "pileval", seqlen=60)
    assert windows.tolist() == cut(" ".join(rows[750:][:1100]), 60, 256)
    drawn = corpora.calibration(TOKENIZER, "pileval", nsamples=3, seqlen=60, seed=0)
    text = "\n".join(rows[:750])
    assert all(bytes(t for t in row.tolist() if t < 256).decode() in text for row in drawn)


def test_alpaca_format_and_disjoint_splits(loaded):
    for name in ("alpaca", "dolly"):
        parts = {
            split: corpora.instructions(name, split) for split in ("train", "validation", "test")
        }
        assert {split: len(part) for split, part in parts.items()} == {
            "train": 90, "validation": 5, "test": 5}  # fmt: skip
        assert len({pair["response"] for part in parts.values() for pair in part}) == 100
        prompts = {p["response"]: p["prompt"] for part in parts.values() for p in part}
        assert prompts["done 2"] == (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\ndo 2\n\n### Response:\n"
        )
        assert prompts["done 3"] == (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\ndo 3\n\n### Input:\nx\n\n### Response:\n"
        )
        assert corpora.calibration(TOKENIZER, name, nsamples=2, seqlen=50, seed=0).shape == (2, 50)


def test_errors_are_one_line_that_mends(loaded, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"Did you mean 'wikitext2'\?"):
        corpora.evaluation(TOKENIZER, "wikitex2", seqlen=8)
    short = tmp_path / "short.txt"
    short.write_text("a" * 100)
    with pytest.raises(UserError, match=r"3 windows .* 101 tokens fill 2; use --nsamples 2"):
        corpora.calibration(TOKENIZER, str(short), nsamples=3, seqlen=50, seed=0)
    with pytest.raises(UserError, match="101 tokens do not fill one window of 200"):
        corpora.evaluation(TOKENIZER, str(short), seqlen=200)
    with pytest.raises(UserError, match="0 windows of 9999 tokens found"):
        monkeypatch.setattr(corpora, "DRAWS", 20)
        corpora.calibration(TOKENIZER, "c4", nsamples=1, seqlen=9999, seed=0)
    with pytest.raises(UserError, match="use 'stdlib' for windows"):
        corpora.evaluation(TOKENIZER, "stdlib-quiz", seqlen=8)
    with pytest.raises(UserError, match="--nsamples 0"):
        corpora.calibration(TOKENIZER, "ptb", nsamples=0, seqlen=8, seed=0)

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach it\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"ptb: .* reach it.*local file.*stdlib") as caught:
        corpora.evaluation(TOKENIZER, "ptb", seqlen=8)
    assert "\n" not in str(caught.value)


def test_protocol_names_every_dataset():
    lines = [corpora.protocol(name) for name in corpora.DATASETS if name != "stdlib-quiz"]
    assert len(set(lines)) == len(lines)
    assert corpora.protocol("wikitext2") == "wikitext2 test, documents joined by two newlines"
    assert corpora.protocol("ptb", new_eval=False) != corpora.protocol("ptb")
