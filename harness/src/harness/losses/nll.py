"""Negative log-likelihood of tokens from logits, and the perplexity that it sums to."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import UserError
from harness.progress import track

# Elements of the float32 copy of a slice of logits: 32 MB, whatever the vocabulary.
CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`nll_sum` / `tokens`); `nll_sum` in nats over `tokens` scored tokens."""

    value: float
    nll_sum: float
    tokens: int
    windows: int


def nll_sum(logits: Tensor, targets: Tensor) -> float:
    """Sum over rows of -log softmax(logits)[target], in nats.

    logits [R, V] any float dtype, targets int64 [R]. The loss is float32, a slice of rows at a
    time, so that no float32 copy of all logits exists; the sum is float64.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        loss = torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        total += loss.sum(dtype=torch.float64)
    return total.item()


def perplexity_of_logits(
    logits: Iterable[tuple[int, Tensor]], windows: Tensor, label: str = "perplexity"
) -> Perplexity:
    """Perplexity of windows int64 [N, T] from an iterator of (start, logits [B, T, V]).

    Raises UserError when the logits hold a NaN, naming the window.
    """
    count, length = windows.shape
    if count == 0 or length < 2:
        raise UserError(f"perplexity needs at least one window of 2 tokens, got {count} x {length}")
    total, scored = 0.0, 0
    bar = track(range(count), label)
    for start, batch in logits:
        for offset, row in enumerate(batch):
            next(bar)
            target = windows[start + offset, 1:].to(row.device)
            nll = nll_sum(row[:-1], target)
            if math.isnan(nll):
                raise UserError(
                    f"the model's logits for window {start + offset} contain NaN: the weights are "
                    "damaged, or the dtype overflows (try --dtype bfloat16 or float32)"
                )
            total += nll
            scored += length - 1
    next(bar, None)
    mean = total / scored
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, total, scored, scored // (length - 1))
