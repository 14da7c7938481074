"""Asymmetric clipping: for every group of weights the range whose rounding hurts the output least.

Legend: O rows (out features), I columns (in features), G groups per row, g = group size = I / G,
K = 10 candidates for each end.

Method of the paper (arXiv:2402.10631, section 3.1) with its code's candidates: both ends of a
group's min-max range shrink independently, by 0, 5 ... 45 %. A group's error is the mean over
tokens of (x·snap(w) - x·w)², x being its inputs. With d = snap(w) - w and the moments
H = mean(x xᵀ) that is dᵀ H d for any number of tokens, so that no token is looked at twice.

Cost per weight. Integers: every range has another scale, so all K² = 100 quantizations are needed
and a product with H for each, of which symmetry saves almost half: the floor is K² (g / 2
multiply-adds and 7 elementwise operations), memory traffic that of reading the weight once, as
chunks of rows stay in the cache. Measured on one thread at g = 128: 2.9 ns per weight and
candidate, where the floor's multiply-adds take 1.2 at the speed of a large product. NormalFloat:
values above zero depend on the upper end alone, those below on the lower one, so 2 K quantizations;
the error is bilinear in the two parts: 2 K g + K² multiply-adds.
"""

import torch

from harness.quant.grid import Grid, snap
from harness.quant.normal_float import NormalFloat
from harness.quant.normal_float import snap as snap_to_levels

SHARES = tuple(1 - i / 20 for i in range(10))
CPU_CHUNK, CUDA_CHUNK = 2**18, 2**25  # weights
COLUMN_BLOCKS = 4
ELEMENTWISE = 2.4  # time of the integer search over that of its multiply-adds, as measured above


def search(
    weight: torch.Tensor,
    moments: torch.Tensor,
    grid: Grid | NormalFloat,
    dtype: torch.dtype,
    scale_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best range of every group, and what it saves.

    Args:
        weight: [O, I] float32 (float64 in tests), its values representable in ``dtype``.
        moments: [G, g, g], the mean of x xᵀ over tokens for every group's inputs x.
        dtype: of the clamped weights. Candidates are rounded to it, so that clamped weights stored
            in it have exactly these extremes.
        scale_dtype: of the stored scales (default ``dtype``).

    Returns:
        low [O, G] and high [O, G], low <= 0 <= high, representable in ``dtype``; the summed error
        of each row's groups before [O] and after [O]. Among equal errors the first candidate wins,
        the upper end in the outer loop: nothing is clipped that gains nothing.
    """
    chunk = CUDA_CHUNK if weight.is_cuda else CPU_CHUNK
    best = _best_integers
    if isinstance(grid, NormalFloat):
        best, chunk = _best_levels, chunk // 4  # all candidates of a chunk are in memory together
    low, high = full_range(weight, grid)
    before, after = (torch.zeros_like(weight[:, 0]) for _ in range(2))
    for rows, k, values in _chunks(weight, len(moments), chunk):
        lows, highs = _candidates(low[rows, k], dtype), _candidates(high[rows, k], dtype)
        i, j, first, least = best(values, moments[k], lows, highs, grid, scale_dtype or dtype)
        high[rows, k] = highs.gather(0, i[None])[0]
        low[rows, k] = lows.gather(0, j[None])[0]
        before[rows] += first
        after[rows] += least
    return low, high, before, after


def work(rows: int, columns: int, grid: Grid | NormalFloat) -> float:
    """Multiply-adds of :func:`search` for a linear, or what takes as long."""
    g, candidates = grid.columns_per_group(columns), len(SHARES)
    if isinstance(grid, NormalFloat):
        return rows * columns * (2 * candidates * g + candidates**2)
    return rows * columns * candidates**2 * g / 2 * ELEMENTWISE


def full_range(weight: torch.Tensor, grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's min-max range, widened to hold zero: low [O, G], high [O, G]."""
    grouped = weight.unflatten(1, (-1, grid.columns_per_group(weight.shape[1])))
    return grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)


def clamp(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """[O, I] with every group clamped to its range."""
    grouped = weight.unflatten(1, (low.shape[1], -1))
    return grouped.clamp(low[..., None], high[..., None]).flatten(1)


def output_energy(vectors: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Σ over groups of dᵀ H d for the rows d of [O, I], with moments [G, g, g]: [O]."""
    total = torch.zeros_like(vectors[:, 0])
    for rows, k, part in _chunks(vectors, len(moments), CPU_CHUNK):
        total[rows] += _energy(part, _triangle(moments[k]), torch.empty_like(part))
    return total


def _chunks(matrix: torch.Tensor, groups: int, size: int):
    """(rows, group, values [N, g]) over all of [O, I], about ``size`` values at a time."""
    g = matrix.shape[1] // groups
    step = max(1, size // g)
    for k, columns in enumerate(matrix.split(g, dim=1)):
        for start in range(0, len(matrix), step):
            rows = slice(start, start + step)
            yield rows, k, columns[rows].contiguous()


def _candidates(end: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[K, N] shrunken ends from the full ones [N]."""
    return (end.new_tensor(SHARES)[:, None] * end).to(dtype).to(end.dtype)


def _triangle(moments: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Blocks of columns of the lower triangle T with dᵀ T d = dᵀ H d, with their first column, from
    which row on they are."""
    lower = moments.tril() + moments.tril(-1)
    width = -(-len(lower) // COLUMN_BLOCKS)
    starts = range(0, len(lower), width)
    return [(c, lower[c:, c : c + width].contiguous()) for c in starts]


def _energy(vectors, triangle, products) -> torch.Tensor:
    """dᵀ H d for every row d of [N, g]; ``products`` [N, g] is overwritten."""
    for column, block in triangle:
        torch.mm(vectors[:, column:], block, out=products[:, column : column + block.shape[1]])
    return torch.linalg.vecdot(vectors, products)


def _best_integers(values, moments, lows, highs, grid, scale_dtype):
    """Indices i of the upper and j of the lower end [N], first error [N], least error [N]."""
    triangle, products = _triangle(moments), torch.empty_like(values)
    first = least = best = None
    for index in range(len(highs) * len(lows)):
        i, j = divmod(index, len(lows))
        change = snap(values, lows[j], highs[i], grid, scale_dtype).sub_(values)
        error = _energy(change, triangle, products)
        if first is None:
            first, least, best = error, error.clone(), torch.zeros_like(error, dtype=torch.long)
        best.masked_fill_(error < least, index)
        torch.minimum(error, least, out=least)
    return best // len(lows), best % len(lows), first, least


def _best_levels(values, moments, lows, highs, grid, scale_dtype):
    """The same for NormalFloat, where no candidate of one end touches the other's values."""
    above, below, zero = values.clamp(min=0), values.clamp(max=0), torch.zeros_like(lows[0])
    up = [snap_to_levels(above, zero, high, grid, scale_dtype) - above for high in highs]
    down = [snap_to_levels(below, low, zero, grid, scale_dtype) - below for low in lows]
    up, down = torch.stack(up, dim=1), torch.stack(down, dim=1)  # [N, K, g]
    products = up @ moments
    error = 2 * products @ down.mT  # [N, K, K]
    error += torch.linalg.vecdot(products, up)[:, :, None]
    error += torch.linalg.vecdot(down @ moments, down)[:, None, :]
    least, best = error.flatten(1).min(dim=1)
    return best // len(lows), best % len(lows), error[:, 0, 0], least
