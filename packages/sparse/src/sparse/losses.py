"""The losses of recovery: next-token cross entropy, and its mixture with a teacher's distribution.

All are sums over the targets, in float32 over a slice of rows at a time (`losses.divergence` has
the reason), from logits [B, T, V] of any dtype and targets [B, T], IGNORED where nothing is
predicted. Distillation: Hinton et al. 2015, arXiv 1503.02531, at temperature 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.losses.divergence import (
    CHUNK_ELEMENTS,
    jsd_rows,
    kl_rows,
    reverse_kl_rows,
    sum_over_rows,
)
from sparse.training import IGNORED, autocast

DIVERGENCES = {"forward_kl": kl_rows, "reverse_kl": reverse_kl_rows, "jsd": jsd_rows}


def _rows(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def cross_entropy(logits: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] in nats. The backward pass makes each slice's softmax
    again instead of keeping it."""
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    rows = max(1, CHUNK_ELEMENTS // flat.shape[-1])
    parts = zip(flat.split(rows), wanted.split(rows), strict=True)
    total = torch.zeros((), device=logits.device)
    for part, target in parts:
        total = total + checkpoint(_rows, part, target, use_reentrant=False)
    return total


def distillation(teacher, kind: str, weight: float, dtype: torch.dtype) -> Callable:
    """(1 - weight) cross entropy + weight divergence(teacher, student), as a function like
    `cross_entropy`. ``teacher`` is a causal LM in eval mode; ``kind`` a key of DIVERGENCES."""

    def loss(logits: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad(), autocast(logits.device, dtype):
            expected = teacher(input_ids=ids, use_cache=False).logits
        mask = targets != IGNORED
        total = weight * sum_over_rows(DIVERGENCES[kind], expected, logits, mask)
        if weight < 1:
            total = total + (1 - weight) * cross_entropy(logits, ids, targets)
        return total

    return loss
