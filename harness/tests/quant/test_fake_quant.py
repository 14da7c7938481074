"""Fake quantization: values against harness.quant.grid, gradients against autograd in float64."""

import pytest
import torch

from harness.quant import fake_quant, normal_float
from harness.quant.fake_quant import fake_quantize, fake_quantize_with
from harness.quant.grid import Grid, QuantizedWeight, nearest
from harness.quant.normal_float import NormalFloat
from naive_rounding import learned, through

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [Grid(2, 16), Grid(3, 8), Grid(4, -1), Grid(8, 16)]


def naive(weight, grid, dtype):
    """The formulas of the docstring, left to autograd; [O, I] float64."""
    groups = weight.view(-1, grid.columns_per_group(weight.shape[1]))
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / grid.max_code
    scale = through(scale, scale.float().to(dtype).double())
    zero = (-low / scale).detach().round().clamp(0, grid.max_code)
    return learned(groups, scale, zero, grid).view_as(weight)


def example(rows=12, columns=32, seed=0):
    """Weights with groups of one sign, of zeros, and with equal extremes."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0], weight[1], weight[2] = weight[0].abs(), -weight[1].abs(), 0
    weight[3, :16] = 0
    weight[4, [1, 5, 9]] = 4.0
    weight[4, [2, 3]] = -3.0
    weight[5, :8] = 0.5
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_values_are_those_of_nearest(grid, dtype):
    weight = example().to(dtype)
    found = fake_quantize(weight, grid)
    assert found.dtype == dtype
    assert torch.equal(found, nearest(weight.float(), grid, dtype).dequantize(dtype))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("chunk", [64, 2**18])
def test_gradient_is_that_of_autograd(grid, chunk, monkeypatch):
    monkeypatch.setattr(fake_quant, "CHUNK", chunk)
    weight, gradient = example().requires_grad_(), example(seed=1)
    fake_quantize(weight, grid).backward(gradient)
    oracle = weight.detach().double().requires_grad_()
    naive(oracle, grid, torch.float32).backward(gradient.double())
    assert torch.allclose(weight.grad.double(), oracle.grad, rtol=1e-6, atol=1e-6)
    assert (weight.grad - gradient).abs().max() > 1e-4  # the scale's path is not nothing


def test_gradient_in_bfloat16_with_its_scale():
    grid, weight = Grid(2, 16), example().bfloat16().requires_grad_()
    gradient = example(seed=1).bfloat16()
    fake_quantize(weight, grid).backward(gradient)
    oracle = weight.detach().double().requires_grad_()
    naive(oracle, grid, torch.bfloat16).backward(gradient.double())
    assert torch.equal(weight.grad, oracle.grad.float().bfloat16())


def begun(weight, grid, dtype):
    """A scale and zero point off the min-max grid, so that values clamp at both ends."""
    found = nearest(weight.float(), grid, dtype)
    scale = found.scale.float() * 0.8
    zero = found.zero.float() + 0.3
    return scale.to(dtype), zero.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS[:3])
def test_learned_grid_gives_stored_values(grid, dtype):
    weight = example().to(dtype)
    scale, zero = begun(weight, grid, dtype)
    found = fake_quantize_with(weight, scale, zero, grid)
    quantized = fake_quant.quantize_with(weight, scale, zero, grid, dtype)
    assert isinstance(quantized, QuantizedWeight)
    assert torch.equal(quantized.scale, scale) and quantized.codes.max() == grid.max_code
    assert torch.equal(found, quantized.dequantize(dtype))


@pytest.mark.parametrize("grid", GRIDS[:3])
def test_learned_grid_has_the_gradients_of_autograd(grid, monkeypatch):
    monkeypatch.setattr(fake_quant, "CHUNK", 64)
    weight, gradient = example(), example(seed=1)
    inputs = [weight, *begun(weight, grid, torch.float32)]
    ours = [t.clone().requires_grad_() for t in inputs]
    fake_quantize_with(*ours, grid).backward(gradient)
    theirs = [t.double().requires_grad_() for t in inputs]
    groups = theirs[0].view(-1, grid.columns_per_group(32))
    scale, zero = (t.view(-1, 1) for t in theirs[1:])
    whole = through(zero, zero.detach().round().clamp(0, grid.max_code))
    learned(groups, scale, whole, grid).view_as(weight).backward(gradient.double())
    for one, other in zip(ours, theirs, strict=True):
        assert other.grad.abs().max() > 0
        assert torch.allclose(one.grad.double(), other.grad, rtol=1e-6, atol=1e-6)


def test_a_scale_that_was_learned_below_zero_stays_usable():
    weight, grid = example(), Grid(2, 16)
    scale, zero = torch.full((12, 2), -0.1), torch.ones(12, 2)
    assert torch.isfinite(fake_quantize_with(weight, scale, zero, grid)).all()


def naive_levels(weight, grid, dtype):
    """A scale for each sign, rounding to levels straight-through; [O, I] float64."""
    groups = weight.view(-1, grid.columns_per_group(weight.shape[1]))
    tiny = torch.finfo(dtype).tiny
    scales = [
        through(s, s.float().to(dtype).double())
        for end in (groups.amax(1, keepdim=True), -groups.amin(1, keepdim=True))
        for s in [end.clamp(min=tiny)]
    ]
    scale = torch.where(groups >= 0, *scales)
    share = groups / scale
    near = (share.detach()[..., None] - grid.levels.double()).abs().argmin(-1)
    return (through(share, grid.levels.double()[near]) * scale).view_as(weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [NormalFloat(3, 16), NormalFloat(4, -1)])
def test_normal_float(grid, dtype, monkeypatch):
    monkeypatch.setattr(fake_quant, "CHUNK", 64)
    weight, gradient = example().to(dtype).requires_grad_(), example(seed=1).to(dtype)
    found = fake_quantize(weight, grid)
    values = weight.detach().float()
    assert torch.equal(found, normal_float.nearest(values, grid, dtype).to(dtype))
    found.backward(gradient)
    oracle = weight.detach().double().requires_grad_()
    naive_levels(oracle, grid, dtype).backward(gradient.double())
    assert (oracle.grad - gradient.double()).abs().max() > 0.1
    close = {"rtol": 1e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-3}
    assert torch.allclose(weight.grad.double(), oracle.grad, **close)
