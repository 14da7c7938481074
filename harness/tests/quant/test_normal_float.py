"""NormalFloat against brute force over every level, and what holds for any numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.quant.normal_float import LEVELS, NormalFloat, nearest, snap

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
finite = st.floats(-1e3, 1e3, width=16)
matrices = st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4)


def closest(value, low, high, levels):
    """The nearest of the points that a group with these extremes has, in plain Python."""
    points = [level * (high if level > 0 else -low) for level in levels]
    return min(points, key=lambda point: abs(point - value))


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("bits", [3, 4])
def test_nearest_is_the_nearest_of_all_levels(bits, group_size):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3, :8] = 0
    grid = NormalFloat(bits, group_size)
    found = nearest(weight, grid, torch.float32)
    g = grid.columns_per_group(24)
    for row in range(5):
        for start in range(0, 24, g):
            group = weight[row, start : start + g].tolist()
            low, high = min(*group, 0.0), max(*group, 0.0)
            expected = [closest(value, low, high, LEVELS[bits]) for value in group]
            assert found[row, start : start + g].tolist() == pytest.approx(expected, abs=1e-6)


def test_levels_by_hand():
    # Positive levels of 2, negative ones of 4: -1, -.535, -.247, 0, .183, .382, .623, 1.
    values = torch.tensor([[-4.0, -3.0, -2.0, -0.4, 0.1, 0.5, 1.7, 2.0]])
    found = nearest(values, NormalFloat(3), torch.float32)
    expected = [-4, -2.140091, -2.140091, 0, 0, 0.366675, 2, 2]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=matrices, bits=st.sampled_from([3, 4]), dtype=st.sampled_from(DTYPES))
def test_extremes_and_zero_stay_and_levels_are_fixed_points(rows, bits, dtype):
    weight = torch.tensor(rows).to(dtype).float()
    found = nearest(weight, NormalFloat(bits, 3), dtype)
    grouped, before = found.view(-1, 3), weight.view(-1, 3)
    tiny = before.abs() < torch.finfo(dtype).tiny
    for pick, side in ((torch.amax, before > 0), (torch.amin, before < 0)):
        there = side.any(1) & ~tiny.any(1)
        assert torch.equal(pick(grouped, 1)[there], pick(before, 1)[there])
    assert not found[weight == 0].any()
    assert found.isfinite().all()
    assert torch.equal(nearest(found, NormalFloat(bits, 3), dtype), found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=matrices, share=st.integers(10, 20), bits=st.sampled_from([3, 4]))
def test_snap_is_nearest_of_the_clamped_values(rows, share, bits):
    weight = torch.tensor(rows)
    low = (weight.amin(1).clamp(max=0) * share / 20).half().float()
    high = (weight.amax(1).clamp(min=0) * share / 20).half().float()
    found = snap(weight, low, high, NormalFloat(bits), torch.float16)
    clamped = weight.clamp(low[:, None], high[:, None])
    assert torch.equal(found, nearest(clamped, NormalFloat(bits), torch.float16))


def test_refusals_name_the_mend():
    for bits in (2, 5, 8):
        with pytest.raises(UserError, match=f"bits is {bits}; NormalFloat has levels for 3 and 4"):
            NormalFloat(bits)
    for size in (0, -2):
        with pytest.raises(UserError, match=f"group size is {size}"):
            NormalFloat(3, size)
