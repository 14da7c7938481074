"""One run at a time on one place, whole results, and nothing of the base's files lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from harness import cli
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.checkpoint import load, runs, save, side_files
from harness.errors import UserError
from harness.training import states

HOLD = """
import sys, time
from pathlib import Path
from harness.checkpoint.runs import RunFolder
RunFolder(Path(sys.argv[1])).hold()
print("held", flush=True)
time.sleep(60)
"""


def keep(matrices, statistics, hand):
    return {name: sequential.Update(matrix) for name, matrix in matrices.items()}


def compress(source, out, update=keep, **more):
    method = sequential.Method("keep", {}, [sequential.per_stage(update)], ())
    return sequential.compress(Decoder(source), method, out, base="m", **more)


@pytest.fixture
def model(tmp_path):
    families.save("llama", tmp_path / "model", tokenizer=True, num_hidden_layers=3)
    return tmp_path / "model"


def test_a_second_run_on_one_place_ends_in_one_line(model, tmp_path, capsys):
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for begin in (
        lambda: compress(model, out),
        lambda: save.save_model(families.build("llama"), model, out, base="m", step={}),
    ):
        with pytest.raises(UserError, match=r"another run is writing .*out; wait for its end"):
            begin()
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    results = tmp_path / "results.json"
    with pytest.raises(UserError, match="another run is writing"):
        runs.RunFolder(out).hold()
    os.kill(holder.pid, signal.SIGKILL)  # the kernel gives the place back
    holder.wait()
    (tmp_path / "text.txt").write_text(families.TEXT * 40)
    words = ["eval", str(model), "--ppl", str(tmp_path / "text.txt"), "--out", str(results)]
    compress(model, out)
    assert not list(tmp_path.glob("*.lock"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, results], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert cli.main(words) == 2
    assert f"another run is writing {results}" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert cli.main(words) == 0 and not list(tmp_path.glob("*.lock"))


def test_double_starts_leave_one_result(tmp_path):
    """Two processes begun together: the second is refused, or begins after the first's end and is
    told that the result exists. Never a mixture, never a traceback."""
    families.save("llama", tmp_path / "model", tokenizer=True, num_hidden_layers=5)
    words = [sys.executable, "-m", "harness", "convert", "model", "--out", "out", "--format"]
    for path in (tmp_path / "model").glob("*.safetensors"):  # enough zeros for a bitmask
        tensors = {n: t * (t > 0) if t.ndim > 1 else t for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    both = [
        subprocess.Popen([*words, layout], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for layout in ("bitmask", "dense")
    ]
    said = [run.communicate(timeout=100)[1] for run in both]
    codes = sorted(run.returncode for run in both)
    assert codes == [0, 2] and not any("Traceback" in text for text in said), said
    loser = said[[run.returncode for run in both].index(2)]
    assert "another run is writing" in loser or "out exists" in loser
    kinds = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config")
    packed = [n for p in (tmp_path / "out").glob("*.safetensors") for n in load_file(p)]
    assert any(n.endswith("bitmask") for n in packed) == bool(kinds)


@pytest.mark.parametrize("damage", ["empty", "cut", "state"])
def test_what_is_resumed_is_checked(model, tmp_path, damage):
    """A name without its bytes, as a loss of power leaves it, is no finished block."""
    out = tmp_path / "out"

    def stops(matrices, statistics, hand):
        if hand.index == 2:
            raise KeyboardInterrupt
        return keep(matrices, statistics, hand)

    with pytest.raises(KeyboardInterrupt):
        compress(model, out, stops)
    shard = tmp_path / "out.partial" / "model-00002-of-00004.safetensors"
    if damage == "state":
        (tmp_path / "out.partial.json").write_bytes(b'{"settings": ')
    else:
        shard.write_bytes(b"" if damage == "empty" else shard.read_bytes()[:-3])
    if damage == "state":
        with pytest.raises(UserError, match="Start afresh with --no-resume"):
            compress(model, out)
    compress(model, out, resume=damage != "state")
    compress(model, tmp_path / "straight")
    for path in (tmp_path / "straight").iterdir():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == (out / path.name).read_bytes()


def test_what_is_published_was_synced(model, tmp_path, monkeypatch):
    """Every file of a result, and the folder of its name, before and after the last rename."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}"))
        or fsync(handle)
    )  # fmt: skip
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(f"-> {b}") or replace(a, b))
    compress(model, tmp_path / "out")
    last = max(i for i, event in enumerate(events) if event == f"-> {tmp_path / 'out'}")
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path / "out.partial" / path.name) in events[:last], path
    assert str(tmp_path) in events[last:]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "expected the name of something new"),
        ("..", "expected the name of something new"),
        ("/", "expected the name of something new"),
        ("x" * 250, "has 250 bytes"),
        ("loop/out", "is a link to nothing"),
        ("gone", "is a link to nothing"),
        ("pipe", "no regular file or folder"),
        ("file/out", "is a file, no folder"),
        ("model", "is the model itself"),
        ("alias", "is the model itself"),
    ],
)
def test_places_that_cannot_be(model, tmp_path, monkeypatch, capsys, out, message):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("gone").symlink_to("nowhere")
    Path("alias").symlink_to("model")
    Path("file").write_text("")
    os.mkfifo("pipe")
    before = sorted(p.name for p in tmp_path.iterdir())
    started = time.perf_counter()
    assert cli.main(["convert", "model", "--format", "dense", "--out", out]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, line), line
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert time.perf_counter() - started < 20


SIDE = {
    "generation_config.json": b'{"do_sample": false, "temperature": 0.9}',
    "preprocessor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "LICENSE.txt": b"as is",
    "Notice": b"thanks",
    "USE_POLICY.md": b"be kind",
}


@pytest.mark.parametrize("way", ["pass", "save"])
def test_the_bases_files_go_with_every_result(model, tmp_path, way):
    """Byte for byte, those too that transformers refuses to save (Llama-2-chat's settings)."""
    for name, content in SIDE.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
    out = tmp_path / "out"
    if way == "pass":
        compress(model, out)
    else:
        step = {"method": "m", "base": "m", "command": "c", "settings": {}}
        save.save_model(load.load_model(model), model, out, base="m", step=step)
    for name, content in SIDE.items():
        assert (out / name).read_bytes() == content, name
    load.load_model(out)
    (model / "NOTICE").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="is a link to"):
        side_files.copy(model, out)


def test_a_trained_model_keeps_what_it_has_no_place_for(model, tmp_path):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(48, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    step = {"method": "m", "base": "m", "command": "c", "settings": {}}
    save.save_model(load.load_model(model), model, tmp_path / "out", base="m", step=step)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("mode", "message"), [(0o777, "may be written by others"), (0, "is a link")]
)
def test_states_are_read_from_ones_own_folder_only(tmp_path, mode, message):
    """DeepSpeed's are pickles."""
    folder = tmp_path / "out.partial" / "states"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"tag": "step-1"}')
    if mode:
        folder.chmod(mode)
    else:
        (folder / "step-1").symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{message}.*runs code when it is read"):
        states.load(None, folder)
