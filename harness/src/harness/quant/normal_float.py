"""NormalFloat grids: few levels, denser near zero, with a scale for each sign.

Legend: O rows (out features), I columns (in features), G groups per row, g = group size = I / G.

A group's values are ``high * level`` for levels above zero and ``-low * level`` for those below,
low and high being its extremes: no zero point, no integer codes, so that only dense checkpoints
hold such a weight. NF4 is QLoRA's (arXiv:2305.14314, appendix E, there with one scale for both
signs); NF3 with two scales is BitDistiller's (arXiv:2402.10631, section 3.1).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from harness.errors import UserError
from harness.quant.grid import check_size

LEVELS = {
    3: (
        -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
        0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
    ),
    4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class NormalFloat:
    """What a user asks for: ``bits`` 3 or 4, ``group_size`` columns per pair of scales (-1: one
    pair per row)."""

    bits: int
    group_size: int = -1

    def __post_init__(self):
        if self.bits not in LEVELS:
            raise UserError(f"bits is {self.bits}; NormalFloat has levels for 3 and 4.")
        check_size(self.group_size)

    def columns_per_group(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    @cached_property
    def levels(self) -> torch.Tensor:
        """[2^bits] float32, ascending from -1 to 1."""
        return torch.tensor(LEVELS[self.bits])

    @cached_property
    def thresholds(self) -> torch.Tensor:
        """[2^bits - 1] float32, midway between levels; a value on one goes to the upper level."""
        exact = torch.tensor(LEVELS[self.bits], dtype=torch.float64)
        return ((exact[1:] + exact[:-1]) / 2).float()


def snap(
    values: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    grid: NormalFloat,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Values clamped to a range, then moved to the nearest of the levels that it scales.

    Args:
        values: [N, g] float32, one group per row. low, high: [N] float32; a range without zero is
            widened to it.
        scale_dtype: the dtype to which both scales are rounded.

    Returns:
        [N, g] float32: level * scale of its sign.
    """
    finfo = torch.finfo(scale_dtype)
    above, below = (
        end.clamp(0, finfo.max).to(scale_dtype).to(values)[:, None] for end in (high, -low)
    )
    shares = torch.div(values, torch.where(above > 0, above, 1)).clamp_(min=0)
    shares += torch.div(values, torch.where(below > 0, below, 1)).clamp_(max=0)
    # Counting comparisons takes a quarter of the time of torch.bucketize, whose binary search
    # cannot be foreseen by the processor.
    index = torch.zeros_like(values, dtype=torch.uint8)
    for threshold in grid.thresholds.tolist():
        index += (shares >= threshold).view(torch.uint8)
    levels = grid.levels.to(values).index_select(0, index.flatten().int()).view_as(values)
    return levels.clamp(min=0).mul_(above).add_(levels.clamp_(max=0).mul_(below))


def nearest(weight: torch.Tensor, grid: NormalFloat, scale_dtype: torch.dtype) -> torch.Tensor:
    """Every value of [O, I] float32 moved to the closest level of its group; [O, I] float32."""
    g = grid.columns_per_group(weight.shape[1])
    values = weight.reshape(-1, g)
    return snap(values, values.amin(dim=1), values.amax(dim=1), grid, scale_dtype).view_as(weight)
