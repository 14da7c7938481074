"""Rotations are orthogonal, drawn from their generator alone, and fix the ones where asked."""

import pytest
import torch

from harness.quant.orthogonal import orthogonal


@pytest.mark.parametrize("width", [32, 48, 28, 22])  # of 22 no Hadamard matrix is known
@pytest.mark.parametrize("fixes_ones", [True, False])
@pytest.mark.parametrize("random", [True, False])
def test_matrices(width, fixes_ones, random):
    q = orthogonal(width, fixes_ones, torch.Generator().manual_seed(1), random)
    again = orthogonal(width, fixes_ones, torch.Generator().manual_seed(1), random)
    assert q.dtype == torch.float64 and torch.equal(q, again)
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=q.dtype))
    ones = torch.ones(width, dtype=q.dtype)
    assert torch.allclose(ones @ q, ones) == fixes_ones
