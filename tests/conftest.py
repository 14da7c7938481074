"""What the tests of the whole house share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_python():
    """Run this Python with the given words from an unrelated folder; returns its stdout."""
    return lambda *words, **more: _run([sys.executable, *words], **more)


@pytest.fixture
def run_recipe():
    """Run recipes/NAME with the given words and variables from the root; returns its stdout."""

    def run(name: str, *words: str, **variables: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, **variables, "PATH": path}
        return _run(["bash", str(ROOT / "recipes" / name), *map(str, words)], env=env)

    return run


def _run(words: list[str], **more) -> str:
    done = subprocess.run(words, capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
