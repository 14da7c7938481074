"""Integer grids: find scale and zero point, round, dequantize. The only place that knows how.

Legend: O rows (out features), I columns (in features), G groups per row, g = group size = I / G.

A grid maps codes 0 .. 2^bits - 1 to values ``scale * (code - zero)``. Symmetric grids have
``zero = 2^(bits-1)``, which is what signed formats call zero. Scales are rounded to the dtype that
the checkpoint will store *before* any weight is rounded, so that a stored model is the evaluated
model, bit for bit.
"""

import math
from dataclasses import dataclass

import torch

from harness.errors import UserError

BITS = range(2, 9)

# Range search of the GPTQ code base: shrink the min-max range in steps of 1/100 down to 1/5 and
# keep, per row, the range whose sum of |error|^2.4 is least.
MSE_STEPS = 100
MSE_SHRINK = 0.8
MSE_NORM = 2.4


@dataclass(frozen=True)
class Grid:
    """What a user asks for: ``bits`` 2-8, ``group_size`` columns per scale (-1: one per row)."""

    bits: int
    group_size: int = -1
    symmetric: bool = False
    mse: bool = False

    def __post_init__(self):
        if self.bits not in BITS:
            raise UserError(f"bits is {self.bits}; expected one of 2, 3, 4, 5, 6, 7 or 8.")
        check_size(self.group_size)

    def columns_per_group(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1


@dataclass
class QuantizedWeight:
    """Codes and grid of one matrix.

    Shapes:
        codes [O, I] uint8; scale [O, G] in the stored dtype; zero [O, G] uint8; order [I] int64,
        the group of each column, None where they lie in order (as in all that is made here).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    grid: Grid
    order: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Values [O, I] in ``dtype``: one float32 product, one rounding.

        The difference of two codes has at most 8 significant bits, so for 16-bit scales the
        product is exact in float32 and equals what any reader computes in the scale's own dtype.
        """
        if self.order is not None:
            zero, scale = (t.float()[:, self.order] for t in (self.zero, self.scale))
            return ((self.codes.float() - zero) * scale).to(dtype)
        g = self.grid.columns_per_group(self.codes.shape[1])
        steps = self.codes.float().unflatten(1, (-1, g)) - self.zero.float().unsqueeze(2)
        return (steps * self.scale.float().unsqueeze(2)).flatten(1).to(dtype)


def find_scale_zero(
    values: torch.Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of ``values``.

    Args:
        values: [N, g] float32, one group per row.
        grid: bits, symmetry, and whether to search the range (``mse``).
        scale_dtype: dtype in which the scale will be stored.

    Returns:
        scale [N] and zero [N], float32; the scale is representable in ``scale_dtype``.

    The min-max range always holds zero; an all-zero row gets the range [-1, 1].
    """
    low, high = _holding_zero(values.amin(dim=1), values.amax(dim=1), grid)
    scale, zero = range_scale_zero(low, high, grid, scale_dtype)
    if not grid.mse:
        return scale, zero

    best = torch.full_like(low, torch.inf)
    for step in range(int(MSE_SHRINK * MSE_STEPS)):
        share = 1 - step / MSE_STEPS
        try_scale, try_zero = range_scale_zero(share * low, share * high, grid, scale_dtype)
        codes = round_to_codes(values, try_scale[:, None], try_zero[:, None], grid.max_code)
        error = values - (codes - try_zero[:, None]) * try_scale[:, None]
        error = error.abs_().pow_(MSE_NORM).sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, try_scale, scale)
        zero = torch.where(better, try_zero, zero)
    return scale, zero


def _holding_zero(low, high, grid: Grid):
    """The range that a grid spans for values with these extremes."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = (low == 0) & (high == 0)
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def range_scale_zero(
    low: torch.Tensor, high: torch.Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, float32, of ranges low <= 0 <= high, float32, all of one shape.

    A symmetric grid takes ``high = -low``. The scale is representable in ``scale_dtype``.
    """
    smallest = torch.finfo(scale_dtype).tiny
    scale = ((high - low) / grid.max_code).clamp(smallest, torch.finfo(scale_dtype).max)
    scale = scale.to(scale_dtype).float()
    if grid.symmetric:
        zero = torch.full_like(scale, 2 ** (grid.bits - 1))
    else:
        zero = torch.round(-low / scale).clamp_(0, grid.max_code)
    return scale, zero


def round_to_codes(values, scale, zero, max_code: int) -> torch.Tensor:
    """Nearest codes, as float32: clamp(round(values / scale) + zero, 0, max_code)."""
    return torch.round(values / scale).add_(zero).clamp_(0, max_code)


def weight_scales(
    weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [O, G] and zero [O, G] (float32) of a whole matrix [O, I] float32."""
    g = grid.columns_per_group(weight.shape[1])
    check_group_size({"this matrix": weight.shape[1]}, grid)
    scale, zero = find_scale_zero(weight.reshape(-1, g), grid, scale_dtype)
    return scale.view(len(weight), -1), zero.view(len(weight), -1)


def nearest(weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Round-to-nearest: every value of [O, I] float32 to the closest point of its group's grid."""
    scale, zero = weight_scales(weight, grid, scale_dtype)
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    codes = round_to_codes(grouped, scale[..., None], zero[..., None], grid.max_code).flatten(1)
    return QuantizedWeight(codes.to(torch.uint8), scale.to(scale_dtype), zero.to(torch.uint8), grid)


def snap(
    values: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Values clamped to a range, then moved to the nearest point of the grid that it spans.

    What :func:`nearest` makes of the clamped values where both ends are among them; a range
    without zero is widened to it, ``grid.mse`` is not heeded.

    Args:
        values: [N, g] float32, one group per row. low, high: [N] float32, low <= high.

    Returns:
        [N, g] float32: scale * (code - zero).
    """
    scale, zero = range_scale_zero(*_holding_zero(low, high, grid), grid, scale_dtype)
    # Rounding keeps the order, so that steps are clamped to those of both ends, in place, where
    # clamping the values would cost a copy.
    first, last = (
        round_to_codes(end, scale, zero, grid.max_code).sub_(zero)[:, None] for end in (low, high)
    )
    scale = scale[:, None]
    steps = torch.div(values, scale).round_()
    torch.maximum(steps, first, out=steps)
    torch.minimum(steps, last, out=steps)
    return steps.mul_(scale)


def check_size(group_size: int) -> None:
    """Raise :class:`UserError` for what is no group size at all."""
    if group_size == 0 or group_size < -1:
        raise UserError(
            f"group size is {group_size}; expected -1 (one group per row) or a positive number of "
            "columns."
        )


def check_group_size(columns: dict[str, int], grid: Grid) -> None:
    """Raise :class:`UserError`, naming the linears, when the group size does not divide them all.

    ``columns`` maps the name of every linear to its number of input columns.
    """
    if grid.group_size == -1:
        return
    bad = [f"{name} ({width})" for name, width in columns.items() if width % grid.group_size]
    if bad:
        common = math.gcd(*columns.values())
        fitting = [g for g in (256, 128, 64, 32, 16, 8) if common % g == 0]
        hint = f"try {fitting[0]}" if fitting else "use -1 (one group per row)"
        few = sorted({name.split(" ")[0].rpartition(".")[2] for name in bad})
        if len(bad) < len(columns):
            hint += f", or leave them dense: {' '.join(f'--ignore {name}' for name in few)}"
        raise UserError(
            f"group size {grid.group_size} does not divide the input columns of {', '.join(bad)}; "
            f"{hint}."
        )
