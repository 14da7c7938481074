"""kill -9 at random moments, the same command again: the bytes of an undisturbed run."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest

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


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def check(inputs, folder, times, seed, flags):
    driver = Path(__file__).with_name("resume_driver.py")
    path = os.pathsep.join([str(Path(families.__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, [driver, *inputs, folder, times, seed, *flags])],
        env=ONE_THREAD | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [p for p in folder.iterdir() if p.is_dir()]
    assert len(results) == 2 + times + 3
    for result in results:
        assert contents(result) == contents(folder / "straight"), result.name


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
    killed = start(tmp_path / "killed")
    begun = tmp_path / "killed" / "out.partial.json"
    while not begun.exists() and killed.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.2))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert start(tmp_path / "killed").wait() in (0, 2)  # 2: it had just finished
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "straight" / "out")
    assert start(tmp_path / "killed").wait() == 2  # not without --overwrite
