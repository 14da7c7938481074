"""Responses: drawn as they should be, each from its own random numbers, and whole after a kill."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import driving
import families
from harness.checkpoint import load
from harness.data import example_sets
from harness.generation.responses import (
    SEEDS,
    Sampling,
    _Draw,
    batches,
    open_engine,
    probabilities,
    transformers_engine,
    without_repeats,
)
from minillm.generate import main

FLAGS = ["--max-length", "24", "--max-prompt-length", "12", "--batch-size", "3"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    families.save("llama", tmp_path / "teacher", tokenizer=True)
    rows = [{"prompt": families.TEXT[i : i + 7 + i % 4], "response": "human"} for i in range(20)]
    rows.append({"prompt": families.TEXT * 9, "response": "its prompt is too long"})
    folder = tmp_path / "asked"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "valid.jsonl").write_text(json.dumps(rows[0]))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.5}])
def test_the_distribution_is_that_of_transformers(cut):
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    warpers += [TopKLogitsWarper(cut["top_k"])] if "top_k" in cut else []
    warpers += [TopPLogitsWarper(cut["top_p"])] if "top_p" in cut else []
    expected = warpers(None, scores.clone()).softmax(-1)
    found = probabilities(scores, Sampling(8, temperature=0.8, **cut))
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected.double(), atol=1e-6,
                               rtol=0)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_comes_twice(size):
    ids = torch.randint(0, 4, (6, 12), generator=torch.Generator().manual_seed(0))
    scores = torch.randn(6, 7)
    expected = NoRepeatNGramLogitsProcessor(size)(ids, scores)
    assert expected.isinf().any()
    assert torch.equal(without_repeats(ids, scores, size), expected)


def test_tokens_come_as_often_as_they_should():
    count = 20_000
    scores = torch.tensor([[1.0, -2.0, 0.5, -torch.inf, 0.0]]).expand(count, 5)
    draw = _Draw(Sampling(1), 2, list(range(count)))
    drawn = draw(torch.zeros(count, 2, dtype=torch.long), scores).argmax(-1)
    share = drawn.bincount(minlength=5) / count
    expected = scores[0].softmax(-1)
    assert share[3] == 0
    assert ((share - expected).abs() < 4 * (expected / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_batches_change_nothing(family):
    model = families.build(family)
    # What a checkpoint asks for by itself is not what is to be measured.
    model.generation_config.repetition_penalty = 3.0
    tokenizer = SimpleNamespace(eos_token_id=5)
    ask = transformers_engine(model, tokenizer, Sampling(8))
    prompts = [ids[: 3 + i].tolist() for i, ids in enumerate(families.windows(6, 10))]
    seeds = [SEEDS + i for i in range(6)]
    together = ask(prompts, seeds)
    assert together == [ask([p], [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert len(set(map(tuple, together))) == 6
    # An independent loop: the whole forward again for every token.
    for prompt, seed, said in zip(prompts, seeds, together, strict=True):
        draws = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ids = list(prompt)
        for draw in draws:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            shares = logits.double().softmax(-1).cumsum(-1)
            ids.append(int((shares <= draw).sum()))
            if ids[-1] in (5, model.generation_config.eos_token_id):
                ids.pop()
                break
        assert said == ids[len(prompt) :]


def test_the_longest_come_first():
    assert batches([[1], [1, 2, 3], [1, 2], [3, 4, 5]], 3) == [[1, 3, 2], [0]]


KILLED = """
import os, signal, sys
from minillm import generate
from harness.generation import responses
real = responses.transformers_engine
def dying(*args):
    ask, calls = real(*args), []
    def twice(*words):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(*words)
    return twice
responses.transformers_engine = dying
generate.main(sys.argv[1:])
"""


def test_a_killed_run_ends_with_the_same_bytes(place, capsys):
    words = ["teacher", "--data", "asked", *FLAGS]
    assert main([*words, "--out", "whole.jsonl"]) == 0
    shown = capsys.readouterr()
    assert "1 left out" in shown.err and "20 responses" in shown.out
    killed = subprocess.run([sys.executable, "-c", KILLED, *words, "--out", "again.jsonl"])
    assert killed.returncode == -9
    with (place / "again.jsonl.partial/rank-0.jsonl").open("a") as lines:
        lines.write('[19, "half a li')  # as a kill may leave it
    assert main([*words, "--out", "again.jsonl", "--temperature", "0.5"]) == 2
    assert "temperature: 1.0 there, 0.5 now" in capsys.readouterr().err
    assert main([*words, "--out", "again.jsonl"]) == 0
    assert "resuming: 9 responses are there" in capsys.readouterr().err
    assert (place / "again.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()
    assert not list(place.glob("*.partial*"))
    with (place / "again.jsonl").open("a") as lines:
        lines.write("{}\n")  # no longer what the command made
    assert main([*words, "--out", "again.jsonl"]) == 2
    assert "again.jsonl exists" in capsys.readouterr().err
    assert main([*words, "--out", "other.jsonl", "--seed", "1"]) == 0
    assert (place / "other.jsonl").read_bytes() != (place / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_two_ranks_say_what_one_says(place):
    """Nor are a teacher's cache and an evaluation others than those of one rank."""
    driver = Path(__file__).with_name("answers_driver.py")
    (place / "runs").mkdir()
    words = driver, place / "teacher", place / "asked"
    made = driving.two_ranks_equal_one(place / "runs", *words)
    assert made == {"said.jsonl", "cache", "results.json"}
    assert len(list((place / "runs/two/cache").glob("shard-*"))) > 2


def test_seqkd_trains_on_what_the_teacher_wrote(place):
    assert main(["teacher", "--data", "asked", *FLAGS, "--out", "made/train.jsonl"]) == 0
    tokenizer = load.load_tokenizer("teacher")
    ask = open_engine(
        "transformers", place / "teacher", tokenizer, Sampling(12), 24, dtype="auto", device="cpu"
    )
    found = example_sets.pairs("made", "train", generated=True)
    asked = [pair["prompt"] for pair in example_sets.pairs("asked", "train")]
    assert [pair["prompt"] for pair in found] == asked[:20]
    for index in (0, 7, 19):
        said = ask(example_sets.prompt_ids(tokenizer, [asked[index]]), [index])[0]
        assert found[index]["response"] == tokenizer.decode(said) != "human"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--max-prompt-length", "600"], "expected less than --max-length"),
        (["--max-prompt-length", "1"], "none has at most 1 tokens"),
        (["--top-p", "0"], "top_p 0.0"),
        (["--temperature", "inf"], "temperature inf"),
        (["--gen-num", "-3"], "--gen-num -3: at least 1"),
        (["--out", "x.json"], "--out x.json: expected a name in .jsonl"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(place, capsys, words, message):
    assert main(["teacher", "--data", "asked", "--out", "x.jsonl", *words]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and shown[-1].startswith("error: ")


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"vocab_size": 200}, "the model knows 200; tokenizer and model do not belong together"),
        ({"rms_norm_eps": float("nan")}, "the model gives NaN or infinite logits in torch.float32"),
    ],
)
def test_a_model_that_can_say_nothing_is_one_clear_line(place, capsys, damage, message):
    families.save("llama", place / "teacher", **damage)
    before = sorted(place.iterdir())
    assert main(["teacher", "--data", "asked", *FLAGS, "--out", "x.jsonl"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert sorted(place.iterdir()) == before


def test_without_vllm_its_engine_is_one_line(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = ["teacher", "--data", "asked", *FLAGS, "--engine", "vllm", "--out", "x.jsonl"]
    assert main(words) == 2
    assert "--engine vllm needs vLLM" in capsys.readouterr().err
    assert main([*words, "--no-repeat-ngram-size", "6"]) == 2
    assert "--no-repeat-ngram-size 0" in capsys.readouterr().err
