"""kill -9 in an epoch and the same command again: the bytes of an undisturbed run. Two processes
that share optimizer states (ZeRO 2) or weights (ZeRO 3) give the losses of one."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import driving
import families

MODULE = ["-m", "minillm.finetune"]
KILLER = str(Path(driving.__file__).with_name("step_killer.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=2)
    families.save("llama", folder / "teacher", tokenizer=True, seed=1)
    draw, words = random.Random(0), families.TEXT.split()
    rows = [
        {"prompt": words[i % 9] + ":", "response": " ".join(draw.choices(words, k=3))}
        for i in range(60)
    ]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def launch(place, out, *words, launcher=MODULE, code=0):
    """Three epochs of 54 examples in batches of 16, two looks an epoch."""
    # The card has the command: --out is the same word, in another folder.
    out.mkdir(exist_ok=True)
    words = [
        place / "model",
        "--data",
        place / "set.jsonl",
        "--out",
        "out",
        "--lr",
        "0.003",
        *words,
    ]
    words += ["--max-length", "32", "--total-iters", "10", "--eval-interval", "3"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": place / "c"},
        capture_output=True,
        text=True,
        cwd=out,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def contents(folder):
    files = (path for path in sorted((folder / "out").iterdir()) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def looks(folder):
    return json.loads((folder / "out" / "compression_log.json").read_text())["looks"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["--peft", "lora", "--peft-lora-dropout", "0.3"]], ids=["whole", "lora"]
)
def test_a_killed_run_ends_in_the_same_bytes(place, tmp_path, words):
    words = ["--batch-size", "8", "--gradient-accumulation-steps", "2", *words]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    launch(place, straight, *words)
    launch(place, killed, *words, launcher=[KILLER, MODULE[1], "8"], code=-signal.SIGKILL)
    errors = launch(place, killed, *words)
    assert "resuming: 6 steps are done" in errors
    assert looks(killed) == looks(straight)
    assert contents(killed) == contents(straight)


@pytest.mark.slow
def test_ranks_that_share_states_or_weights_train_as_one(place, tmp_path):
    words = ["--type", "kd", "--teacher", place / "teacher", "--batch-size", 4]
    one = tmp_path / "one"
    launch(place, one, *words, "--gradient-accumulation-steps", 4)
    expected = looks(one)
    assert expected[0]["validation_loss"] - expected[-1]["validation_loss"] > 0.1
    for zero in (2, 3):
        out = tmp_path / f"zero{zero}"
        shared = ["--gradient-accumulation-steps", 2, "--zero", zero]
        # Ranks write responses of different lengths; at ZeRO 3 they share weights all the while.
        shared += ["--eval-gen", "--select", "loss"]
        launch(place, out, *words, *shared, launcher=[*driving.TWO_RANKS, *MODULE])
        for row, other in zip(expected, looks(out), strict=True):
            assert 0 <= other.pop("rouge_l") <= 100
            assert other == pytest.approx(row, abs=1e-3)
        ids = families.windows(2)
        models = (
            AutoModelForCausalLM.from_pretrained(folder) for folder in (one / "out", out / "out")
        )
        logits = [model(input_ids=ids).logits for model in models]
        torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
