"""SparseGPT's solver against a float64 reading of the paper and against brute force."""

import itertools

import pytest
import torch

from harness.quant.grid import Grid, QuantizedWeight, round_to_codes, weight_scales
from harness.quant.hessian import inverse_factor
from sparse.solver import solve

DAMPING = 0.01
# (sparsity, n, m, blocksize)
AMOUNTS = {
    "half": (0.5, 0, 0, 128),
    "blocks that do not divide": (0.7, 0, 0, 80),
    "small blocks": (0.3, 0, 0, 12),
    "one block": (0.5, 0, 0, 192),
    "2:4": (0.5, 2, 4, 128),
    "1:4": (0.25, 1, 4, 7),
    "4:8": (0.5, 4, 8, 128),
    "5:48": (5 / 48, 5, 48, 128),
}


def correlated_hessian(columns: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(8 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    x *= torch.linspace(0.3, 3, columns, dtype=torch.float64)
    return (x.T @ x / len(x)).to(dtype)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    hessian = hessian.double().clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    return hessian


def objective(weight, pruned, hessian) -> float:
    error = weight.double() - pruned.double()
    return ((error @ damped(hessian)) * error).sum().item()


def paper(weight, hessian, sparsity, n, m, blocksize, grid=None):
    """Algorithm 1 in float64 with inverses of ever smaller matrices in place of a factor.

    [H_F⁻¹]_jj of the columns F = j, j + 1, ... is the pivot, and scores are w_j² / [H_F⁻¹]_jj.
    """
    full, work = damped(hessian), weight.double().clone()
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(full[j:, j:]) for j in range(columns)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    pruned = torch.zeros_like(work)
    if grid:
        scales, zeros = weight_scales(weight.double(), grid, torch.float64)
    for j in range(columns):
        if j % (m or blocksize) == 0:
            ahead = slice(j, j + (m or blocksize))
            scores = work[:, ahead] ** 2 / pivots[ahead]
            if m:
                keep = scores.argsort(dim=1, stable=True).argsort(dim=1) >= n
            else:
                ranks = scores.flatten().argsort().argsort().view(scores.shape)
                keep = ranks >= int(scores.numel() * sparsity)
        value = work[:, j] * keep[:, j % (m or blocksize)]
        if grid:
            g = j // grid.columns_per_group(columns)
            code = round_to_codes(value, scales[:, g], zeros[:, g], grid.max_code)
            value = (code - zeros[:, g]) * scales[:, g]
        pay = (work[:, j] - value) / pivots[j]
        work[:, j:] -= torch.outer(pay, inverses[j][0])
        pruned[:, j] = value
    return pruned


def run(weight, hessian, amount, grid=None, dtype=None):
    sparsity, n, m, blocksize = amount
    factor, _ = inverse_factor(hessian, DAMPING)
    result, loss = solve(
        weight, factor, sparsity=sparsity, n=n, m=m, blocksize=blocksize, grid=grid,
        dtype=dtype or weight.dtype,
    )  # fmt: skip
    if isinstance(result, QuantizedWeight):
        result = result.dequantize(weight.dtype)
    return result, loss


@pytest.mark.parametrize("grid", [None, Grid(4), Grid(3, 48, symmetric=True)])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_float64_solver_is_the_paper_s_algorithm(amount, grid):
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = correlated_hessian(192, torch.float64)
    got, loss = run(weight, hessian, AMOUNTS[amount], grid)
    want = paper(weight, hessian, *AMOUNTS[amount], grid)
    assert torch.equal(got == 0, want == 0)
    # dequantize() multiplies in float32.
    torch.testing.assert_close(got, want, rtol=1e-5 if grid else 1e-9, atol=1e-9)
    assert loss.sum().item() == pytest.approx(objective(weight, want, hessian), rel=1e-9)
    if not grid:
        sparsity, n, m, blocksize = AMOUNTS[amount]
        edges = [*range(0, 192, m or blocksize), 192]
        drops = [
            n * 24 if m else int((b - a) * 24 * sparsity) for a, b in itertools.pairwise(edges)
        ]
        assert (got == 0).sum() == sum(drops)


@pytest.mark.parametrize("amount", ["half", "2:4", "4:8"])
def test_float32_error_within_a_thousandth_of_the_reference(amount):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(1))
    hessian = correlated_hessian(256)
    got, loss = run(weight, hessian, AMOUNTS[amount])
    total = objective(weight, paper(weight, hessian, *AMOUNTS[amount]), hessian)
    assert objective(weight, got, hessian) == pytest.approx(total, rel=1e-3)
    assert loss.sum().item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(("n", "columns", "least"), [(1, 4, 0.8), (2, 4, 0.7), (2, 8, 0.25)])
def test_greedy_masks_against_all_masks(n, columns, least, capsys):
    """For every mask the best remaining weights in closed form; SparseGPT never beats the best mask
    of a row, and how often it finds it is printed."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(400, columns, generator=generator, dtype=torch.float64)
    hessian = correlated_hessian(columns, torch.float64)
    got, loss = run(weight, hessian, (0.0, n, 4, 128))
    full = damped(hessian)
    per_group = list(itertools.combinations(range(4), n))
    costs, drops = [], []
    for picks in itertools.product(per_group, repeat=columns // 4):
        drop = [4 * group + c for group, pick in enumerate(picks) for c in pick]
        # Least w_S (H⁻¹_SS)⁻¹ w_Sᵀ, the optimal brain surgeon's cost of dropping the set S.
        inverse = torch.linalg.inv(torch.linalg.inv(full)[drop][:, drop])
        costs.append(((weight[:, drop] @ inverse) * weight[:, drop]).sum(dim=1))
        drops.append(torch.zeros(columns, dtype=torch.bool).index_fill(0, torch.tensor(drop), True))
    best, which = torch.stack(costs).min(dim=0)
    assert (loss >= best * (1 - 1e-9)).all()
    hits = ((got == 0) == torch.stack(drops)[which]).all(dim=1).double().mean().item()
    excess = (loss.sum() / best.sum()).item()
    with capsys.disabled():
        print(f"\n{n} of 4, {columns} columns: the best mask in {hits:.0%} of rows, {excess:.2f}x ")
    assert hits >= least
    # Better than the masks and weights of magnitude pruning.
    magnitude = weight.abs().unflatten(1, (-1, 4)).argsort(dim=2).argsort(dim=2).flatten(1) < n
    assert loss.sum() < objective(weight, weight.masked_fill(magnitude, 0), hessian)


def test_errors_are_those_of_the_stored_values():
    """In bfloat16 the loss must count the rounding of what stays, and later weights repay it."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    hessian = correlated_hessian(128)
    got, loss = run(weight, hessian, (0.1, 0, 0, 128), dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert objective(weight, got, hessian) == pytest.approx(loss.sum().item(), rel=1e-3)
    exact, _ = run(weight, hessian, (0.1, 0, 0, 128))
    assert loss.sum() < objective(weight, exact.bfloat16(), hessian)


def test_pruning_again_at_the_same_ratio_changes_nothing():
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(5))
    hessian = correlated_hessian(128)
    once, _ = run(weight, hessian, (0.5, 0, 0, 64))
    twice, loss = run(once, hessian, (0.5, 0, 0, 64))
    assert torch.equal(once, twice) and loss.sum() == 0


KERNEL_CASES = [
    ("half", None),
    ("2:4", None),
    ("4:8", Grid(4)),
    ("blocks that do not divide", Grid(3, 48)),
]


def both_loops(monkeypatch, device, dtype, amount, grid):
    """Results and total errors of the torch loop and of the kernel on ``device``."""
    from sparse import kernel, solver

    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(6)).to(device)
    hessian = correlated_hessian(192).to(device)
    results = []
    for loop in (solver.torch_loop, kernel.triton_loop):
        monkeypatch.setattr(solver, "_pick_loop", lambda _, loop=loop: loop)
        result, loss = run(weight, hessian, AMOUNTS[amount], grid, dtype)
        results.append((result.float().cpu(), loss.sum().item()))
    return results


@pytest.mark.skipif(torch.cuda.is_available(), reason="the gpu test runs the compiled kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("amount", "grid"), KERNEL_CASES)
def test_kernel_in_triton_s_interpreter_equals_torch_loop(monkeypatch, dtype, amount, grid):
    """No GPU needed; bfloat16 is left out, the interpreter does not round it to nearest."""
    pytest.importorskip("triton")  # conftest.py turned its interpreter on
    (loop, loop_loss), (kernel, kernel_loss) = both_loops(monkeypatch, "cpu", dtype, amount, grid)
    assert kernel_loss == pytest.approx(loop_loss, rel=2e-3)
    differ = ~torch.isclose(loop, kernel, rtol=2e-3 if dtype == torch.float16 else 1e-4, atol=1e-5)
    assert differ.float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("amount", "grid"), KERNEL_CASES)
def test_compiled_kernel_equals_torch_loop(monkeypatch, dtype, amount, grid):
    (loop, loop_loss), (kernel, kernel_loss) = both_loops(monkeypatch, "cuda", dtype, amount, grid)
    assert kernel_loss == pytest.approx(loop_loss, rel=5e-3)
    differ = ~torch.isclose(loop, kernel, rtol=1e-2, atol=1e-4)
    assert differ.float().mean() < 0.02
