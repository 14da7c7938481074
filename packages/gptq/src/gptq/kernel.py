"""The column loop of solver.py as one Triton kernel per block, for CUDA.

A program owns a tile of rows and keeps their B columns in registers; it walks the columns as
torch_loop does, its oracle in the tests. Only primitives that Triton's interpreter knows are used,
so that the kernel is tested without a GPU too. Per block and row it moves about 13 B bytes and does
4 B² float operations.
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
    work, factor, scale, zero, codes, errors, rows, columns, factor_stride, grid_stride, max_code,
    VALUE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    real = row < rows
    tile = tl.load(
        work + column[:, None] * rows + row[None, :],
        mask=(column[:, None] < columns) & real[None, :],
        other=0.0,
    )
    for j in range(columns):
        w = tl.sum(tl.where(column[:, None] == j, tile, 0.0), axis=0)
        s = tl.load(scale + j * grid_stride + row, mask=real, other=1.0)
        z = tl.load(zero + j * grid_stride + row, mask=real, other=0.0)
        steps = tl.minimum(tl.maximum(tl.div_rn(w, s), -LARGE), LARGE)
        # Adding and taking away 1.5 * 2^23 leaves the nearest integer, halves to even.
        code = ((steps + ROUND) - ROUND) + z
        code = tl.minimum(tl.maximum(code, 0.0), max_code)
        value = (code - z) * s
        if VALUE == 1:
            value = value.to(tl.bfloat16).to(tl.float32)
        if VALUE == 2:
            value = value.to(tl.float16).to(tl.float32)
        pivot = tl.load(factor + j * factor_stride + j)
        error = tl.div_rn(w - value, pivot)
        tl.store(codes + j * rows + row, code.to(tl.uint8), mask=real)
        tl.store(errors + j * rows + row, error, mask=real)
        later = (column > j) & (column < columns)
        pay = tl.load(factor + j * factor_stride + column, mask=later, other=0.0)
        tile -= pay[:, None] * error[None, :]


def triton_loop(work, factor, scale, zero, max_code, dtype, codes, errors) -> None:
    """Same arguments and results as :func:`gptq.solver.torch_loop`; ``work`` is left as it was."""
    columns, rows = work.shape
    factor = factor.contiguous()
    grid_stride = 0 if len(scale) == 1 else rows
    _columns[(triton.cdiv(rows, TILE),)](
        work, factor, scale.contiguous(), zero.contiguous(), codes, errors,
        rows, columns, factor.stride(0), grid_stride, float(max_code),
        VALUE=DTYPES[dtype], BLOCK=triton.next_power_of_2(columns), TILE=TILE, num_warps=4,
    )  # fmt: skip
