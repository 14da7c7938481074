"""Second moments against float64; the inverse factor against its definition."""

import logging

import pytest
import torch

from harness.quant.hessian import GroupMoments, Hessian, inverse_factor, invert_lower


def correlated(tokens, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mix


@pytest.mark.parametrize("columns", [5, 96, 515, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_equal_float64(columns, dtype):
    # 515 and 600: where only the lower triangle is computed, in blocks that do not come out even.
    inputs = (correlated(130, columns) / columns**0.5).to(dtype)
    hessian = Hessian(columns)
    hessian.add(inputs[:64].view(2, 32, columns))  # [B, T, I]
    hessian.add(inputs[64:])
    assert hessian.tokens == 130
    mean = hessian.mean()
    exact = inputs.double().T @ inputs.double() / 130
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.T)
    assert (mean - exact).abs().max() < 1e-6 * exact.abs().max()


def test_moments_do_not_depend_on_the_order_of_batches():
    parts = correlated(256, 96).split(32)
    forth, back = Hessian(96), Hessian(96)
    for part, other in zip(parts, reversed(parts), strict=True):
        forth.add(part)
        back.add(other)
    assert torch.equal(forth.mean(), back.mean())


@pytest.mark.parametrize("columns", [1, 7, 96, 300, 513])
def test_factor_is_that_of_the_damped_inverse(columns):
    moments = correlated(2 * columns + 8, columns).double()
    moments = moments.T @ moments / len(moments)
    factor, damping = inverse_factor(moments, 0.01)
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(columns)
    assert (factor.T @ factor @ damped - torch.eye(columns)).abs().max() < 1e-8
    # What GPTQ's steps make of it: cholesky, inverse, upper cholesky.
    textbook = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert (factor - textbook).abs().max() < 1e-8 * textbook.abs().max()
    single, _ = inverse_factor(moments.float(), 0.01)
    assert (single - factor).abs().max() < 1e-2 * factor.abs().max()


@pytest.mark.parametrize("n", [1, 2, 3, 9, 33])
def test_triangular_inverse(n):
    lower = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    lower = lower.tril(-1) + (2 + lower.diagonal().abs()).diag()
    inverse = invert_lower(lower, leaf=2)
    assert (inverse @ lower - torch.eye(n)).abs().max() < 1e-10
    assert torch.equal(inverse, inverse.tril())


def test_damping_that_has_to_grow_is_said(caplog):
    # One eigenvalue at -5 % of the mean diagonal: 1 % damping fails, 10 % does.
    moments = torch.eye(20, dtype=torch.float64)
    moments[0, 0] = -0.05
    before = moments.clone()
    with caplog.at_level(logging.WARNING):
        factor, damping = inverse_factor(moments, 0.01, "block 3 o_proj")
    assert damping == pytest.approx(0.1)
    assert "block 3 o_proj" in caplog.text and "0.01 -> 0.1" in caplog.text
    assert factor.isfinite().all()
    assert torch.equal(moments, before)


def test_hopeless_matrices_are_refused():
    with pytest.raises(ArithmeticError, match=r"block 1 q_proj .* not positive definite"):
        inverse_factor(-torch.eye(4), 0.01, "block 1 q_proj")
    with pytest.raises(ArithmeticError):
        inverse_factor(torch.full((3, 3), torch.nan))


def test_moments_do_not_depend_on_how_tokens_are_dealt():
    inputs = torch.randn(23, 12, generator=torch.Generator().manual_seed(0))
    whole, parts = (GroupMoments(12, "cpu", 4) for _ in range(2))
    whole.add(inputs[None])
    for part in inputs.split([1, 15, 7]):
        parts.add(part)
    for moments in (whole, parts):
        moments.reduce()
    grouped = inputs.double().unflatten(1, (3, 4)).transpose(0, 1)
    expected = (grouped.mT @ grouped / 23).float()
    together = whole.mean()
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(parts.mean(), together)
