"""kill -9 at random moments, the same command again: the bytes of an undisturbed run."""

from pathlib import Path

import pytest

import driving
import families

RUNS = {
    "plain": ("sparsegpt", ["--prunen", "2", "--prunem", "4"]),
    "quantized": ("sparsegpt", ["--sparsity", ".5", "--wbits", "4", "--true-sequential"]),
    "owl": ("wanda", ["--sparsity", ".5", "--ratios", "owl", "--owl_m", "3"]),
    "magnitude": ("magnitude", ["--sparsity", ".5"]),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=4)
    (folder / "text.txt").write_text(families.TEXT * 200)
    return folder / "model", folder / "text.txt"


def check(inputs, folder, times, seed, run):
    method, flags = RUNS[run]
    driver = Path(__file__).with_name("sparse_resume_driver.py")
    words = [driver, method, *inputs, folder, times, seed, *flags]
    driving.killed_runs_equal_the_straight_one(folder, 2 + times + 3, *words)


def test_killed_runs_resume_to_the_same_bytes(inputs, tmp_path):
    check(inputs, tmp_path, 2, 0, "owl")


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_runs_killed_at_ten_moments(run, inputs, tmp_path):
    check(inputs, tmp_path, 10, 1, run)
