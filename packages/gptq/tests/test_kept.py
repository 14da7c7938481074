"""What GPTQ must not lose: a pruned model's zeros, very small weights, linears named to stay."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import driving
import families
from gptq.cli import main
from gptq.method import _exact_norms, _output_norms
from harness.blocks.decoder import Decoder
from harness.modules import linears

QUICK = ["--nsamples", "8", "--seqlen", "32", "--dtype", "float32", "--groupsize", "16"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=2)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(edit):
    tensors = load_file("model/model.safetensors")
    edit(tensors)
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})


def prune(tensors):
    """2:4 by magnitude."""
    for name, tensor in tensors.items():
        if "_proj" in name:
            groups = tensor.unflatten(1, (-1, 4))
            smallest = groups.abs().topk(2, dim=2, largest=False).indices
            groups.scatter_(2, smallest, 0)


def errors(out):
    return [
        row["error"] for row in json.loads((out / "compression_log.json").read_text())["layers"]
    ]


@pytest.mark.parametrize("words", [["--sym"], ["--act-order"], ["--mse", "--format", "dense"]])
def test_a_pruned_model_stays_pruned(place, words):
    change(prune)
    assert main(["model", "text.txt", *QUICK, *words, "--out", "out"]) == 0
    decoder = Decoder(place / "out")
    broken = 0
    for index, block in enumerate(decoder.blocks):
        for name in linears(block):
            weight = decoder.stored(f"{decoder.prefix}.{index}.{name}.weight")
            broken += int(((weight.unflatten(1, (-1, 4)) == 0).sum(2) < 2).sum())
    assert broken == 0


def test_scales_that_float16_does_not_hold_are_refused(place, capsys):
    """They were stored as zeros, and the matrix with them, without a word."""
    name = "model.layers.1.mlp.up_proj.weight"
    change(lambda tensors: tensors.update({name: tensors[name] * 1e-6}))
    words = ["model", "--nearest", "--sym", "--groupsize", "16", "--out", "out"]
    line = driving.refused(capsys, main, *words, "--format", "gptq")
    assert "mlp.up_proj needs scales from" in line and "--format compressed-tensors" in line
    assert not (place / "out").exists()
    assert main(words) == 0


def test_the_errors_denominator_sees_an_outlier_row():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 24, generator=draw)
    weight[777] *= 1000
    x = torch.randn(64, 24, generator=draw)
    hessian = x.T @ x / 64
    exact = _exact_norms(weight, hessian).mean()
    assert _output_norms(weight, hessian).mean() == pytest.approx(exact.item(), rel=1e-3)


def test_one_odd_linear_can_be_left_out(place, capsys):
    """100 columns at group 16 (Mamba's dt_proj) refused the whole model."""
    shutil.rmtree("model")
    families.save("llama", "model", tokenizer=True, num_hidden_layers=2, intermediate_size=100)
    line = driving.refused(capsys, main, "model", "text.txt", *QUICK)
    assert "mlp.down_proj (100)" in line and "--ignore down_proj" in line
    assert main(["model", "text.txt", *QUICK, "--ignore", "down_proj", "--out", "out"]) == 0
    config = json.loads((place / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {
        "lm_head",
        *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1)),
    }
    line = driving.refused(
        capsys, main, "model", "text.txt", *QUICK, "--ignore", "down", "--out", "x"
    )
    assert "--ignore down: no linear" in line
    shutil.rmtree("model")
    families.save("llama", "model", tokenizer=True, num_hidden_layers=2, hidden_size=64)
    words = ["model", "text.txt", *QUICK, "--ignore", "o_proj", "--format", "gptq", "--out", "x"]
    assert "has no place for the names of linears" in driving.refused(capsys, main, *words)


def test_a_few_rows_that_are_all_but_zero_are_no_reason_to_refuse(place):
    name = "model.layers.1.mlp.up_proj.weight"

    def shrink(tensors):
        tensors[name][:3] *= 1e-5

    shutil.rmtree("model")
    families.save("llama", "model", tokenizer=True, num_hidden_layers=2, hidden_size=64)
    change(shrink)
    words = ["model", "--nearest", "--sym", "--groupsize", "16", "--format", "gptq", "--out", "out"]
    assert main(words) == 0


def test_a_float16_model_is_held_to_the_same(place, capsys):
    shutil.rmtree("model")
    families.save("llama", "model", tokenizer=True, num_hidden_layers=2, dtype=torch.float16)
    name = "model.layers.1.mlp.up_proj.weight"
    change(lambda tensors: tensors.update({name: tensors[name] * 1e-4}))
    line = driving.refused(capsys, main, "model", "--nearest", "--groupsize", "16", "--out", "out")
    assert "mlp.up_proj needs scales from" in line


def test_a_result_that_is_there_is_evaluated_all_the_same(place, capsys):
    words = ["model", "--nearest", "--groupsize", "16", "--out", "out", "--seqlen", "16"]
    words += ["--eval", "text.txt"]
    said = []
    for _ in range(2):
        assert main(words) == 0
        said.append(capsys.readouterr())
    assert "finished already" in said[1].err
    assert said[1].out == said[0].out.splitlines(keepends=True)[-1]
    assert "text.txt: token perplexity" in said[1].out
