"""Killed runs end with the bytes of an undisturbed one, and two ranks with those of one."""

import os
import subprocess
import sys
from pathlib import Path

import families
import pytest

DRIVER = Path(__file__).with_name("llm_pruner_driver.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATHS = [str(Path(families.__file__).parent), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(PATHS),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=4)
    (folder / "text.txt").write_text(families.TEXT * 200)
    return str(folder / "model"), str(folder / "text.txt")


def run(*words, launcher=(), cwd=None):
    command = [sys.executable, *launcher, str(DRIVER), *words]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_runs_resume_to_the_same_bytes(inputs, tmp_path):
    done = run("kill", *inputs, str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert len(results) == 2 + 2 + 3
    for result in results:
        assert contents(result) == contents(tmp_path / "straight"), result.name


def test_two_ranks_prune_as_one(inputs, tmp_path):
    results = {}
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        (tmp_path / name).mkdir()
        done = run("ranks", *inputs, launcher=launcher, cwd=tmp_path / name)
        # Every rank's own word: gloo may abort a process that is only shutting down.
        count = 1 + (name == "two")
        assert done.stderr.count(f"ranks {count}, exit code 0") == count, done.stderr
        results[name] = contents(tmp_path / name)
    assert {Path(p).parts[0] for p in results["one"]} == {
        "global", "hidden", "random", "layers", "cli"
    }  # fmt: skip
    assert results["one"].keys() == results["two"].keys()
    assert [p for p, content in results["one"].items() if results["two"][p] != content] == []
