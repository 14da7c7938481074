"""kill -9 in an epoch and the same command again: the bytes of an undisturbed run. Two processes
that share gradients (ZeRO 2), and one that holds its weights in pieces (ZeRO 3), train as one."""

import os
import signal
from pathlib import Path

import pytest
import qat_place as qat
import torch

import driving

KILLER = str(Path(driving.__file__).with_name("step_killer.py"))
MODULE = ["-m", "bitdistiller.train"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return qat.make(tmp_path_factory.mktemp("runs"))


def launch(place, folder, *words, launcher=MODULE, code=0):
    """Ten steps of 16 examples, a look every third; returns stderr."""
    # The card has the command: --out is the same word, in another folder.
    folder.mkdir(exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
    words = [place / "model", "--data", place / "set.jsonl", *qat.QUICK, "--out", "out", *words]
    words += ["--max_steps", 10, "--eval_steps", 3]
    done = driving.python(*words, launcher=launcher, cwd=folder)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    words = ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2]
    launch(place, folder, *words)
    return words, folder / "out"


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(place, straight, tmp_path):
    words, expected = straight
    launch(place, tmp_path, *words, launcher=[KILLER, MODULE[1], 8], code=-signal.SIGKILL)
    assert "resuming: 6 steps are done" in launch(place, tmp_path, *words)
    # TensorBoard's events have the time.
    found, wanted = (
        {
            name: value
            for name, value in driving.contents(folder).items()
            if "tensorboard" not in name
        }
        for folder in (tmp_path / "out", expected)
    )
    assert found == wanted and "grid.safetensors" in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        (["--zero", 2], [*driving.TWO_RANKS, *MODULE]),
        (["--zero", 3, "--gradient_accumulation_steps", 2], MODULE),
    ],
    ids=["two ranks, ZeRO 2", "ZeRO 3"],
)
def test_other_engines_train_alike(place, straight, tmp_path, words, launcher):
    _, expected = straight
    words = ["--per_device_train_batch_size", 8, *words]
    said = launch(place, tmp_path, *words, launcher=launcher)
    beta = [line for line in said.splitlines() if line.startswith("cakld: beta")]
    assert len(beta) == 1
    for row, other in zip(qat.looks(tmp_path / "out"), qat.looks(expected), strict=True):
        assert row == pytest.approx(other, abs=1e-3)
    assert (
        qat.looks(expected)[-1]["validation_loss"] < 0.9 * qat.looks(expected)[0]["validation_loss"]
    )
    found, wanted = qat.weights(tmp_path / "out"), qat.weights(expected)
    # A weight near the middle between two values may go either way.
    same = [torch.isclose(found[name], wanted[name], atol=1e-3) for name in wanted]
    assert sum(s.sum() for s in same) > 0.98 * sum(s.numel() for s in same)
