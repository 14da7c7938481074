"""The search against an exhaustive loop that rounds every candidate and looks at every token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.quant import clip_search
from harness.quant.clip_search import SHARES, clamp, full_range, output_energy, search
from harness.quant.grid import Grid, nearest
from harness.quant.normal_float import NormalFloat
from harness.quant.normal_float import nearest as nearest_levels

KINDS = {
    "int2": lambda g: Grid(2, g), "int3": lambda g: Grid(3, g), "int4": lambda g: Grid(4, g),
    "nf3": lambda g: NormalFloat(3, g), "nf4": lambda g: NormalFloat(4, g),
}  # fmt: skip


def rounded(weight, grid, dtype):
    if isinstance(grid, NormalFloat):
        return nearest_levels(weight, grid, dtype)
    quantized = nearest(weight, grid, dtype)
    steps = quantized.codes.to(weight) - quantized.zero.to(weight).repeat_interleave(
        weight.shape[1] // quantized.zero.shape[1], 1
    )
    scale = quantized.scale.to(weight)
    return steps * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)


def exhaustive(weight, inputs, grid, dtype):
    """Upstream's loop: one group of one row at a time, all of its tokens, in float64."""
    rows, columns = weight.shape
    g = grid.columns_per_group(columns)
    one = type(grid)(grid.bits)
    found = torch.empty(2, rows, columns // g, dtype=torch.float64)
    errors = torch.empty(2, rows, columns // g, dtype=torch.float64)
    for row in range(rows):
        for k in range(columns // g):
            span = slice(k * g, (k + 1) * g)
            w, x = weight[row : row + 1, span], inputs[:, span]
            low, high = w.min().clamp(max=0), w.max().clamp(min=0)
            best = torch.inf
            for i in range(10):
                for j in range(10):
                    to = (high * (1 - i / 20)).to(dtype).double()
                    of = (low * (1 - j / 20)).to(dtype).double()
                    change = rounded(w.clamp(of, to), one, dtype) - w
                    error = (x @ change[0]).square().mean().item()
                    if i == j == 0:
                        errors[0, row, k] = error
                    # Sums in another order may differ by the last digits of a double.
                    if error < best * (1 - 1e-12):
                        best = error
                        found[0, row, k], found[1, row, k] = of, to
            errors[1, row, k] = best
    return *found, errors[0].sum(1), errors[1].sum(1)


def case(rows, columns, tokens, seed=0, dtype=torch.bfloat16):
    """Weights [O, I] with outliers and groups of special kinds, inputs [N, I]; float64."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).pow(3)
    half = columns // 2
    weight[0, :half] = 0
    weight[1, :half] = weight[1, :half].abs() + 0.5
    weight[2, half:] = -weight[2, half:].abs() - 0.5
    inputs = torch.randn(tokens, columns, generator=draw) * torch.linspace(0.1, 2, columns) + 0.3
    return weight.to(dtype).double(), inputs.double()


def moments_of(inputs, g):
    grouped = inputs.unflatten(1, (-1, g)).transpose(0, 1)
    return grouped.mT @ grouped / len(inputs)


@pytest.mark.parametrize("shape", [(5, 24, 8, 13), (4, 21, 7, 5), (3, 18, -1, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_is_that_of_an_exhaustive_loop(kind, shape, monkeypatch):
    rows, columns, g, tokens = shape
    grid = KINDS[kind](g)
    monkeypatch.setattr(clip_search, "CPU_CHUNK", 16 * 10)  # several chunks, the last one short
    weight, inputs = case(rows, columns, tokens)
    moments = moments_of(inputs, grid.columns_per_group(columns))
    low, high, before, after = search(weight, moments, grid, torch.bfloat16)
    expected = exhaustive(weight, inputs, grid, torch.bfloat16)
    assert torch.equal(low, expected[0])
    assert torch.equal(high, expected[1])
    torch.testing.assert_close(before, expected[2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(after, expected[3], rtol=1e-9, atol=1e-12)
    assert after.sum() < before.sum()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    values=st.lists(st.floats(-100, 100, width=16), min_size=12, max_size=12),
)
def test_no_group_gets_worse_and_ranges_are_those_of_the_clamped_weight(
    kind, seed, tokens, dtype, values
):
    grid = KINDS[kind](6)
    weight, inputs = case(4, 12, tokens, seed, dtype)
    weight[3] = torch.tensor(values).to(dtype)
    weight, moments = weight.float(), moments_of(inputs, 6).float()
    low, high, before, after = search(weight, moments, grid, dtype)
    plain = rounded(weight, grid, dtype) - weight
    clamped = clamp(weight, low, high)
    clipped = rounded(clamped, grid, dtype) - weight
    for k in range(2):
        group = slice(6 * k, 6 * k + 6)
        old, new = (
            (inputs[:, group].float() @ d[:, group].T).square().mean(0) for d in (plain, clipped)
        )
        slack = 1e-4 * inputs.square().sum() * weight.square().sum(1)
        assert (new <= old * (1 + 1e-4) + 1e-6 * slack).all()
    torch.testing.assert_close(output_energy(plain, moments), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output_energy(clipped, moments), after, rtol=1e-3, atol=1e-4)
    # Stored in the model's dtype, the clamped weights span these very ranges.
    assert torch.equal(clamped.to(dtype).float(), clamped)
    assert all(
        torch.equal(a, b) for a, b in zip(full_range(clamped, grid), (low, high), strict=True)
    )


def test_ends_shrink_independently():
    # One outlier above: the upper end comes down to the lowest candidate, the lower one stays.
    weight = torch.tensor([[10.0, 1.0, -1.0, 0.9, -0.9, 0.5, -0.5, 1.1]])
    moments = torch.eye(8)
    moments[0, 0] = 0  # its own input is silent
    low, high, before, after = search(weight, moments[None], Grid(2), torch.float32)
    assert high.item() == pytest.approx(10 * SHARES[-1])
    assert after.item() < before.item()
    low, high, *_ = search(-weight, moments[None], Grid(2), torch.float32)
    assert low.item() == pytest.approx(-10 * SHARES[-1])


def test_nothing_is_clipped_that_gains_nothing():
    weight, _ = case(4, 12, 3)
    silent = torch.zeros(2, 6, 6, dtype=torch.float64)
    for kind in KINDS.values():
        low, high, before, after = search(weight, silent, kind(6), torch.bfloat16)
        assert torch.equal(torch.stack([low, high]), torch.stack(full_range(weight, kind(6))))
        assert not before.any() and not after.any()
