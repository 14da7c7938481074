"""Which weights go: masks from scores. A mask is True where a weight is dropped.

Legend: R rows that are compared within themselves, C columns, n of every m consecutive columns.

Ties are resolved as a stable sort resolves them, the earlier column first: 16-bit weights tie
often, and the number of dropped weights must not depend on it.
"""

import torch

PAIRWISE = 8
VARIANT_ALPHA = 0.8
VARIANT_TOLERANCE = 1e-3
VARIANT_STEPS = 50  # ties can keep the sparsity from ever being met


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask [R, C] of the ``count`` smallest scores of every row of [R, C].

    A selection in linear time, in place of a sort of every row.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    edge = scores.kthvalue(count, dim=1, keepdim=True).values
    mask = scores <= edge
    surplus = (mask.sum(dim=1) > count).nonzero().flatten()
    if len(surplus):
        some, edge = scores[surplus], edge[surplus]
        below, ties = some < edge, some == edge
        wanted = count - below.sum(dim=1, keepdim=True, dtype=torch.int32)
        mask[surplus] = below | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= wanted))
    return mask


def of_rows(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The int(C * sparsity) smallest of every row go (Wanda, arXiv:2306.11695, section 3)."""
    return smallest(scores, int(scores.shape[1] * sparsity))


def of_tensor(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The int(R * C * sparsity) smallest of the whole matrix go, wherever they are."""
    return smallest(scores.reshape(1, -1), int(scores.numel() * sparsity)).view(scores.shape)


def n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The ``n`` smallest of every ``m`` consecutive columns go, row by row; m divides C."""
    groups = scores.unflatten(1, (-1, m))  # [R, C / m, m]
    if m > PAIRWISE:
        order = groups.argsort(dim=2, stable=True)
        return (
            torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :n], True).flatten(1)
        )
    # How many of its group a score stands behind: m (m - 1) / 2 comparisons beat sorts of m.
    rank = torch.zeros(groups.shape, dtype=torch.uint8, device=scores.device)
    for right in range(1, m):
        for left in range(right):
            behind = groups[..., right] < groups[..., left]
            rank[..., left] += behind
            rank[..., right] += ~behind
    return (rank < n).flatten(1)


def of_mass(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Wanda's variant (its appendix, and --use_variant there): rows differ in how many they lose.

    Every row drops its smallest scores up to a share alpha of the row's sum, one alpha for all
    rows, found by bisection in [0, 0.8], as there, until the sparsity is met to 0.001. Where 0.8 of
    the mass is too little, in [0.8, 1].
    """
    values, order = scores.sort(dim=1, stable=True)
    mass = values.cumsum(dim=1)
    total = mass[:, -1:]

    def counts(alpha):
        return torch.searchsorted(mass, alpha * total, right=True)  # [R, 1]

    def reached(count):
        return count.sum().item() / scores.numel()

    low, high = 0.0, VARIANT_ALPHA
    if reached(counts(high)) < sparsity:
        low, high = high, 1.0
    for _ in range(VARIANT_STEPS):
        alpha = (low + high) / 2
        count = counts(alpha)
        excess = reached(count) - sparsity
        if abs(excess) <= VARIANT_TOLERANCE:
            break
        low, high = (low, alpha) if excess > 0 else (alpha, high)
    place = torch.arange(scores.shape[1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, place < count)
