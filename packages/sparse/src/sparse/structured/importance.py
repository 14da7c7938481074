"""How much a group matters, from its weights and their gradients (LLM-Pruner, arXiv 2305.11627,
section 3.2, equations 3 to 5, and its repository).

A score is made in three steps: of every weight, of every row or column of a matrix that belongs to
the groups, and of a group. Everything is float32.

Legend: O rows, I columns, G groups, n members of a group in one matrix.
"""

import torch


def needs_squares(taylor: str) -> bool:
    """Whether E[g²] over the examples is wanted beside the gradient of their mean loss."""
    return taylor in ("param_second", "param_mix")


def line_scores(
    weight: torch.Tensor,
    dim: int,
    pruner: str,
    taylor: str,
    gradient: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of a matrix's rows (``dim`` 0 -> [O]) or columns (1 -> [I]); of a vector's entries.

    l1 Σ|w|, l2 Σw²; param_first Σ|w g|, param_second Σ|w² E[g²]|, param_mix Σ|w g - w² E[g²] / 2|,
    vectorize |Σ w g|.

    Args:
        weight: [O, I] or [O], any float dtype.
        gradient: of the mean loss, squares: mean of squared gradients of the examples; like weight.
    """
    w = weight.float()
    if pruner == "l1":
        salience = w.abs()
    elif pruner == "l2":
        salience = w.square()
    elif taylor in ("param_first", "vectorize"):
        salience = w * gradient
    elif taylor == "param_second":
        salience = w.square() * squares
    else:
        salience = w * gradient - 0.5 * w.square() * squares
    by_vector = pruner == "taylor" and taylor == "vectorize"
    if not by_vector:
        salience = salience.abs()
    lines = salience if salience.ndim == 1 else salience.sum(dim=1 - dim)
    return lines.abs() if by_vector else lines


def group_scores(lines: list[tuple[torch.Tensor, torch.Tensor]], strategy: str) -> torch.Tensor:
    """Scores [G] from ``(line scores, members [G, n])`` of every matrix, the members of one matrix
    summed, the matrices put together by ``strategy``."""
    each = torch.stack([scores[members.to(scores.device)].sum(dim=1) for scores, members in lines])
    if strategy == "first":
        return each[0]
    if strategy == "prod":
        return each.prod(dim=0)
    if strategy == "max":
        return each.amax(dim=0)
    return each.mean(dim=0) if strategy == "mean" else each.sum(dim=0)
