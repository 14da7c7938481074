"""kill -9 at random moments, the same command again: the bytes of an undisturbed run. Two gloo
processes give the losses of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import driving
import families
from sparse.recover import main

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=2)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return folder / "model", folder / "text.txt"


def check(inputs, folder, times, seed, flags):
    driver = Path(__file__).with_name("recover_driver.py")
    words = [driver, *inputs, folder, times, seed, *flags]
    said = driving.killed_runs_equal_the_straight_one(folder, 2 + times + 7, *words)
    assert "resuming: 4 steps are done" in said


def test_killed_runs_resume_to_the_same_bytes(inputs, tmp_path):
    check(inputs, tmp_path, 3, 0, ["--lora_dropout", "0.3"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--tune", "full", "--dtype", "bfloat16"]])
def test_runs_killed_at_ten_moments(flags, inputs, tmp_path):
    check(inputs, tmp_path, 10, 1, flags)


def test_another_run_there_is_refused_by_name(inputs, tmp_path, monkeypatch, capsys):
    from harness.training import engine

    real = engine.train_step

    def interrupted(running, training, step, *more):
        if step == 1:
            raise KeyboardInterrupt
        return real(running, training, step, *more)

    monkeypatch.setattr(engine, "train_step", interrupted)
    words = [str(inputs[0]), "--dataset", str(inputs[1]), "--cutoff_len", "32"]
    words += ["--out", str(tmp_path / "out"), "--max_steps", "2"]
    assert main([*words]) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*words, "--learning_rate", "0.5"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was begun by another run (settings, learning_rate: 0.0384 there, 0.5 now)" in line
    assert main([*words, "--dtype", "bfloat16"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "dtype: float32 there, bfloat16 now); add --dtype float32, choose" in line
    assert main([*words, "--learning_rate", "0.5", "--no-resume"]) == 0


@pytest.mark.slow
def test_two_ranks_equal_one(inputs, tmp_path):
    command = ["-m", "sparse.recover", str(inputs[0]), "--dataset", str(inputs[1])]
    command += ["--cutoff_len", "32", "--max_steps", "6", "--learning_rate", "0.003"]
    command += ["--lora_dropout", "0", "--batch_size", "7", "--micro_batch_size", "2"]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]
    losses = {}
    for name, launch, zero in (("one", [], "0"), ("two", launcher, "2")):
        done = subprocess.run(
            [sys.executable, *launch, *command, "--zero", zero, "--out", name],
            cwd=tmp_path,
            env=ONE_THREAD,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert ("dealt to 2 processes" in done.stderr) == (name == "two")
        looks = json.loads((tmp_path / name / "compression_log.json").read_text())["looks"]
        losses[name] = [v for row in looks for k, v in row.items() if "_loss" in k and v]
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)
    assert losses["one"][0] > losses["one"][-1] + 0.05
