"""Packing a result: the same logits from every format, and folders that cannot be packed."""

import copy

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_student import logits, stored
from transformers import AutoModelForCausalLM

import families
from bitdistiller import export, result, student
from harness import paths
from harness.checkpoint import load
from harness.checkpoint.weights import Weights
from harness.quant.grid import Grid
from harness.quant.normal_float import NormalFloat

# 128 inputs in the widest linear, and sizes that fill the words of the gptq format at 3 bits.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def make(folder, grid, dtype=torch.bfloat16, family="llama", learn="weights", **sizes):
    """A result folder and the logits of the student that became it."""
    families.save(family, folder / "dense", dtype=dtype, **(sizes or SIZES))
    built = student.build(AutoModelForCausalLM.from_pretrained(folder / "dense"), grid, learn=learn)
    expected = logits(built)
    stored(built, folder / "dense", folder / "result")
    return folder / "result", expected


def run(*words):
    return export.main([str(word) for word in words])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, size", [(2, 128), (2, 64), (2, 32), (2, -1), (3, 64), (4, -1)])
def test_packed_logits_are_those_of_the_student(bits, size, dtype, tmp_path, capsys):
    folder, expected = make(tmp_path, Grid(bits, size), dtype)
    assert run(folder, "--out", tmp_path / "out") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(load.load_model(tmp_path / "out", dtype=dtype)), expected)
    assert Weights(tmp_path / "out").layout == "compressed-tensors"
    printed = capsys.readouterr().out
    assert ("vLLM" in printed) == (bits == 4) and "transformers" in printed
    steps = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"]
    assert [step["method"] for step in steps] == ["test", "export"]
    # The dense model, as the result's own log names it.
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nbase_model: x\n")


@pytest.mark.parametrize("bits, size", [(2, 64), (3, 128)])
def test_gptq_and_dense(bits, size, tmp_path):
    folder, expected = make(tmp_path, Grid(bits, size))
    for layout in ("gptq", "dense"):
        assert run(folder, "--format", layout, "--out", tmp_path / f"as-{layout}") == 0
        model = load.load_model(tmp_path / f"as-{layout}", dtype=torch.bfloat16)
        assert torch.equal(logits(model), expected)
    assert Weights(tmp_path / "as-gptq").layout == "gptq"


def test_conv1d(tmp_path):
    folder, expected = make(tmp_path, Grid(3, 16), torch.float32, "gpt2", n_layer=2)
    assert run(folder, "--out", tmp_path / "out") == 0
    assert torch.equal(logits(load.load_model(tmp_path / "out")), expected)


def test_normal_float_stays_dense(tmp_path, capsys):
    folder, expected = make(tmp_path, NormalFloat(3, 32))
    assert run(folder, "--out", tmp_path / "out") == 2
    assert "--format dense" in capsys.readouterr().err
    assert run(folder, "--format", "dense", "--out", tmp_path / "out") == 0
    loaded = load.load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), expected)


def test_refusals(tmp_path, capsys):
    folder, _ = make(tmp_path, Grid(2, 32), torch.float32)

    def refused(*words):
        assert run(*words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "out").exists()
        return lines[-1]

    out = ("--out", tmp_path / "out")
    assert "compressed-tensors" in refused(folder, "--format", "gptq", *out)
    assert "bitdistiller.train" in refused(tmp_path / "dense", *out)
    assert "is no folder" in refused(tmp_path / "nothing", *out)
    assert "the model itself" in refused(folder, "--out", folder)
    assert run(folder, "--dry-run", *out) == 0 and not (tmp_path / "out").exists()
    grids = load_file(folder / result.FILE)
    changed = copy.deepcopy(grids)
    changed["model.layers.1.mlp.up_proj.zero"][3] += 1
    note = {result.NOTE: result.note(Grid(2, 32))}
    paths.save_tensors(folder / result.FILE, changed, note)
    assert "changed after training" in refused(folder, *out)
    del changed["model.layers.1.mlp.up_proj.scale"]
    paths.save_tensors(folder / result.FILE, changed, note)
    assert "lacks model.layers.1.mlp.up_proj" in refused(folder, *out)
    paths.save_tensors(folder / result.FILE, grids, {"other": "x"})
    assert "damaged or not of this program" in refused(folder, *out)
