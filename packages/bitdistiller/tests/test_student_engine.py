"""The student on DeepSpeed: whole or in parts it trains alike, and what is finished is what ran."""

import importlib.util
import json
from pathlib import Path

import pytest

import driving
import families

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
DRIVER = Path(__file__).with_name("student_driver.py")


def train(folder, zero, learn, dtype="float32", launcher=()):
    out = folder / f"{zero}-{learn}-{dtype}-{len(launcher)}.json"
    done = driving.python(DRIVER, folder / "model", zero, learn, dtype, out, launcher=launcher)
    assert out.is_file(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["same"] and found["teacher"]
    assert found["losses"][-1] < found["losses"][0]
    return found["losses"]


@pytest.fixture
def folder(tmp_path):
    families.save("llama", tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=False)
    return tmp_path


def test_bfloat16_at_stage_1(folder):
    train(folder, 1, "weights", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["weights", "scales", "all"])
def test_weights_in_parts_train_alike(learn, folder):
    expected = train(folder, 0, learn)
    assert train(folder, 3, learn, launcher=driving.TWO_RANKS) == pytest.approx(expected, rel=1e-5)
