"""Grids against brute force over every point, and properties that hold for any numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.quant.grid import (
    MSE_NORM,
    Grid,
    check_group_size,
    find_scale_zero,
    nearest,
    round_to_codes,
    snap,
    weight_scales,
)

WIDTHS = range(2, 9)
FLOATS = {16: torch.float16, 17: torch.bfloat16, 32: torch.float32}

grids = st.builds(
    Grid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 3, 6]),
    symmetric=st.booleans(),
    mse=st.booleans(),
)
finite = st.floats(-1e3, 1e3, width=32)
matrices = st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4)


def random_weight(rows=5, columns=24, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 6])
@pytest.mark.parametrize("bits", WIDTHS)
def test_nearest_is_the_nearest_of_all_grid_points(bits, group_size, symmetric):
    weight = random_weight()
    grid = Grid(bits, group_size, symmetric)
    quantized = nearest(weight, grid, torch.float32)
    values = quantized.dequantize(torch.float32)
    g = 24 if group_size == -1 else group_size
    for row in range(5):
        for column in range(24):
            scale = quantized.scale[row, column // g].item()
            zero = quantized.zero[row, column // g].item()
            points = [scale * (code - zero) for code in range(2**bits)]
            closest = min(abs(point - weight[row, column].item()) for point in points)
            error = abs(values[row, column] - weight[row, column]).item()
            assert error == pytest.approx(closest, abs=1e-6)


def test_ranges_by_hand():
    # -1 .. 2 in four codes: steps of 1, of which -1 is code 0, so 0 is code 1.
    values = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 2.0, 3.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 0.0]])
    scale, zero = find_scale_zero(values, Grid(2), torch.float32)
    assert scale.tolist() == pytest.approx([1, 1, 1, 2 / 3])
    assert zero.tolist() == [1, 0, 3, 2]
    # Symmetric: the widest of both sides, code 2 is 0.
    scale, zero = find_scale_zero(values, Grid(2, symmetric=True), torch.float32)
    assert scale.tolist() == pytest.approx([4 / 3, 2, 2, 2 / 3])
    assert zero.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_all_zero_groups_stay_zero(symmetric, mse):
    weight = random_weight()
    weight[1] = 0
    weight[3, 8:16] = 0
    values = nearest(weight, Grid(3, 8, symmetric, mse), torch.float16).dequantize(torch.float32)
    assert values.isfinite().all()
    assert not values[1].any() and not values[3, 8:16].any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_searched_ranges_are_never_worse_in_their_own_norm(bits, symmetric):
    # Heavy tails, where clipping pays.
    weight = random_weight(16, 64).pow(3)

    def error(mse):
        quantized = nearest(weight, Grid(bits, 16, symmetric, mse), torch.float32)
        difference = (quantized.dequantize(torch.float32) - weight).abs().pow(MSE_NORM)
        return difference.unflatten(1, (-1, 16)).sum(2)

    assert (error(True) <= error(False) * (1 + 1e-5)).all()
    if bits <= 4:
        assert error(True).sum() < 0.99 * error(False).sum()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=matrices, grid=grids, dtype=st.sampled_from(list(FLOATS.values())))
def test_errors_inside_the_range_are_at_most_half_a_step(rows, grid, dtype):
    weight = torch.tensor(rows)
    quantized = nearest(weight, grid, dtype)
    g = grid.columns_per_group(6)
    assert quantized.scale.dtype == dtype
    scale = quantized.scale.double().repeat_interleave(g, 1)
    zero = quantized.zero.double().repeat_interleave(g, 1)
    values = (quantized.codes.double() - zero) * scale
    inside = (weight >= -zero * scale) & (weight <= (grid.max_code - zero) * scale)
    error = (values - weight).abs()
    assert (error <= scale / 2 + 1e-6 * weight.abs())[inside].all()
    # Nothing lies further outside than clipping and rounding the scale can put it.
    if not grid.mse:
        slack = 1 if dtype == torch.float32 else 1 + grid.max_code * torch.finfo(dtype).eps
        assert (error <= scale * slack / 2 * 1.001 + 1e-6).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=matrices, grid=grids, dtype=st.sampled_from(list(FLOATS.values())))
def test_zero_is_a_grid_point_and_grid_points_stay(rows, grid, dtype):
    weight = torch.tensor(rows)
    scale, zero = weight_scales(weight, grid, dtype)
    assert (scale > 0).all() and scale.isfinite().all()
    assert torch.equal(scale, scale.to(dtype).float())
    assert (zero == zero.round()).all() and (zero >= 0).all() and (zero <= grid.max_code).all()
    assert torch.equal(round_to_codes(torch.zeros(()), scale, zero, grid.max_code), zero)
    codes = torch.arange(2**grid.bits).float()
    points = (codes - zero[..., None]) * scale[..., None]
    again = round_to_codes(points, scale[..., None], zero[..., None], grid.max_code)
    assert torch.equal(again, codes.expand_as(again))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dequantized_values_are_what_16_bit_arithmetic_gives(dtype, symmetric):
    quantized = nearest(random_weight(), Grid(8, 8, symmetric), dtype)
    steps = quantized.codes.to(dtype) - quantized.zero.to(dtype).repeat_interleave(8, 1)
    expected = steps * quantized.scale.repeat_interleave(8, 1)
    assert torch.equal(quantized.dequantize(dtype), expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=matrices,
    shares=st.tuples(st.integers(10, 20), st.integers(10, 20)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from(list(FLOATS.values())),
)
def test_snap_is_nearest_of_the_clamped_values(rows, shares, bits, symmetric, dtype):
    weight = torch.tensor(rows)
    low = (weight.amin(1).clamp(max=0) * shares[0] / 20).to(dtype).float()
    high = (weight.amax(1).clamp(min=0) * shares[1] / 20).to(dtype).float()
    grid = Grid(bits, symmetric=symmetric)
    found = snap(weight, low, high, grid, dtype)
    clamped = weight.clamp(low[:, None], high[:, None])
    assert torch.equal(found, nearest(clamped, grid, dtype).dequantize(torch.float32))


def test_a_row_of_tiny_or_huge_values_stays_finite():
    weight = torch.tensor([[1e-30, -1e-30], [1e30, -1e30]])
    for symmetric in (False, True):
        for dtype in FLOATS.values():
            values = nearest(weight, Grid(2, symmetric=symmetric), dtype).dequantize(torch.float32)
            assert values.isfinite().all()


def test_refusals_name_the_mend():
    for bits in (1, 9, 16):
        with pytest.raises(UserError, match=f"bits is {bits}; expected one of 2, 3, 4"):
            Grid(bits)
    for size in (0, -2):
        with pytest.raises(UserError, match=f"group size is {size}"):
            Grid(4, size)
    with pytest.raises(UserError, match=r"128 does not divide .* of b \(96\), c \(64\); try 32"):
        check_group_size({"a": 256, "b": 96, "c": 64}, Grid(4, 128))
    with pytest.raises(UserError, match="use -1"):
        check_group_size({"a": 97}, Grid(4, 128))
    check_group_size({"a": 256}, Grid(4, 128))
    check_group_size({"a": 97}, Grid(4))
