"""How far a compressed model's next-token distributions are from the dense one's: a metric."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from harness.errors import UserError
from harness.losses.divergence import forward_kl, reverse_kl, top1_agreement
from harness.metrics.perplexity import model_logits
from harness.progress import track


@dataclass(frozen=True)
class Distance:
    """Per token, over the same windows: KL(dense || compressed) and KL(compressed || dense) in
    nats, and the share of tokens on which both models' first choices agree."""

    forward_kl: float
    reverse_kl: float
    top1_agreement: float
    tokens: int


def compare_logits(
    dense: Iterable[tuple[int, Tensor]], compressed: Iterable[tuple[int, Tensor]], windows: int
) -> Distance:
    """`Distance` of two streams of (start, logits [B, T, V]) over the same `windows` windows.

    Raises UserError when the vocabularies differ or logits hold a NaN.
    """
    sums, tokens = [0.0, 0.0, 0.0], 0
    bar = track(range(windows), "divergence")
    for (start, p), (other, q) in zip(dense, compressed, strict=True):
        if p.shape[-1] != q.shape[-1]:
            raise UserError(
                f"the models' vocabularies differ ({p.shape[-1]} and {q.shape[-1]} tokens): "
                "divergence needs the dense original of the compressed model"
            )
        assert start == other and p.shape == q.shape
        for row_p, row_q in zip(p, q.to(p.device), strict=True):
            next(bar)
            measures = (forward_kl, reverse_kl, top1_agreement)
            values = [measure(row_p, row_q).item() for measure in measures]
            if any(math.isnan(v) for v in values):
                raise UserError(
                    f"logits of window {start} contain NaN: the weights are damaged, or the dtype "
                    "overflows (try --dtype bfloat16 or float32)"
                )
            sums = [s + v * len(row_p) for s, v in zip(sums, values, strict=True)]
            tokens += len(row_p)
    next(bar, None)
    if not tokens:
        raise UserError("divergence needs at least one window")
    return Distance(*(s / tokens for s in sums), tokens)


def compare_models(dense, compressed, windows: Tensor, batch_size: int = 1) -> Distance:
    """`Distance` of two transformers causal LMs on windows int64 [N, T], a batch at a time."""
    streams = (model_logits(model, windows, batch_size) for model in (dense, compressed))
    return compare_logits(*streams, windows=len(windows))
