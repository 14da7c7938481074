"""The student: what it computes, what it trains, what it refuses, and the folder it becomes."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from bitdistiller import result, student
from harness.checkpoint import save
from harness.errors import UserError
from harness.modules import block_linears, find_blocks, get_matrix, set_matrix
from harness.quant import fake_quant, normal_float
from harness.quant.grid import Grid, nearest
from harness.quant.normal_float import NormalFloat

GRID = Grid(2, 16)
IDS = families.windows(2, 12)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def make_ranges(model, grid=GRID):
    """Clip ranges that cut every group at both ends, in the model's dtype."""
    ranges = {}
    for name, module in block_linears(*find_blocks(model)).items():
        matrix = get_matrix(module)
        groups = matrix.unflatten(1, (-1, grid.columns_per_group(matrix.shape[1])))
        ranges[name] = 0.7 * groups.amin(2), 0.8 * groups.amax(2)
    return ranges


def rounded(model, ranges, grid=GRID):
    """A plain model whose linears hold the nearest values of the clamped weights."""
    model = copy.deepcopy(model)
    for name, module in block_linears(*find_blocks(model)).items():
        matrix = get_matrix(module)
        low, high = (t.repeat_interleave(matrix.shape[1] // t.shape[1], 1) for t in ranges[name])
        clamped = matrix.clamp(low, high)
        set_matrix(module, nearest(clamped.float(), grid, model.dtype).dequantize(model.dtype))
    return model


def stored(model, source, folder):
    """``model`` finished and written as a result folder."""
    plain, tensors, metadata = result.finish(model)
    step = {"method": "test", "base": "x", "command": "", "settings": {}, "calibration": None}
    side = {result.FILE: (tensors, metadata)}
    save.save_model(plain, source, folder, base="x", step=step, side=side)
    # Without it vLLM would take every safetensors file of the folder for weights.
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "opt"])
@pytest.mark.parametrize("learn", student.LEARN)
def test_student_is_the_rounded_model(family, learn, dtype):
    model = families.build(family, dtype=dtype)
    ranges = make_ranges(model)
    expected = logits(rounded(model, ranges))
    built = student.build(model, GRID, ranges=ranges, learn=learn)
    assert torch.equal(logits(built), expected)


@pytest.mark.parametrize("learn", student.LEARN)
def test_what_is_trained(learn):
    names = set(families.build("opt").state_dict())
    built = student.build(families.build("opt"), GRID, learn=learn)
    trained = {n for n, p in built.named_parameters() if p.requires_grad}
    linears = {n for n, m in built.named_modules() if isinstance(m, fake_quant.FakeQuantLinear)}
    scales = {f"{n}.scale" for n in linears} if learn != "weights" else set()
    zeros = {f"{n}.zero" for n in linears} if learn == "all" else set()
    assert trained - names == scales | zeros
    plain = trained & names
    assert all("embed" not in n and "lm_head" not in n and "project" not in n for n in plain)
    if learn == "scales":
        assert not plain
    else:
        assert {f"{n}.weight" for n in linears} <= plain
        assert {f"{n}.bias" for n in linears} <= plain
        assert any("layer_norm" in n for n in plain)
        assert names <= set(built.state_dict())


@pytest.mark.parametrize("learn", student.LEARN)
def test_gradients_reach_what_is_trained_through_checkpointing(learn):
    gradients = []
    for checkpointing in (False, True):
        built = student.build(families.build("llama"), GRID, learn=learn).train()
        if checkpointing:
            built.gradient_checkpointing_enable()
        built(IDS, labels=IDS).loss.backward()
        trained = {n: p.grad for n, p in built.named_parameters() if p.requires_grad}
        # Zero points have one where values clamp, which on the first step few do.
        assert trained and all(g.abs().max() > 0 or "zero" in n for n, g in trained.items())
        gradients.append(trained)
    plain, again = gradients
    assert all(torch.allclose(plain[n], again[n], atol=1e-7) for n in plain)


def test_scales_alone_have_the_gradient_of_their_sum():
    built = student.build(families.build("llama"), GRID, learn="scales")
    linear = built.model.layers[0].mlp.up_proj
    gradient = torch.randn(48, 32)
    linear.value().backward(gradient)
    steps = linear.codes.float() - linear.zero.float().repeat_interleave(16, 1)
    assert torch.allclose(linear.scale.grad, (steps * gradient).unflatten(1, (2, 16)).sum(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("learn", student.LEARN)
def test_what_is_saved_is_what_was_trained(family, learn, dtype, tmp_path):
    families.save(family, tmp_path / "dense", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    built = student.build(model, GRID, learn=learn)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    expected = logits(built)
    folder = stored(built, tmp_path / "dense", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype and torch.equal(logits(loaded), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for begun in ("scales", "all"):
        model = copy.deepcopy(again)
        assert torch.equal(logits(student.build(model, GRID, learn=begun, start=folder)), expected)


def test_frozen_tensors_are_the_teachers():
    teacher = families.build("llama", tie_word_embeddings=False)
    built = student.build(copy.deepcopy(teacher), GRID)
    student.share(built, teacher)
    assert built.lm_head.weight.data_ptr() == teacher.lm_head.weight.data_ptr()
    pairs = zip(built.parameters(), teacher.parameters(), strict=True)
    shared = [a.data_ptr() == b.data_ptr() for a, b in pairs]
    assert sum(shared) == 2


def refuses(match, model=None, grid=GRID, **choices):
    with pytest.raises(UserError, match=match) as caught:
        student.build(model or families.build("llama"), grid, **choices)
    assert "\n" not in str(caught.value)


def test_refused_choices(tmp_path):
    refuses("does not divide", grid=Grid(2, 10))
    refuses("Did you mean 'scales'", learn="scale")
    model = families.build("llama")
    ranges = make_ranges(model, Grid(2, 8))
    refuses("another model or group size", ranges=ranges)
    ranges.popitem()
    refuses("lack", grid=Grid(2, 8), ranges=ranges)
    refuses("give it without", ranges=ranges, start=tmp_path)
    refuses("learn scales or all", start=tmp_path)
    refuses("holds no grid.safetensors", start=tmp_path, learn="all")


def test_refused_starts(tmp_path):
    model = families.save("llama", tmp_path / "dense")
    folder = stored(student.build(model, GRID), tmp_path / "dense", tmp_path / "out")
    refuses("has 2 bits in groups of 16", grid=Grid(3, 16), start=folder, learn="all")
    other = families.build("llama", intermediate_size=64)
    refuses("another model", other, start=folder, learn="scales")
    weights = AutoModelForCausalLM.from_pretrained(folder)
    weights.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.01
    weights.save_pretrained(folder)
    refuses("changed after training", start=folder, learn="scales")
    (folder / result.FILE).write_bytes(b"not this")
    refuses("cannot be read", start=folder, learn="scales")


def test_normal_float_student(tmp_path):
    model, grid = families.save("llama", tmp_path / "dense"), NormalFloat(3, 16)
    built = student.build(copy.deepcopy(model), grid)
    for module in block_linears(*find_blocks(model)).values():
        set_matrix(module, normal_float.nearest(get_matrix(module), grid, model.dtype))
    expected = logits(built)
    assert torch.equal(expected, logits(model))
    folder = stored(built, tmp_path / "dense", tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    assert result.Grids(folder).kind == "nf3"
    refuses("no scales to learn", grid=grid, learn="all")
    refuses("nf3 values", grid=GRID, learn="scales", start=folder)
