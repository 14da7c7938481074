"""The column loop of solver.py as one Triton kernel per block, for CUDA.

A program owns a tile of rows and keeps their B columns in registers; it walks the columns as
torch_loop does, its oracle in the tests, n:m masks included. Only primitives that Triton's
interpreter knows are used, so that the kernel is tested without a GPU too.
"""

import torch
import triton
import triton.language as tl

TILE = 32
ROUND = tl.constexpr(1.5 * 2**23)
LARGE = tl.constexpr(1e6)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# Triton passes every stride.
@triton.jit
def _columns(  # noqa: PLR0913
    work, factor, dropped, errors, scale, zero, codes, rows, columns, factor_stride, n, max_code,
    M: tl.constexpr, QUANTIZE: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    real = row < rows
    tile = tl.load(
        work + column[:, None] * rows + row[None, :],
        mask=(column[:, None] < columns) & real[None, :],
        other=0.0,
    )
    pivots = tl.load(factor + column * (factor_stride + 1), mask=column < columns, other=1.0)
    rank = tl.zeros([BLOCK, TILE], dtype=tl.int32)
    for j in range(columns):
        pivot = tl.load(factor + j * factor_stride + j)
        if M > 0:
            if j % M == 0:
                score = tl.div_rn(tile, tl.broadcast_to(pivots[:, None], (BLOCK, TILE)))
                score = score * score
                rank = tl.zeros([BLOCK, TILE], dtype=tl.int32)
                for k in range(j, j + M):
                    other = tl.sum(tl.where(column[:, None] == k, score, 0.0), axis=0)[None, :]
                    before = (other < score) | ((other == score) & (k < column[:, None]))
                    rank += before.to(tl.int32)
            gone = tl.sum(tl.where(column[:, None] == j, rank, 0), axis=0) < n
        else:
            gone = tl.load(dropped + j * rows + row, mask=real, other=0) != 0
        w = tl.sum(tl.where(column[:, None] == j, tile, 0.0), axis=0)
        value = tl.where(gone, 0.0, w)
        if QUANTIZE:
            s = tl.load(scale + j * rows + row, mask=real, other=1.0)
            z = tl.load(zero + j * rows + row, mask=real, other=0.0)
            steps = tl.minimum(tl.maximum(tl.div_rn(value, s), -LARGE), LARGE)
            # Adding and taking away 1.5 * 2^23 leaves the nearest integer, halves to even.
            code = ((steps + ROUND) - ROUND) + z
            code = tl.minimum(tl.maximum(code, 0.0), max_code)
            tl.store(codes + j * rows + row, code.to(tl.uint8), mask=real)
            value = (code - z) * s
        if VALUE == 1:
            value = value.to(tl.bfloat16).to(tl.float32)
        if VALUE == 2:
            value = value.to(tl.float16).to(tl.float32)
        error = tl.div_rn(w - value, pivot)
        tl.store(work + j * rows + row, value, mask=real)
        tl.store(errors + j * rows + row, error, mask=real)
        later = (column > j) & (column < columns)
        pay = tl.load(factor + j * factor_stride + column, mask=later, other=0.0)
        tile -= pay[:, None] * error[None, :]


def triton_loop(work, factor, dropped, n, m, grid, dtype, errors) -> None:
    """Same arguments as :func:`sparse.solver.torch_loop` and the same results, but that ``dropped``
    is left as it was for n of m."""
    columns, rows = work.shape
    factor = factor.contiguous()
    scale, zero, max_code, codes = grid or (work, work, 0, dropped)
    _columns[(triton.cdiv(rows, TILE),)](
        work, factor, dropped.view(torch.uint8), errors, scale, zero, codes.view(torch.uint8),
        rows, columns, factor.stride(0), n, float(max_code),
        M=m, QUANTIZE=grid is not None, VALUE=DTYPES[dtype],
        BLOCK=triton.next_power_of_2(columns), TILE=TILE, num_warps=4,
    )  # fmt: skip
