"""A teacher's responses to several sets: drawn as asked, in one file, whole after a kill."""

import json
import subprocess
import sys

import pytest

import driving
import families
from bitdistiller.generate import main
from harness.checkpoint import load
from harness.data import example_sets
from harness.generation.responses import Sampling, open_engine

FLAGS = ["--engine", "transformers", "--max_new_tokens", "12", "--batch_size", "3"]
SETS = ["--dataset", "alpaca=asked.jsonl,more.jsonl", "--max_sample", "6,9"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    families.save("llama", tmp_path / "teacher", tokenizer=True)
    asked = [{"instruction": families.TEXT[i : i + 7 + i % 4], "output": "no"} for i in range(8)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    more = [{"prompt": families.TEXT[i : i + 12]} for i in range(10)]
    more.append({"prompt": families.TEXT * 9})
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_what_the_model_says_to_it(place, capsys):
    words = ["teacher", "--dataset", "alpaca=asked.jsonl,more.jsonl", *FLAGS, "--seed", "3"]
    assert main([*words, "--out", "said.jsonl"]) == 0
    shown = capsys.readouterr()
    assert "engine: transformers" in shown.err and "1 left out" in shown.err
    found = rows(place / "said.jsonl")
    assert [row["dataset"] for row in found] == ["alpaca"] * 8 + ["more"] * 10
    # The order is the sets' own, for there is nothing to draw.
    assert found[0]["prompt"] == families.TEXT[:7] + "\n"
    assert [row["prompt"] for row in found[8:]] == [families.TEXT[i : i + 12] for i in range(10)]
    tokenizer = load.load_tokenizer("teacher")
    ask = open_engine(
        "transformers",
        place / "teacher",
        tokenizer,
        Sampling(12, 0.7),
        64,
        dtype="auto",
        device="cpu",
    )
    counts = {True: 0, False: 0}
    lengths = []
    for index, row in enumerate(found):
        ids = example_sets.prompt_ids(tokenizer, [row["prompt"]])
        (said,) = ask(ids, [3 * 1_000_003 + index])
        assert row["response"] == tokenizer.decode(said)
        assert row["ended"] == (len(said) < 12)
        counts[row["ended"]] += 1
        lengths.append((len(ids[0]), len(said)))
    assert counts[False]
    cells = [line.split("|")[1:-1] for line in shown.out.splitlines()]
    total = [cell.strip() for cell in cells[4]]
    prompts, responses = map(sorted, zip(*lengths, strict=True))
    assert total[:2] == ["all", "18"] and total[6] == str(counts[False])
    assert total[2:6] == [
        f"{value:.0f}" for some in (prompts, responses) for value in (sum(some) / 18, some[16])
    ]
    # Training reads it.
    (place / "made").mkdir()
    (place / "said.jsonl").rename(place / "made/train.jsonl")
    (place / "made/valid.jsonl").write_text(json.dumps(found[0]))
    read = example_sets.pairs("made", "train", generated=True)
    assert read == [{k: row[k] for k in ("prompt", "response")} for row in found]


KILLED = """
import os, signal, sys
from bitdistiller import generate
from harness.generation import responses
real = responses.transformers_engine
def dying(*args):
    ask, calls = real(*args), []
    def counting(*words):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(*words)
    return counting
responses.transformers_engine = dying
generate.main(sys.argv[1:])
"""


def test_a_killed_run_ends_with_the_same_bytes(place, capsys):
    words = ["--base_model", "teacher", *SETS, *FLAGS]
    assert main([*words, "--out_path", "made"]) == 0
    whole = place / "made/alpaca-more_T0.7_N12_S42_6-9.jsonl"
    assert len(rows(whole)) == 14 and f"written to made/{whole.name}" in capsys.readouterr().out
    killed = subprocess.run([sys.executable, "-c", KILLED, *words, "--out", "again.jsonl"])
    assert killed.returncode == -9
    assert main([*words, "--out", "again.jsonl", "--top_p", "0.5"]) == 2
    assert "top_p: 1.0 there, 0.5 now" in capsys.readouterr().err
    assert main([*words, "--out", "again.jsonl"]) == 0
    assert "resuming: 6 responses are there" in capsys.readouterr().err
    assert (place / "again.jsonl").read_bytes() == whole.read_bytes()
    assert main([*words, "--out", "other.jsonl", "--seed", "1"]) == 0
    assert (place / "other.jsonl").read_bytes() != whole.read_bytes()


@pytest.mark.slow
def test_two_ranks_say_what_one_says(place):
    words = ["-m", "bitdistiller.generate", "teacher", *SETS, *FLAGS]
    for name, launcher in (("one", ()), ("two", driving.TWO_RANKS)):
        done = driving.python(*words, "--out", f"{name}.jsonl", launcher=launcher, cwd=place)
        assert launcher or done.returncode == 0, done.stderr
    assert (place / "one.jsonl").read_bytes() == (place / "two.jsonl").read_bytes()


def test_the_plan_writes_nothing(place, capsys):
    before = sorted(place.iterdir())
    assert main(["teacher", *SETS, *FLAGS, "--out", "x.jsonl", "--dry-run"]) == 0
    assert "5 batches of at most 3 prompts -> x.jsonl" in capsys.readouterr().out
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dataset", "alpca"], "Did you mean 'alpaca'?"),
        (["--dataset", ","], "--dataset: name a set"),
        (["--dataset", "empty.jsonl"], "empty.jsonl: nothing to ask"),
        (["--dataset", "more.jsonl,more.jsonl"], "more.jsonl is named twice"),
        (["--max_sample", "3,4"], "--max_sample 3,4: 2 numbers for 1 sets (more.jsonl)"),
        (["--max_sample", "few"], "--max_sample few: expected numbers above 0"),
        (["--max_new_tokens", "64"], "--max_new_tokens 64: expected 1 to 63"),
        (["--max_new_tokens", "63"], "none of 11 prompts has at most 1 tokens"),
        (["--max_sample", "²"], "--max_sample ²: expected numbers above 0"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "inf"], "temperature inf"),
        (["--top_p", "nan"], "top_p nan"),
        (["--batch_size", "0"], "--batch_size 0: at least 1"),
        (["--tensor_parallel_size", "2"], "--tensor_parallel_size is vLLM's"),
        (["--base_model", "teacher"], "name the model once"),
        (["--out_path", "x"], "give one of the two"),
        (["--out", "more.jsonl"], "more.jsonl exists"),
        (["--out", "x.txt"], "--out x.txt: expected a name in .jsonl"),
        (["--dataset", "five.jsonl"], "five.jsonl, line 1: prompt (5 is no text); expected prompt"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(place, capsys, words, message):
    (place / "empty.jsonl").write_text('{"text": "short"}\n')
    (place / "five.jsonl").write_text('{"prompt": 5}\n')
    before = sorted(place.iterdir())
    assert main(["teacher", "--dataset", "more.jsonl", *FLAGS, "--out", "x.jsonl", *words]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("greedy", [[], ["--temperature", "0"]])
@pytest.mark.parametrize(
    "damage, message",
    [
        ({"vocab_size": 200}, "the model knows 200; tokenizer and model do not belong together"),
        ({"rms_norm_eps": float("nan")}, "the model gives NaN or infinite logits in torch.float32"),
    ],
)
def test_a_model_that_can_say_nothing_is_one_clear_line(place, capsys, damage, message, greedy):
    families.save("llama", place / "teacher", **damage)
    before = sorted(place.iterdir())
    words = ["--dataset", "more.jsonl", *FLAGS, "--out", "x.jsonl", *greedy]
    assert main(["teacher", *words]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert sorted(place.iterdir()) == before


def test_without_vllm_its_engine_is_one_line(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["teacher", "--dataset", "more.jsonl", "--out", "x.jsonl"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "needs vLLM: pip install" in line and "--engine transformers works without" in line
