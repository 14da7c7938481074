"""GPTQ's solver: round a weight column by column, each rounding error repaid by later columns.

Legend: O rows (out features), I columns (in features), g columns per group, B columns in a block.

Notation of the paper (arXiv:2210.17323, section 3.3, algorithm 1): H⁻¹ = RᵀR with R upper
triangular. For column j, q_j = round(w_j), e_j = (w_j - q_j) / R_jj, and every later column k pays
w_k -= e_j R_jk. Given R the rows of the weight are independent, and the objective
tr((W - Q) H (W - Q)ᵀ) equals the sum of all e², so the error costs nothing to report.

Cost: O I² multiply-adds, all but 32/I of them in matrix products: two levels of blocks (32 inside
128) keep the eager updates short, on a transposed weight so that a column is contiguous. On CUDA,
where launches would dominate, a block of columns is one Triton kernel (kernel.py).
"""

from collections.abc import Iterator

import torch

from harness.quant.grid import Grid, QuantizedWeight, find_scale_zero, round_to_codes, weight_scales

OUTER, INNER = 128, 32


def act_order(diagonal: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal of H: the ones that matter most are rounded first."""
    return torch.argsort(diagonal, descending=True, stable=True)


# The algorithm in its order.
def solve(  # noqa: C901
    weight: torch.Tensor,
    factor: torch.Tensor,
    grid: Grid,
    *,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    order: torch.Tensor | None = None,
    static_groups: bool = False,
    zeros: torch.Tensor | None = None,
) -> tuple[QuantizedWeight | torch.Tensor, torch.Tensor]:
    """Quantize [O, I] so that its output error under H is small.

    Args:
        weight: [O, I] float32 (float64 in tests); not modified. Columns of dead inputs are zero.
        factor: R [I, I] of H with its columns already in ``order``.
        grid: bits, group size, symmetry, range search.
        dtype: of the stored weight; errors are those of the rounded stored values.
        scale_dtype: of the stored scales (default ``dtype``).
        order: [I] permutation in which columns are rounded; None is left to right.
        static_groups: grids from the original weight, before anything is repaid, and groups made
            of neighbouring columns whatever the order.
        zeros: [O, I] bool, weights that are zero and stay so: what the earlier columns would have
            them pay is paid on by the later ones, as SparseGPT's mask has it (arXiv:2301.00774,
            algorithm 1).

    Returns:
        The quantized weight (a dense tensor where groups follow ``order``: such groups fit no
        packed format), and the squared errors per row [O]: their sum is the objective.
    """
    rows, columns = weight.shape
    scale_dtype = scale_dtype or dtype
    g = grid.columns_per_group(columns)
    static = static_groups or g == columns
    if static:
        scale, zero = weight_scales(weight, grid, scale_dtype)
        scale, zero = scale.T.contiguous(), zero.T.contiguous()  # [G, O]
    else:
        scale = weight.new_empty(columns // g, rows)
        zero = torch.empty_like(scale)
    work = (weight if order is None else weight[:, order]).T.contiguous()  # [I, O]
    group = torch.arange(columns, device=weight.device) // g
    if static and order is not None:
        group = group[order]
    kept = None
    if zeros is not None:
        kept = (zeros if order is None else zeros[:, order]).T.contiguous()  # [I, O]
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    loss = weight.new_zeros(rows)
    groups = group.tolist()
    column_loop = _pick_loop(weight, kept)

    edge = columns if static else g
    whole_groups = OUTER if edge > OUTER else edge * (OUTER // edge)
    inner = INNER if column_loop is torch_loop else OUTER
    for start, end in spans(0, columns, whole_groups, max(edge, whole_groups)):
        errors = torch.empty_like(work[start:end])
        for first, last in spans(start, end, inner, edge):
            if first % g == 0 and not static:
                values = work[first : first + g]
                if kept is not None:
                    values = values.masked_fill(kept[first : first + g], 0)
                scales = find_scale_zero(values.T, grid, scale_dtype)
                scale[first // g], zero[first // g] = scales
            same = groups[first] == groups[last - 1] and order is None
            pick = slice(groups[first], groups[first] + 1) if same else group[first:last]
            errors_here = errors[first - start : last - start]
            column_loop(
                work[first:last], factor[first:last, first:last], scale[pick], zero[pick],
                grid.max_code, dtype, codes[first:last], errors_here,
                *(() if kept is None else (kept[first:last],)),
            )  # fmt: skip
            if last < end:
                work[last:end].addmm_(factor[first:last, last:end].T, errors_here, alpha=-1)
        loss += errors.square().sum(dim=0)
        if end < columns:
            work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)

    codes, scale, zero = codes.T, scale.T, zero.T
    if order is not None:
        back = torch.argsort(order)
        if not static:
            picked = (codes.float() - zero[:, group]) * scale[:, group]
            return picked[:, back].to(dtype), loss
        codes = codes[:, back]
    quantized = QuantizedWeight(
        codes.contiguous(),
        scale.to(scale_dtype).contiguous(),
        zero.to(torch.uint8).contiguous(),
        grid,
    )
    return quantized, loss


def spans(start: int, end: int, size: int, edge: int) -> Iterator[tuple[int, int]]:
    """Cut start..end into spans of at most ``size`` columns that cross no multiple of ``edge``.

    A group's grid is found when its first column is reached, and by then all its columns must have
    been paid. Inside an inner span columns are paid at once, inside an outer one after each inner
    one, elsewhere after each outer one: so inner spans end where groups end, and outer spans hold
    whole groups or end where a group ends.
    """
    while start < end:
        stop = min(start + size, end, (start // edge + 1) * edge)
        yield start, stop
        start = stop


def torch_loop(work, factor, scale, zero, max_code, dtype, codes, errors, kept=None) -> None:
    """Algorithm 1's inner loop over the columns of one block; fills ``codes`` and ``errors``.

    Shapes:
        work [B, O], modified; factor [B, B]; scale and zero [B, O] or [1, O];
        codes [B, O] uint8; errors [B, O]; kept [B, O] bool, where the value is zero whatever the
        column has come to, or None.
    """
    shared = len(scale) == 1
    diagonal = factor.diagonal().tolist()
    exact = dtype in (torch.float32, torch.float64)
    for j in range(len(work)):
        s, z = (scale[0], zero[0]) if shared else (scale[j], zero[j])
        column = work[j]
        code = round_to_codes(column, s, z, max_code)
        if kept is not None:
            code = torch.where(kept[j], z, code)
        codes[j] = code
        value = code.sub_(z).mul_(s)
        if not exact:
            value = value.to(dtype).to(column.dtype)
        error = torch.sub(column, value, out=errors[j]).div_(diagonal[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)


def _pick_loop(weight: torch.Tensor, kept: torch.Tensor | None):
    if weight.is_cuda and kept is None:  # the kernel knows no masks
        from gptq.kernel import triton_loop

        return triton_loop
    return torch_loop
