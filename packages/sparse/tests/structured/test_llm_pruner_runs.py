"""Killed runs end with the bytes of an undisturbed one, and two ranks with those of one."""

from pathlib import Path

import pytest

import driving
import families

DRIVER = Path(__file__).with_name("llm_pruner_driver.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=4)
    (folder / "text.txt").write_text(families.TEXT * 200)
    return str(folder / "model"), str(folder / "text.txt")


def test_killed_runs_resume_to_the_same_bytes(inputs, tmp_path):
    driving.killed_runs_equal_the_straight_one(
        tmp_path, 2 + 2 + 3, DRIVER, "kill", *inputs, tmp_path
    )


def test_two_ranks_prune_as_one(inputs, tmp_path):
    made = driving.two_ranks_equal_one(tmp_path, DRIVER, "ranks", *inputs)
    assert made == {"global", "hidden", "random", "layers", "cli"}
