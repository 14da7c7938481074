"""Which groups stay, from their scores: the same share everywhere, or one threshold for all.

A part is what is cut as one: the heads of one block, the channels of one MLP, the model's hidden
channels. Its state is a mask of its groups, True for those that stay.
"""

import torch

from harness.errors import UserError


def rounded(groups: int, share: float, multiple: int) -> int:
    """``share`` of ``groups``, to the nearest multiple; never more than there are."""
    whole = multiple if groups >= multiple else 1
    return min(groups, int(groups * share / whole + 0.5) * whole)


def uniform(
    scores: dict[str, torch.Tensor],
    alive: dict[str, torch.Tensor],
    ratio: float,
    multiples: dict[str, int],
) -> dict[str, torch.Tensor]:
    """Masks that keep of every part the 1 - ratio of its groups with the highest scores.

    Args:
        scores: [G] by part. alive: [G] bool by part; dead groups stay dead.
        ratio: share of all groups that are dead in the end.
        multiples: by part, what the number of kept groups is a multiple of.
    """
    return {
        part: _highest(scores[part], mask, rounded(len(mask), 1 - ratio, multiples[part]))
        for part, mask in alive.items()
    }


def by_one_threshold(
    scores: dict[str, torch.Tensor],
    alive: dict[str, torch.Tensor],
    ratio: float,
    multiples: dict[str, int],
) -> dict[str, torch.Tensor]:
    """As :func:`uniform`, with the lowest ``ratio`` of the groups of all parts together taken out,
    a head and a channel being one group each, their scores compared as they are (the original's
    rule). Counts are rounded, and no part is left empty."""
    together = torch.cat(
        [scores[part].masked_fill(~mask, float("-inf")) for part, mask in alive.items()]
    )
    out = int(len(together) * ratio)
    threshold = together.sort().values[out - 1] if out else float("-inf")
    masks = {}
    for part, mask in alive.items():
        above = int((mask & (scores[part] > threshold)).sum())
        count = rounded(len(mask), above / len(mask), multiples[part])
        least = multiples[part] if len(mask) >= multiples[part] else 1
        masks[part] = _highest(scores[part], mask, max(least, count))
    return masks


def _highest(scores: torch.Tensor, alive: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` living groups with the highest scores; the earlier ones of equals."""
    ranked = scores.masked_fill(~alive, float("-inf")).argsort(descending=True, stable=True)
    mask = torch.zeros_like(alive)
    mask[ranked[: min(count, int(alive.sum()))]] = True
    return mask


def check_counts(groups: dict[str, int], ratio: float, multiples: dict[str, int]) -> None:
    """Raise :class:`UserError` where ``ratio`` would leave a part (name -> groups) with nothing."""
    for part, count in groups.items():
        if rounded(count, 1 - ratio, multiples[part]) == 0:
            of = f"a multiple of {multiples[part]} of " if 1 < multiples[part] <= count else ""
            raise UserError(
                f"--pruning_ratio {ratio:g} leaves none of the {count} groups of {part} (kept is "
                f"{of}what is nearest to {count * (1 - ratio):g}); take a smaller ratio."
            )
