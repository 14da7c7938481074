"""What SparseGPT, Wanda and magnitude pruning do with one stage: matrices in, updates out.

Legend: O out features, I in features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness import distributed
from harness.blocks.sequential import Update
from harness.errors import UserError
from harness.quant.grid import Grid, QuantizedWeight
from harness.quant.hessian import inverse_factor
from sparse import masks
from sparse.solver import solve

ROWS_FOR_NORM = 256


@dataclass(frozen=True)
class Target:
    """How much goes: ``n`` of every ``m`` columns, or where ``m`` is 0 the share ``sparsity``."""

    sparsity: float
    n: int = 0
    m: int = 0


class Norms:
    """Running sum of squares of every input column, float64: no input is kept.

    Squares are float32 and sums float64, so that the result does not depend on how batches are
    dealt out to ranks (to 1e-16, so after rounding to float32 not at all, almost always).
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs [..., I] of any float dtype."""
        x = inputs.flatten(0, -2)
        self.tokens += len(x)
        self.total += x.float().square().sum(dim=0, dtype=torch.float64)

    def reduce(self) -> None:
        """Sum over the ranks of the process group, if there is one."""
        self.tokens = distributed.sum_number(self.tokens)
        distributed.sum_in_place(self.total)

    def root_mean_square(self) -> torch.Tensor:
        """[I] float32. Wanda's sqrt(mean over sequences ‖x_j‖²) is this times a constant, and the
        masks are the same."""
        return (self.total / max(self.tokens, 1)).sqrt().float()


def sparsegpt(
    target: Callable[[int, str], Target | None], dtype: torch.dtype, *, percdamp: float,
    blocksize: int, grid: Grid | None, scale_dtype: torch.dtype,
):  # fmt: skip
    """SparseGPT's update; ``target(block, name)`` says how much goes, or None to leave a linear.
    ``dtype``, ``scale_dtype``: of the stored values and scales.

    Linears of a stage share the Hessian and its factor. Each is solved alone, because the masks'
    thresholds are per linear; all ranks solve all of them, because a threshold spans all rows.
    """

    def update(matrices, hessian, hand):
        chosen = _chosen(matrices, target, hand)
        if not chosen:
            return {}
        matrix = hessian.mean()
        diagonal = matrix.diagonal()
        _check_finite(diagonal, matrices, hand)
        dead = diagonal == 0
        diagonal[dead] = 1
        try:
            factor, damping = inverse_factor(matrix, percdamp, f"{hand} {'/'.join(matrices)}")
        except ArithmeticError as error:
            raise UserError(
                f"{error} Give more or other calibration text, or a larger --percdamp."
            ) from error
        note = {} if damping == percdamp else {"percdamp": damping}
        updates = {}
        for name, goal in chosen.items():
            if goal.sparsity == 0 and grid is None:
                updates[name] = _update(matrices[name], dtype, 0.0)
                continue
            weight = matrices[name].masked_fill(dead, 0)
            result, loss = solve(
                weight, factor, sparsity=goal.sparsity, n=goal.n, m=goal.m, blocksize=blocksize,
                grid=grid, dtype=dtype, scale_dtype=scale_dtype,
            )  # fmt: skip
            change = weight - _stored(result, dtype)
            # What the solver minimized counts the damping too; pruning's large steps feel it.
            loss = loss.sum() - damping * diagonal.mean() * change.square().sum()
            # The mean over evenly spaced rows stands for all: it is a denominator, for print.
            some = weight[:: -(-len(weight) // ROWS_FOR_NORM)]
            norm = ((some @ matrix) * some).sum(dim=1).mean().clamp_min(1e-30)
            error = (loss / len(weight) / norm).clamp_min(0).item()
            updates[name] = _update(result, dtype, error, note)
        return updates

    return update


def wanda(target, dtype: torch.dtype, *, variant: bool):
    """Wanda's update: what has the least |weight| x norm of its input goes, nothing is repaid.

    The error is that of inputs without correlations, all that the norms can tell.
    """

    def update(matrices, norms, hand):
        scale = norms.root_mean_square()
        _check_finite(scale, matrices, hand)
        updates = {}
        for name, goal in _chosen(matrices, target, hand).items():
            weight = matrices[name]
            scores = weight.abs() * scale
            if goal.m:
                mask = masks.n_of_m(scores, goal.n, goal.m)
            elif variant:
                mask = masks.of_mass(scores, goal.sparsity)
            else:
                mask = masks.of_rows(scores, goal.sparsity)
            squares = scores.square_()
            error = squares[mask].sum() / squares.sum().clamp_min(1e-30)
            updates[name] = _update(weight.masked_fill(mask, 0), dtype, error.item())
        return updates

    return update


def magnitude(target, dtype: torch.dtype, *, per_row: bool):
    """Magnitude pruning: the smallest of the whole matrix go, or of every row. Looks at no data."""

    def update(matrices, statistics, hand):
        updates = {}
        for name, goal in _chosen(matrices, target, hand).items():
            weight, scores = matrices[name], matrices[name].abs()
            if goal.m:
                mask = masks.n_of_m(scores, goal.n, goal.m)
            else:
                mask = (masks.of_rows if per_row else masks.of_tensor)(scores, goal.sparsity)
            updates[name] = _update(weight.masked_fill(mask, 0), dtype, None)
        return updates

    return update


def _chosen(matrices, target, hand) -> dict[str, Target]:
    goals = {name: target(hand.index, name) for name in matrices}
    return {name: goal for name, goal in goals.items() if goal is not None}


def _check_finite(values: torch.Tensor, matrices, hand) -> None:
    if not torch.isfinite(values).all():
        raise UserError(
            f"{hand}: the inputs of {', '.join(matrices)} hold NaN or infinite values; try "
            "--dtype bfloat16 or float32."
        )


def _update(weight, dtype, error, note=()) -> Update:
    """The result, its number of zeros as stored noted for the log."""
    zeros = (_stored(weight, dtype) == 0).sum().item()
    return Update(weight, error, {"zeros": zeros, **dict(note)})


def _stored(weight, dtype: torch.dtype) -> torch.Tensor:
    """The values that a checkpoint in ``dtype`` holds."""
    packed = isinstance(weight, QuantizedWeight)
    return weight.dequantize(dtype) if packed else weight.to(dtype)
