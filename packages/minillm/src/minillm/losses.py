"""Distillation losses: row functions over two next-token distributions, and their sums.

p is the teacher, q the student. Letters: B sequences, T positions, H hidden width, V vocabulary, R
rows (positions that count) of one chunk. All losses are sums over the masked positions, float32;
`harness.training.engine.train_step` divides by the tokens of the global batch.

A row function maps log-probabilities log_p, log_q [R, V] (and extras [R], a label say) to [R], or
to [R, K] where K sums are wanted at once. `losses.divergence.sum_over_rows` sums it from logits of
both models (the functions of `LOSSES`), `harness.losses.from_hidden` from hidden states or models.

Sources: MiniLLM arXiv 2306.08543, GKD arXiv 2306.13649 (generalised JSD), DistiLLM arXiv 2402.03898
(skew KL), f-distillation arXiv 2307.15190 (TVD).
"""

import math
from functools import partial

import torch
from torch import Tensor

from harness.losses.divergence import (
    RowFunction,
    jsd_rows,
    kl_rows,
    reverse_kl_rows,
    sum_over_rows,
    tv_rows,
)


def skew_kl_rows(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) per row, 0 < alpha < 1 (DistiLLM eq. 3)."""
    mixed = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
    return kl_rows(log_p, mixed)


def skew_reverse_kl_rows(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p) per row, 0 < alpha < 1 (DistiLLM eq. 4)."""
    return skew_kl_rows(log_q, log_p, alpha)


ROWS: dict[str, RowFunction] = {
    "forward_kl": kl_rows,
    "reverse_kl": reverse_kl_rows,
    "jsd": jsd_rows,
    "skew_forward_kl": skew_kl_rows,
    "skew_reverse_kl": skew_reverse_kl_rows,
    "tvd": tv_rows,
}
# name -> function(teacher_logits [.., V], student_logits [.., V], mask [..]) -> sum over the mask
LOSSES = {name: partial(sum_over_rows, rows) for name, rows in ROWS.items()}
