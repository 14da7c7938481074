"""Whole runs: refused ones, and in processes of their own, one thread each, killed ones and runs on
two ranks."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HERE = str(Path(__file__).parent)


def python(*words, launcher=(), cwd=None) -> subprocess.CompletedProcess:
    """This Python with ``words``; modules of this folder can be imported."""
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, *map(str, [*launcher, *words])]
    return subprocess.run(command, cwd=cwd, env=os.environ | quiet, capture_output=True, text=True)


def begun_at_once(*commands, cwd=None) -> list[tuple[int, str]]:
    """Exit code and stderr of every command line of this Python, all started at the same time."""
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=cwd, env=os.environ | quiet, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )
        for words in commands
    ]  # fmt: skip
    ended = [(process.communicate()[1], process.returncode) for process in started]
    return [(code, errors) for errors, code in ended]


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder``, or this file, by its relative path, as a hash; TensorBoard's
    events, which hold times, are left out."""
    below = [path for path in folder.rglob("*") if "tensorboard" not in path.parts]
    files = sorted(path for path in (folder, *below) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def killed_runs_equal_the_straight_one(folder: Path, count: int, *words) -> str:
    """Run a driver of kill_driver.drive on ``folder``: ``count`` results and the one begun twice.
    Returns the driver's stderr."""
    done = python(*words)
    assert done.returncode == 0, done.stderr
    assert "another run is writing" in done.stderr or "finished already" in done.stderr
    assert results_are_equal(folder) == count + 1
    return done.stderr


def results_are_equal(folder: Path) -> int:
    """How many results are in ``folder``: nothing else is, and all have the bytes of the one that
    nobody disturbed."""
    results = list(folder.iterdir())
    (straight,) = (contents(path) for path in results if path.stem == "straight")
    for result in results:
        assert list(contents(result).values()) == list(straight.values()), result.name
    return len(results)


def two_ranks_equal_one(folder: Path, *words) -> set[str]:
    """Run a driver alone and on two gloo ranks, in a folder each: equal bytes. The driver says
    "ranks N, exit code 0" on stderr. Returns the names of what it made."""
    made = {}
    for name, launcher in (("one", ()), ("two", TWO_RANKS)):
        (folder / name).mkdir()
        done = python(*words, launcher=launcher, cwd=folder / name)
        # Every rank's own word, not the launcher's exit code: gloo has been seen to abort a process
        # that had left the group and was only shutting down (once in some thirty runs).
        assert launcher or done.returncode == 0, done.stderr
        ranks = 2 if launcher else 1
        assert done.stderr.count(f"ranks {ranks}, exit code 0") == ranks, done.stderr
        made[name] = contents(folder / name)
    assert made["one"] == made["two"]
    return {Path(path).parts[0] for path in made["one"]}


def refused(capsys, main, *words, code: int = 2) -> str:
    """``main(words)`` with --out out ends with ``code`` and says nothing but one error line: this
    line."""
    capsys.readouterr()
    assert main([*words, "--out", "out"]) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error:") for line in lines) == 1
    assert "Traceback" not in captured.err and captured.out == ""
    return lines[-1]
