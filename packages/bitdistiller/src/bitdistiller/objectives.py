"""What the student learns: how far its next-token distributions are from the dense model's.

p is the teacher (the dense model), q the student. All losses are sums over the labels of a batch;
the trainer divides by the tokens of the global batch. Letters: B examples, T tokens of the longest,
R rows (labels) of one chunk, V vocabulary.

Source: BitDistiller arXiv 2402.10631, section 3.3.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from harness import distributed
from harness.losses import from_hidden
from harness.losses.divergence import (
    RowFunction,
    cakld_rows,
    jsd_rows,
    kl_rows,
    reverse_kl_rows,
    sum_over_rows,
)
from harness.training import distillation, teacher_cache, validation
from harness.training.batching import IGNORED


def row_function(kind: str, beta: float | None = None) -> RowFunction:
    """log_p, log_q [R, V] -> [R]. ``kind``: cakld (with ``beta``), forward, reverse or jsd."""
    if kind == "cakld":
        return partial(cakld_rows, beta=beta)
    return {"forward": kl_rows, "reverse": reverse_kl_rows, "jsd": jsd_rows}[kind]


def from_teacher(teacher, rows: RowFunction, fused: bool) -> Callable:
    """(engine, batch) -> (sum of ``rows`` over the labels, {"ce": sum of their cross entropy}).

    Args:
        teacher: a causal LM. fused: as in `harness.losses.from_hidden.over_models`.
    """
    mixed = partial(from_hidden.mix_rows, rows=rows, kd_ratio=1.0)

    def loss_of(running, batch: dict):
        total, report = distillation.over_labels(teacher, mixed, None, fused, running, batch)
        return total, {"ce": report["ce"]}

    return loss_of


def from_cache(rows: RowFunction, vocabulary: int) -> Callable:
    """As :func:`from_teacher`, for batches with the rows of a `training.teacher_cache.Cache`."""

    def loss_of(running, batch: dict):
        total, report = teacher_cache.distillation(rows, 1.0, vocabulary, running, batch)
        return total, {"ce": report["ce"]}

    return loss_of


@torch.no_grad()
def confidence(teacher, batches: Iterable[dict], fused: bool = True) -> float:
    """CAKLD's beta: the mean over all labels of ``batches``, of all ranks, of the teacher's highest
    probability (as in the authors' code; the paper writes the probability of the label itself).

    Args:
        teacher: a causal LM; None: the batches have the rows of a teacher's cache.
        batches: as `harness.training.batching.collate` makes them; pads and prompts do not count.
    """
    total, count = 0.0, 0
    for batch in batches:
        counted = batch["labels"] != IGNORED
        count += int(counted.sum())
        if teacher is None:
            total += batch["teacher_log_probs"][:, 0].double().exp().sum().item()
            continue
        inputs = validation.inputs_of(batch, teacher.device)
        counted = counted.to(teacher.device)
        if fused:
            head = from_hidden.head_and_hidden(teacher, inputs, counted.shape[1])
            total += from_hidden.kd_from_hidden(_highest_rows, head, head, counted).item()
        else:
            logits = teacher(**inputs).logits
            total += sum_over_rows(_highest_rows, logits, logits, counted).item()
    return distributed.sum_number(total) / max(1, distributed.sum_number(count))


def _highest_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.amax(-1).exp()
