"""kill -9 at random moments, the same command again: the bytes of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import driving
import families

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ACT_ORDER = ["--wbits", "3", "--act-order", "--true-sequential"]
PLAIN = ["--wbits", "4", "--sym", "--format", "gptq"]
DYNAMIC = ["--wbits", "2", "--act-order", "--format", "dense"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=4)
    (folder / "text.txt").write_text(families.TEXT * 200)
    return folder / "model", folder / "text.txt"


def check(inputs, folder, times, seed, flags):
    driver = Path(__file__).with_name("resume_driver.py")
    words = [driver, *inputs, folder, times, seed, *flags]
    driving.killed_runs_equal_the_straight_one(folder, 2 + times + 3, *words)


def test_killed_runs_resume_to_the_same_bytes(inputs, tmp_path):
    check(inputs, tmp_path, 3, 0, ACT_ORDER)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [ACT_ORDER, PLAIN, DYNAMIC])
def test_runs_killed_at_ten_moments(flags, inputs, tmp_path):
    check(inputs, tmp_path, 10, 1, flags)


@pytest.mark.slow
def test_the_command_itself(inputs, tmp_path):
    command = [sys.executable, "-m", "gptq", *map(str, inputs), *ACT_ORDER]
    command += ["--seqlen", "32", "--nsamples", "32", "--out", "out"]

    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(command, cwd=folder, env=ONE_THREAD, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "straight").wait() == 0
    process = start(tmp_path / "killed")
    begun = tmp_path / "killed" / "out.partial.json"
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert driving.contents(tmp_path / "killed" / "out") == driving.contents(
        tmp_path / "straight" / "out"
    )
    assert start(tmp_path / "killed").wait() == 0  # finished already


def test_of_two_runs_with_one_name_one_is_refused(inputs, tmp_path):
    """With other settings, which must not meet in one result."""
    command = [
        "-m",
        "gptq",
        *inputs,
        "--seqlen",
        "32",
        "--nsamples",
        "64",
        "--out",
        tmp_path / "out",
    ]
    ended = driving.begun_at_once(*([*command, "--wbits", bits] for bits in (3, 4)))
    assert sorted(code for code, _ in ended) == [0, 2], ended
    lost = next(errors for code, errors in ended if code)
    assert "another run is writing" in lost or "out exists" in lost, lost
    assert "Traceback" not in lost
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    bits = config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"]
    assert bits == (3 if ended[0][0] == 0 else 4)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
