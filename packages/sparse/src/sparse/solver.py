"""SparseGPT's solver: drop weights column by column, each loss repaid by later columns.

Legend: O rows (out features), I columns (in features), B columns in a block, g columns per group.

Notation of the paper (arXiv:2301.00774, sections 3.2-3.4, algorithm 1): H⁻¹ = RᵀR with R upper
triangular. Dropping w_j costs w_j² / R_jj². For column j, q_j is 0 where the mask drops it (what
stays may be quantized on the way, section 3.5), e_j = (w_j - q_j) / R_jj, and every later column k
pays w_k -= e_j R_jk. The objective tr((W - Q) H (W - Q)ᵀ) equals the sum of all e².

The mask is chosen as the columns are reached, on weights that have paid for all earlier ones: for
the next ``blocksize`` columns at once, or n of every m.

Cost: O I² multiply-adds, nearly all in matrix products: two levels of blocks keep the eager
updates short, on a transposed weight so that a column is contiguous. On CUDA, where launches would
dominate, a block of columns is one Triton kernel (kernel.py).
"""

import torch

from harness.quant.grid import Grid, QuantizedWeight, round_to_codes, weight_scales
from sparse.masks import n_of_m, of_tensor

OUTER, INNER = 128, 32


def solve(
    weight: torch.Tensor,
    factor: torch.Tensor,
    *,
    sparsity: float = 0.0,
    n: int = 0,
    m: int = 0,
    blocksize: int = OUTER,
    grid: Grid | None = None,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
) -> tuple[QuantizedWeight | torch.Tensor, torch.Tensor]:
    """Prune [O, I] so that its output error under H is small.

    Args:
        weight: [O, I] float32 (float64 in tests); not modified. Columns of dead inputs are zero.
        factor: R [I, I] of H.
        sparsity: share that goes, of every ``blocksize`` columns together; unused with ``m``.
        n, m: drop n of every m columns, row by row; m divides I.
        grid: also quantize what stays, its scales found on ``weight`` itself.
        dtype: of the stored weight; errors are those of the rounded stored values.
        scale_dtype: of the stored scales (default ``dtype``).

    Returns:
        The pruned weight, [O, I] in ``dtype`` or quantized (a dropped weight has its group's zero
        point as code), and the squared errors per row [O]: their sum is the objective.
    """
    rows, columns = weight.shape
    work = weight.T.contiguous()  # [I, O]
    dropped = torch.empty(columns, rows, dtype=torch.bool, device=weight.device)
    scale = zero = codes = None
    if grid is not None:
        scale_dtype = scale_dtype or dtype
        scale, zero = weight_scales(weight, grid, scale_dtype)
        scale, zero = scale.T.contiguous(), zero.T.contiguous()  # [G, O]
        group = torch.arange(columns, device=weight.device) // grid.columns_per_group(columns)
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    loss = weight.new_zeros(rows)
    diagonal = factor.diagonal()[:, None]
    column_loop = _pick_loop(weight)
    outer, inner = blocksize, INNER if column_loop is torch_loop else OUTER
    if m:
        outer, inner = m * max(1, OUTER // m), m * max(1, inner // m)

    for start in range(0, columns, outer):
        end = min(start + outer, columns)
        errors = torch.empty_like(work[start:end])
        if not m:
            dropped[start:end] = of_tensor(
                (work[start:end] / diagonal[start:end]).square_(), sparsity
            )
        for first in range(start, end, inner):
            last = min(first + inner, end)
            here = slice(first, last)
            grid_here = None
            if grid is not None:
                grid_here = (scale[group[here]], zero[group[here]], grid.max_code, codes[here])
            errors_here = errors[first - start : last - start]
            column_loop(
                work[here], factor[here, here], dropped[here], n, m, grid_here, dtype, errors_here
            )
            if last < end:
                work[last:end].addmm_(factor[here, last:end].T, errors_here, alpha=-1)
        loss += errors.square().sum(dim=0)
        if end < columns:
            work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)

    if grid is None:
        return work.T.to(dtype).contiguous(), loss
    quantized = QuantizedWeight(
        codes.T.contiguous(),
        scale.T.to(scale_dtype).contiguous(),
        zero.T.to(torch.uint8).contiguous(),
        grid,
    )
    return quantized, loss


def torch_loop(work, factor, dropped, n, m, grid, dtype, errors) -> None:
    """Algorithm 1's inner loop over the columns of one block.

    Shapes:
        work [B, O], holds the pruned columns afterwards; factor [B, B];
        dropped [B, O] bool, filled here for n of m; errors [B, O], filled here;
        grid: None, or (scale [B, O], zero [B, O], largest code, codes [B, O] uint8, filled here).
    """
    diagonal = factor.diagonal()
    pivots = diagonal.tolist()
    exact = dtype in (torch.float32, torch.float64)
    for j in range(len(work)):
        if m and j % m == 0:
            scores = (work[j : j + m] / diagonal[j : j + m, None]).square_()
            dropped[j : j + m] = n_of_m(scores.T, n, m).T
        column = work[j]
        value = column.masked_fill(dropped[j], 0)
        if grid is not None:
            scale, zero, max_code, codes = grid
            code = round_to_codes(value, scale[j], zero[j], max_code)
            codes[j] = code
            value = code.sub_(zero[j]).mul_(scale[j])
        if not exact:
            value = value.to(dtype).to(column.dtype)
        error = torch.sub(column, value, out=errors[j]).div_(pivots[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        column.copy_(value)


def _pick_loop(weight: torch.Tensor):
    if weight.is_cuda:
        from sparse.kernel import triton_loop

        return triton_loop
    return torch_loop
