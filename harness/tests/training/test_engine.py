"""The DeepSpeed engine: batches may be cut in any way, over ranks too; states resume exactly."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.training.engine import Training, rate

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder, name, zero, accumulate, mode="straight", launcher=()):
    out = folder / f"{name}.json"
    words = [Path(__file__).with_name("engine_driver.py"), out, zero, accumulate, mode]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert out.is_file(), done.stderr[-3000:]
    return json.loads(out.read_text())


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_and_accumulation_change_nothing_and_states_resume_exactly(zero, tmp_path):
    """Losses within 1e-6: float32 sums in another order."""
    one = run(tmp_path, "one", zero, 4)
    assert len({row["loss"] for row in one["rows"]}) == 8 and one["sizes"] > 10_000
    resumed = run(tmp_path, "one", zero, 4, mode="resume")
    assert resumed["rows"] == one["rows"][4:] and resumed["weights"] == one["weights"]
    two = run(tmp_path, "two", zero, 2, launcher=TWO_RANKS)
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert other["logits"] == pytest.approx(row["logits"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-6)


def test_the_rate_warms_up_and_falls():
    cosine = Training(1e-3, 100, warmup=10, min_rate=1e-4)
    assert rate(cosine, 0) == pytest.approx(0.1) and rate(cosine, 9) == 1
    assert rate(cosine, 55) == pytest.approx(0.55) and rate(cosine, 100) == pytest.approx(0.1)
    constant = Training(1e-3, 100, warmup=10, schedule="constant")
    assert rate(constant, 4) == pytest.approx(0.5) and rate(constant, 99) == 1


def test_the_linear_rate_is_the_usual_one():
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    usual = get_linear_schedule_with_warmup(optimizer, 10, 100)
    linear = Training(1e-3, 100, warmup=10, schedule="linear")
    for step in range(100):
        # Ours spends no step at rate zero: it is the usual one, a step ahead while it rises.
        ahead = 0.1 if step < 10 else 0.0
        assert rate(linear, step) == pytest.approx(usual.get_last_lr()[0] + ahead)
        optimizer.step()
        usual.step()


def test_the_rate_follows_the_clock_where_time_is_short():
    timed = Training(1e-3, 10_000, minutes=1, warmup=100, schedule="linear")
    rates = [rate(timed, 3 * second, second / 60) for second in range(60)]
    assert max(rates) == 1 and rates.index(1) == 6 and rates[3] == pytest.approx(0.5)
    assert rates[33] == pytest.approx(0.5) and rates[59] < 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0}, "learning rate 0"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"schedule": "steps"}, "expected cosine or linear or constant"),
        ({"minutes": 0.0}, "0.0 minutes: expected a number above 0"),
        ({"zero": 4}, "ZeRO stage 4"),
        ({"accumulate": 0}, "accumulate 0: at least 1"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        Training(**{"learning_rate": 1e-3, "steps": 10, **wrong})
