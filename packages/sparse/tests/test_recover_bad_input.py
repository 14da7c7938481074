"""What a user can get wrong: exit code 2, one line that says what to do, nothing half made."""

import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import driving
import families
from harness.blocks import decoder, sequential
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme
from sparse.recover import main

QUICK = ["--cutoff_len", "32", "--max_steps", "3"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=2)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A folder of its own, with a good model and text, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *words) -> str:
    return driving.refused(capsys, main, *words)


GOOD = ["model", "--dataset", "text.txt", *QUICK]
WORDS = {
    "model missing": (["no/such/folder", *GOOD[1:]], "model folder no/such/folder not found"),
    "dataset missing": (["model", "--dataset", "no.txt"], "'no.txt' is neither a file"),
    "dataset misspelt": (["model", "--dataset", "alpacca"], "Did you mean 'alpaca'?"),
    "questions": (["model", "--dataset", "stdlib-quiz"], "a set of questions, not a text"),
    "rate of zero": ([*GOOD, "--learning_rate", "0"], "--learning_rate 0.0: expected .* above 0"),
    "negative rate": ([*GOOD, "--learning_rate=-1e-4"], "expected a number above 0"),
    "no batch": ([*GOOD, "--batch_size", "0"], "--batch_size 0: expected a number above 0"),
    "no time": ([*GOOD, "--max_minutes", "0"], "--max_minutes 0.0: expected"),
    "patience": ([*GOOD, "--patience", "-1"], "--patience -1: expected 0 or more"),
    "dropout": ([*GOOD, "--lora_dropout", "1"], "--lora_dropout 1.0: expected 0 to below 1"),
    "weight": ([*GOOD, "--kd_weight", "1.5"], "--kd_weight 1.5: expected above 0, at most 1"),
    "window too long": ([*GOOD, "--cutoff_len", "65"], "--cutoff_len 65: expected 2 to 64 tokens"),
    "no such target": (
        [*GOOD, "--lora_target_modules", "q_proj,v_prj"],
        "v_prj: no linear of the blocks .* down_proj, gate_proj, .* Did you mean 'v_proj'",
    ),
    "float16": ([*GOOD, "--dtype", "float16"], "float16 trains on GPUs only; use --dtype bfloat16"),
    "teacher missing": ([*GOOD, "--teacher", "tiny-lama"], "Did you mean 'tiny-llama'?"),
    "teacher of others": (
        [*GOOD, "--teacher", "tiny-llama"],
        r"tiny-llama \(4096 tokens\) .*\(288 tokens\) have different tokenizers",
    ),
    "out is the model": (["model", "--dataset", "text.txt"], "out exists; choose another --out"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(case, place, capsys):
    words, message = WORDS[case]
    if case == "out is the model":
        shutil.copytree(place / "model", place / "out")
    before = {p.name for p in place.iterdir()}
    line = refused(capsys, *words)
    assert re.search(message, line), line
    assert {p.name for p in place.iterdir()} == before


def test_too_little_text(place, capsys):
    (place / "text.txt").write_text("x = 1\n")
    line = refused(capsys, *GOOD)
    message = r"text.txt, train: its \d+ tokens fill 0 windows of 32, and two are the least"
    assert re.search(message, line), line
    (place / "sums.jsonl").write_text('{"prompt": "a long enough prompt", "response": "b"}\n' * 9)
    words = ["model", "--dataset", "sums.jsonl", "--cutoff_len", "4"]
    assert "none is left: 0 have an empty response, " in refused(capsys, *words)


def test_quantized_input(place, capsys):
    def update(matrices, statistics, hand):
        return {
            name: sequential.Update(nearest(matrix, Grid(4, 16), matrix.dtype))
            for name, matrix in matrices.items()
        }

    method = sequential.Method(
        "nearest",
        {},
        [sequential.per_stage(update)],
        (),
        layout="compressed-tensors",
        scheme=Scheme(Grid(4, 16)),
    )
    sequential.compress(decoder.Decoder(place / "model"), method, place / "packed", base="model")
    line = refused(capsys, "packed", *GOOD[1:])
    assert "packed is quantized (compressed-tensors), and training would undo that" in line
    assert not (place / "out").exists()


def damage(file, value):
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_weights_with_a_nan(place, capsys):
    damage(place / "model" / "model.safetensors", float("nan"))
    line = refused(capsys, *GOOD)
    assert "holds NaN or infinite values" in line
    assert {p.name for p in place.iterdir()} == {"model", "text.txt"}


def test_training_that_diverges(place, capsys):
    line = refused(capsys, *GOOD, "--tune", "full", "--learning_rate", "1e30")
    assert "training diverged; lower the learning rate (with --no-resume)" in line
    assert not (place / "out").exists()


def test_a_teacher_with_other_words(place, capsys, monkeypatch):
    shutil.copytree(place / "model", place / "teacher")
    monkeypatch.setattr(families, "TEXT", "class Other:\n    pass\n" * 9)
    families.save_tokenizer(place / "teacher")
    assert "have different tokenizers" in refused(capsys, *GOOD, "--teacher", "teacher")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu(place, capsys):
    assert "no CUDA device here" in refused(capsys, *GOOD, "--device", "cuda")


def test_help_needs_no_torch():
    start = time.perf_counter()
    code = (
        "import sys; from sparse.recover import parser; parser(); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert time.perf_counter() - start < 5
