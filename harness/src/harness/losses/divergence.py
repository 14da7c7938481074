"""How far one model's next-token distributions are from another's: a metric and a loss.

p is the teacher (the dense model), q the student (the compressed one); both come as logits [.., V].
Everything runs on a slice of rows at a time, in float32, so two full log-softmax tensors never
exist at once: forward holds one slice, backward recomputes it and holds one gradient in the
student's dtype. Gradients reach the student only. A row function maps two log-probability tensors
[R, V] to [R]; a new loss is a new row function handed to `sum_over_rows` or `mean_over_rows`.

Sources: Hinton et al. 2015 (forward KL), MiniLLM arXiv 2306.08543 (reverse KL), GKD arXiv
2306.13649 (generalised JSD), BitDistiller arXiv 2402.10631 (CAKLD).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

RowFunction = Callable[..., Tensor]

# Elements of one float32 slice (32 MB); a row function needs a handful of them.
CHUNK_ELEMENTS = 2**23
# Stands for log 0: exp of it is 0 in float32 and 0 times it is 0, where 0 * -inf would be NaN.
LOG_ZERO = -1e4


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats per row, from log-probabilities [R, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) in nats per row."""
    return kl_rows(log_q, log_p)


def jsd_rows(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1, per row."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def cakld_rows(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(q || p) + (1 - beta) KL(p || q) per row (CAKLD, BitDistiller section 3.3)."""
    return (((1 - beta) * log_p.exp() - beta * log_q.exp()) * (log_p - log_q)).sum(-1)


def tv_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance, half the L1 distance of p and q, per row; in [0, 1]."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def sum_over_rows(
    rows: RowFunction,
    teacher_logits: Tensor,
    student_logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    extras: Sequence[Tensor] = (),
) -> Tensor:
    """Sum of a row function over rows: float32, differentiable in the student's logits.

    Args:
        rows: from (log_p, log_q, *extras), log-probabilities float32 [R, V] and extras [R], to [R],
            or to [R, K] for K sums at once.
        teacher_logits, student_logits: [.., V], any float dtype, equal shapes, one device.
        mask: [..], bool or weights of the rows. Rows of weight 0 are never read (padding may hold
            anything).
        temperature: divides both logits; the result is not multiplied by its square.
        chunk: rows at a time; by default as many as fill 32 MB in float32.
        extras: what else a row needs (its label, say), each [..] of any dtype; no gradients.

    Returns:
        A scalar, or [K].
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits {tuple(teacher_logits.shape)} and student logits "
            f"{tuple(student_logits.shape)} differ in shape"
        )
    vocabulary = student_logits.shape[-1]
    student = student_logits.reshape(-1, vocabulary)
    teacher = teacher_logits.detach().reshape(-1, vocabulary)
    weights = _weights(mask, student)
    extras = [extra.reshape(-1) for extra in extras]
    chunk = chunk or max(1, CHUNK_ELEMENTS // vocabulary)
    return _ChunkedSum.apply(student, teacher, weights, rows, temperature, chunk, *extras)


def mean_over_rows(
    rows: RowFunction,
    teacher_logits: Tensor,
    student_logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`sum_over_rows` over the mask's sum: the mean, weighted by the mask; 0 where all of it is."""
    total = sum_over_rows(rows, teacher_logits, student_logits, mask, temperature, chunk)
    weights = _weights(mask, student_logits.flatten(0, -2))
    return total / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def _weights(mask: Tensor | None, rows: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(len(rows), device=rows.device)
    return mask.reshape(-1).to(rows.device, torch.float32)


def forward_kl(teacher_logits, student_logits, mask=None, temperature=1.0, chunk=None) -> Tensor:
    """Mean KL(teacher || student) in nats per row; arguments as in `mean_over_rows`."""
    return mean_over_rows(kl_rows, teacher_logits, student_logits, mask, temperature, chunk)


def reverse_kl(teacher_logits, student_logits, mask=None, temperature=1.0, chunk=None) -> Tensor:
    """Mean KL(student || teacher) in nats per row; arguments as in `mean_over_rows`."""
    return mean_over_rows(reverse_kl_rows, teacher_logits, student_logits, mask, temperature, chunk)


def jsd(teacher_logits, student_logits, mask=None, temperature=1.0, chunk=None, beta=0.5) -> Tensor:
    """Mean generalised Jensen-Shannon divergence (`jsd_rows`); arguments as in `mean_over_rows`."""
    rows = partial(jsd_rows, beta=beta)
    return mean_over_rows(rows, teacher_logits, student_logits, mask, temperature, chunk)


def top1_agreement(teacher_logits: Tensor, student_logits: Tensor, mask=None) -> Tensor:
    """Share of rows in which both logits [.., V] have the same largest entry; float32 scalar."""
    same = (teacher_logits.argmax(-1) == student_logits.argmax(-1)).float()
    weights = torch.ones_like(same) if mask is None else mask.to(same.device, same.dtype)
    return (same * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


class _ChunkedSum(torch.autograd.Function):
    """sum_i weights[i] * rows(log_softmax(teacher_i / t), log_softmax(student_i / t), ..)."""

    @staticmethod
    def forward(ctx, student, teacher, weights, rows, temperature, chunk, *extras):
        ctx.save_for_backward(student, teacher, weights, *extras)
        ctx.settings = (rows, temperature, chunk)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for index in weights.nonzero()[:, 0].split(chunk):
            log_q = _log_p(student[index], temperature)
            values = rows(_log_p(teacher[index], temperature), log_q, *(e[index] for e in extras))
            total = total + weights[index] @ values
        return total

    @staticmethod
    def backward(ctx, grad_total):
        student, teacher, weights, *extras = ctx.saved_tensors
        rows, temperature, chunk = ctx.settings
        gradient = torch.zeros_like(student)
        for index in weights.nonzero()[:, 0].split(chunk):
            with torch.enable_grad():
                leaf = student[index].detach().requires_grad_()
                log_q = _log_p(leaf, temperature)
                log_p = _log_p(teacher[index], temperature)
                values = rows(log_p, log_q, *(e[index] for e in extras))
                value = (weights[index] @ values * grad_total).sum()
            gradient[index] = torch.autograd.grad(value, leaf)[0]
        return gradient, *(None,) * (5 + len(extras))


def _log_p(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).log_softmax(-1).clamp_min(LOG_ZERO)
