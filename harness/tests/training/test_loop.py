"""The training loop: what it writes, what it keeps of a killed run, and when it stops."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainer_driver
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import driving
import families
from harness.checkpoint import runs
from harness.errors import UserError
from harness.training import engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def save(folder, dtype=torch.float32, dropout=0.2):
    # Dropout: its random numbers must be those of the undisturbed run.
    changes = {"num_hidden_layers": 2, "attention_dropout": dropout}
    families.save("llama", folder, tokenizer=True, dtype=dtype, **changes)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source") / "model")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def log(folder):
    return json.loads((folder / "compression_log.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stopped_run_goes_on_to_the_same_bytes(dtype, tmp_path, capsys):
    source = save(tmp_path / "source", dtype)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert trainer_driver.main(source, straight) == 0
    assert trainer_driver.main(source, stopped, fate="stop", at=1) == 130
    assert trainer_driver.main(source, stopped, fate="stop", at=11) == 130
    state = json.loads((tmp_path / "stopped.partial" / "states" / "state.json").read_text())
    # Every second step, where the boundary (every third) lets one.
    assert state["progress"]["step"] == 9
    capsys.readouterr()
    assert trainer_driver.main(source, stopped) == 0
    assert "resuming: 9 steps are done" in capsys.readouterr().err
    assert contents(stopped) == contents(straight)
    assert [row["step"] for row in log(stopped)["looks"]] == [0, 5, 10, 12]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "stopped", "straight"]
    AutoModelForCausalLM.from_pretrained(stopped)


def test_patience_ends_a_run_and_time_does(source, tmp_path):
    values = [5.0, 4.0, 3.0, 3.5, 3.2, 9.0, 9.0, 9.0]

    def evaluate(running, step):
        return {"value": values[step // 2]}

    how = {"evaluate": evaluate, "eval_steps": 2}
    assert trainer_driver.main(source, tmp_path / "patient", patience=3, **how) == 0
    patient = log(tmp_path / "patient")
    assert [row["step"] for row in patient["looks"]] == [0, 2, 4, 6, 8, 10]
    assert patient["written"] == {"step": 4}
    assert trainer_driver.main(source, tmp_path / "timed", minutes=1e-9, eval_steps=None) == 0
    assert [row["step"] for row in log(tmp_path / "timed")["looks"]] == [0]


def test_looks_are_ten_where_nothing_is_said(source, tmp_path):
    assert trainer_driver.main(source, tmp_path / "out", eval_steps=None) == 0
    steps = [row["step"] for row in log(tmp_path / "out")["looks"]]
    assert steps == [0, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]


def test_the_best_weights_are_written_and_their_value_is_theirs(source, tmp_path):
    values = {0: 3.0, 4: 9.0, 8: 2.0, 12: 5.0}
    looked = {}

    def evaluate(running, step):
        looked[step] = [p.detach().clone() for p in running.module.parameters()]
        return {"value": values[step], "other": 1.0}

    for better, step in (("lower", 8), ("higher", 4)):
        out = tmp_path / better
        code = trainer_driver.main(source, out, evaluate=evaluate, better=better, eval_steps=4)
        assert code == 0 and log(out)["written"] == {"step": step}
        written = AutoModelForCausalLM.from_pretrained(out).parameters()
        assert all(map(torch.equal, written, looked[step]))
        assert "value" not in log(out)["looks"][0]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_float32_training_of_a_bfloat16_checkpoint_looks_at_what_it_will_store(zero, tmp_path):
    source = save(tmp_path / "source", torch.bfloat16, dropout=0.0)
    looked = {}

    def evaluate(running, step):
        with engine.whole_weights(running.module) as module:
            looked[step] = {n: p.detach().clone() for n, p in module.named_parameters()}
        return {"value": float(-step)}

    more = {"zero": zero, "dtype": "float32", "eval_steps": 4}
    assert trainer_driver.main(source, tmp_path / "looked", evaluate=evaluate, **more) == 0
    assert trainer_driver.main(source, tmp_path / "plain", evaluate=None, **more) == 0
    written, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("looked", "plain"))
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), looked[12][name])
        # A look changes nothing of the training: the last weights are those of a run without.
        assert torch.equal(tensor, plain[name])
    assert all(torch.equal(t, t.bfloat16().float()) for t in looked[8].values())
    assert log(tmp_path / "looked")["dtype"] == {"computed": "float32", "stored": "bfloat16"}


def test_events_of_tensorboard_have_every_step_once(source, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    out = tmp_path / "out"
    assert trainer_driver.main(source, out, fate="stop", at=8) == 130
    assert trainer_driver.main(source, out) == 0
    events = event_accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))
    assert [e.step for e in events.Scalars("eval/value")] == [5, 10, 12]


def test_a_loss_that_is_no_number_stops_and_leaves_its_batch(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert trainer_driver.main(source, out, fate="nan", at=7) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: the loss of step 7 is nan: training diverged; lower the")
    saved = load_file(tmp_path / "out.failed-step7-rank0.safetensors")
    both = torch.cat([saved["0.ids"], saved["1.ids"]])
    assert torch.equal(both, trainer_driver.windows(7))
    note = json.loads((tmp_path / "out.failed-step7-rank0.json").read_text())
    assert note["step"] == 7 and note["batches"][0]["tokens"] == 60
    assert not out.exists()


def test_no_more_of_the_best_are_kept_than_a_run_can_go_on_from(source, tmp_path):
    """Those of the last state, and the newest."""
    seen = []

    def evaluate(running, step):
        seen.append(len(list((tmp_path / "out.partial").glob("best-*"))))
        return {"value": float(-step)}

    more = {"evaluate": evaluate, "eval_steps": 1, "save_steps": 6, "boundary": None}
    assert trainer_driver.main(source, tmp_path / "out", **more) == 0
    assert max(seen) == 2 and log(tmp_path / "out")["written"] == {"step": 12}


FULL = "[enforce fail at inline_container.cc:672] . unexpected pos 6720 vs 6612"


@pytest.mark.parametrize("error", [RuntimeError(FULL), OSError(28, "No space left on device")])
def test_a_full_disk_is_told_and_the_state_before_is_kept(
    source, tmp_path, monkeypatch, capsys, error
):
    out, states = tmp_path / "out", tmp_path / "out.partial" / "states"
    real = trainer_driver.engine.start

    def start(*args):
        running = real(*args)
        save = running.save_checkpoint

        def full(folder, tag, **more):
            if tag == "step-6":
                (states / tag).mkdir()
                (states / tag / "half").touch()
                raise error
            save(folder, tag=tag, **more)

        monkeypatch.setattr(running, "save_checkpoint", full)
        return running

    with monkeypatch.context() as patch:
        patch.setattr(trainer_driver.engine, "start", start)
        assert trainer_driver.main(source, out) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: the disk is full at {states.parent}")
    assert sorted(path.name for path in states.iterdir()) == ["state.json", "step-3"]
    assert trainer_driver.main(source, out) == 0
    assert "resuming: 3 steps are done" in capsys.readouterr().err


def test_another_run_there_is_refused_by_name(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert trainer_driver.main(source, out, fate="stop", at=11) == 130
    assert trainer_driver.main(source, out, zero=1) == 2
    assert "begun by another run (settings, zero: 0 there, 1 now)" in capsys.readouterr().err
    assert trainer_driver.main(source, out, zero=1, resume=False) == 0
    assert trainer_driver.main(source, out, zero=1) == 0
    assert f"{out} is finished already." in capsys.readouterr().err
    assert trainer_driver.main(source, out) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_run_killed_after_its_last_rename_is_finished(source, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", runs.RunFolder.forget

    def killed(run):
        if out.exists():
            raise KeyboardInterrupt
        real(run)

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "forget", killed)
        assert trainer_driver.main(source, out) == 130
    assert (tmp_path / "out.partial" / "states").is_dir()
    assert trainer_driver.main(source, out) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"{out} is finished already."
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_value_that_is_no_number_stops(source, tmp_path, capsys):
    code = trainer_driver.main(
        source, tmp_path / "out", evaluate=lambda running, step: {"value": float("inf")}
    )
    assert code == 2 and "after 0 steps; the model's weights are" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert issubclass(trainer_driver.engine.Diverged, UserError)


def test_bfloat16_weights_go_the_way_of_float32(tmp_path, capsys):
    """Masters and accumulated gradients are float32: what is left is the rounding of the result,
    and of gradients that are nearly zero."""
    source = save(tmp_path / "source", torch.bfloat16, dropout=0.0)
    start = load_file(source / "model.safetensors")
    found = {}
    for name, accumulate in (("float32", 1), ("bfloat16", 1), ("bfloat16", 8)):
        out = tmp_path / f"{name}{accumulate}"
        assert trainer_driver.main(source, out, accumulate=accumulate, dtype=name) == 0
        ended = load_file(out / "model.safetensors")
        way = [(ended[key].float() - start[key].float()).flatten() for key in start]
        found[name, accumulate] = torch.cat(way)
    expected = found.pop(("float32", 1))
    apart = [((way - expected).norm() / expected.norm()).item() for way in found.values()]
    assert max(apart) < 0.15, apart
    assert capsys.readouterr().out == ""  # DeepSpeed's talk is no result


@pytest.mark.slow
def test_a_killed_run_on_two_ranks_goes_on(tmp_path):
    """ZeRO 2: what each rank holds of the optimizer is taken up again; losses as on one rank."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

    def launch(*words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", trainer_driver.__file__, source, *words]
        return subprocess.run(
            list(map(str, command)),
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    source = save(tmp_path / "source", dropout=0.0)
    assert trainer_driver.main(source, tmp_path / "one", 0, 4) == 0
    assert launch(tmp_path / "two", 2, 2, "kill", 8).returncode
    done = launch(tmp_path / "two", 2, 2)
    assert done.returncode == 0 and "resuming: 6 steps are done" in done.stderr, done.stderr
    for one, two in zip(*(log(tmp_path / n)["looks"] for n in ("one", "two")), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


FAULTS = {
    "a state cut": ("states/step-9/mp_rank_00_model_states.pt", "cut", "damaged"),
    "the best cut": ("best-5.safetensors", "cut", "damaged"),
    "the note cut": ("states/state.json", "cut", "cannot be read"),
    "the file's mode": (
        "states/step-9/mp_rank_00_model_states.pt",
        0o666,
        "may be written by others",
    ),
    "the folder's mode": ("states/step-9", 0o777, "may be written by others"),
    "the run's mode": ("", 0o775, "may be written by others"),
    "a link": ("states/step-9", "link", "is a link"),
    "one more file": ("states/step-9/other.pt", "new", "damaged"),
}


@pytest.fixture(scope="module")
def stopped(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    assert trainer_driver.main(source, folder / "out", fate="stop", at=11) == 130
    return folder


@pytest.mark.parametrize(("name", "what", "end"), FAULTS.values(), ids=FAULTS)
def test_states_are_read_as_they_were_saved_and_by_whom(
    name, what, end, source, stopped, tmp_path, capsys
):
    place = tmp_path / "place"
    shutil.copytree(stopped, place)
    partial = place / "out.partial"
    path = next(iter(partial.glob(name)), partial / name) if name else partial
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif what == "new":
        path.write_bytes(b"x")
    elif what == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.chmod(what)
    before = contents(place)
    assert trainer_driver.main(source, place / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert end in error and "--no-resume" in error
    assert contents(place) == before


def test_a_loose_umask_leaves_states_that_are_resumed(source, tmp_path):
    before = os.umask(0)
    try:
        assert trainer_driver.main(source, tmp_path / "out", fate="stop", at=11) == 130
        assert trainer_driver.main(source, tmp_path / "out") == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o666


def test_of_two_runs_with_one_name_one_is_refused(source, tmp_path):
    command = [trainer_driver.__file__, source, tmp_path / "out"]
    ended = driving.begun_at_once([*command, 0], [*command, 1])  # ZeRO: another run
    assert sorted(code for code, _ in ended) == [0, 2], ended
    line = next(errors for code, errors in ended if code).splitlines()[-1]
    there = f"error: {tmp_path / 'out'}"
    assert line.startswith((f"error: another run is writing {tmp_path / 'out'}", f"{there} exists"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
