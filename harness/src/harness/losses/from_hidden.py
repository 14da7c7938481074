"""Sums of row functions over a batch from the models' hidden states: the logits of two models never
exist as B x T x V.

Letters: B sequences, T positions, H hidden width, V vocabulary, R rows (positions that count) of
one chunk. p is the teacher, q the student. A row function maps log-probabilities log_p, log_q
[R, V] (and extras [R], a label say) to [R], or to [R, K] where K sums are wanted at once
(divergence.py has the common ones).

`kd_from_hidden` makes logits for one chunk of rows at a time: a chunk's gradient is taken where its
logits are made, and only its products with the head and the hidden states are kept for the backward
pass. `over_models` runs two models and goes that way where they allow it, else through whole logits
(`divergence.sum_over_rows`).
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import distributed
from harness.losses.divergence import (
    CHUNK_ELEMENTS,
    LOG_ZERO,
    RowFunction,
    kl_rows,
    sum_over_rows,
)

# What the models put out of a batch: hidden states [.., H], the head's weight [V, H] and bias [V].
Head = tuple[Tensor, Tensor, Tensor | None]


def cross_entropy_rows(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """-log q(label) per row; labels int64 [R]."""
    return -log_q.gather(-1, labels[:, None])[:, 0]


def mix_rows(
    log_p: Tensor, log_q: Tensor, labels: Tensor, rows: RowFunction = kl_rows, kd_ratio: float = 0.5
) -> Tensor:
    """[R, 3]: (1 - kd_ratio) CE + kd_ratio rows, and its two parts.

    With the forward KL the gradient is that of the original's soft cross entropy; the value is less
    by the teacher's entropy, so that 0 means equal distributions.
    """
    ce, divergence = cross_entropy_rows(log_p, log_q, labels), rows(log_p, log_q)
    return torch.stack([(1 - kd_ratio) * ce + kd_ratio * divergence, ce, divergence], -1)


def kd_from_hidden(
    rows: RowFunction,
    teacher: Head,
    student: Head,
    mask: Tensor,
    extras: Sequence[Tensor] = (),
    vocabulary: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The sum of a row function over mask, without the logits of both models in memory.

    Args:
        rows: as above.
        teacher, student: hidden [.., H] (H may differ), weight [V, H], bias [V] or None; the
            student's three get gradients, each where it asks for one.
        mask: [..], bool or weights; rows of weight 0 are not computed.
        extras: each [..], handed to ``rows``.
        vocabulary: the columns that both models share, the first so many; both distributions are
            over these alone. Default: all, and then both heads must be as wide.
        chunk: rows at a time; by default 32 MB of float32 logits.

    Returns:
        float32 scalar; or [K], of which the first has a gradient, the others are to be reported.
    """
    wide = {teacher[1].shape[0], student[1].shape[0]}
    if vocabulary is None and len(wide) > 1:
        raise ValueError(f"the heads have {sorted(wide)} rows; say how many are shared")
    vocabulary = vocabulary or wide.pop()
    chunk = chunk or max(1, CHUNK_ELEMENTS // vocabulary)
    weights = mask.reshape(-1).float()
    extras = [extra.reshape(-1) for extra in extras]
    flat = (student[0].flatten(0, -2), *_cut(student, vocabulary))
    theirs = (teacher[0].detach().flatten(0, -2), *_cut(teacher, vocabulary))
    learning = torch.is_grad_enabled()
    return _FromHidden.apply(*flat, theirs, weights, rows, chunk, extras, learning)


def _cut(head: Head, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    _, weight, bias = head
    return weight[:vocabulary], None if bias is None else bias[:vocabulary]


def _log_p(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).clamp_min(LOG_ZERO)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, weights, rows, chunk, extras, learning):
        wanted = [learning and needed for needed in ctx.needs_input_grad[:3]]
        # Weights' gradients are summed over many chunks: in float32, whatever the dtype.
        types = (hidden.dtype, torch.float32, torch.float32)
        slopes = [
            torch.zeros_like(part, dtype=dtype) if want else None
            for part, dtype, want in zip((hidden, weight, bias), types, wanted, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for index in weights.nonzero()[:, 0].split(chunk):
            leaf = F.linear(hidden[index], weight, bias).requires_grad_(any(wanted))
            log_p = _log_p(F.linear(teacher[0][index], *teacher[1:]))
            with torch.set_grad_enabled(any(wanted)):
                values = rows(log_p, _log_p(leaf), *(e[index] for e in extras))
                sums = weights[index] @ values
                loss = sums if sums.ndim == 0 else sums[0]
            total = total + sums.detach()
            if any(wanted):
                slope = torch.autograd.grad(loss, leaf)[0]
                del leaf, log_p, values, sums, loss
                _add_slopes(slopes, slope, hidden[index], weight, index)
        ctx.slopes, ctx.types = slopes, [part.dtype for part in (hidden, weight)]
        return total

    @staticmethod
    def backward(ctx, grad_total):
        scale = grad_total if grad_total.ndim == 0 else grad_total[0]
        (hidden, weight, bias), ctx.slopes = ctx.slopes, None
        kinds = (ctx.types[0], ctx.types[1], ctx.types[1])
        slopes = [
            None if part is None else part.mul_(scale.to(part.dtype)).to(kind)
            for part, kind in zip((hidden, weight, bias), kinds, strict=True)
        ]
        return *slopes, *(None,) * 6


def _add_slopes(slopes: list, slope: Tensor, part: Tensor, weight: Tensor, index: Tensor) -> None:
    """Add what a chunk's gradient in its logits, ``slope`` [R, V], is in the head's inputs."""
    hidden, matrix, bias = slopes
    if hidden is not None:
        hidden[index] = slope @ weight
    if matrix is not None and slope.dtype == torch.float32:
        matrix.addmm_(slope.T, part)
    elif matrix is not None:
        matrix += slope.T @ part
    if bias is not None:
        bias += slope.sum(0, dtype=torch.float32)


def over_models(
    rows: RowFunction,
    teacher,
    student,
    inputs: dict[str, Tensor],
    mask: Tensor,
    extras: Sequence[Tensor] = (),
    vocabulary: int | None = None,
    fused: bool = True,
) -> Tensor:
    """The sum of a row function over the positions of a batch, from the models themselves.

    Args:
        teacher: a causal LM. student: a causal LM, or DeepSpeed's engine around one.
        inputs: input_ids [B, T], attention_mask ... of both.
        mask, extras: [B, S], S <= T: of the first S positions, each predicting the token after it.
        vocabulary: as in `kd_from_hidden`.
        fused: through hidden states (`fusable` says whether both models can), else through logits.
    """
    long = mask.shape[1]
    inputs = {**inputs, "use_cache": False}
    if fused:
        with torch.no_grad():
            theirs = head_and_hidden(teacher, inputs, long)
        ours = head_and_hidden(student, inputs, long)
        return kd_from_hidden(rows, theirs, ours, mask, extras, vocabulary)
    with torch.no_grad():
        p = teacher(**inputs).logits[:, :long, :vocabulary]
    q = student(**inputs).logits[:, :long, :vocabulary]
    return sum_over_rows(rows, p, q, mask, extras=extras)


def head_and_hidden(model, inputs: dict[str, Tensor], long: int) -> Head:
    """Of the first ``long`` positions, for `kd_from_hidden`; where `fusable` says so."""
    with headless(model) as head:
        hidden = model(**inputs).logits[:, :long]
    return hidden.to(head.weight.dtype), head.weight, head.bias


@contextmanager
def headless(model):
    """Inside, ``model(...)`` (or its engine's) has hidden states for logits; yields the head."""
    head = getattr(model, "module", model).get_output_embeddings()
    head.forward = lambda hidden: hidden
    try:
        yield head
    finally:
        del head.forward


@torch.no_grad()
def fusable(model, zero: int = 0) -> bool:
    """Whether the logits of ``model``, a causal LM, are its head's weight and bias applied to the
    last hidden states and nothing else; if not, says so on stderr. Some families scale or cap
    them, an adapter may sit on the head, and ZeRO 3 keeps only a part of the weight here."""
    head = model.get_output_embeddings()
    reason = None
    if zero == 3:
        reason = "ZeRO 3 has no rank hold the head's weight"
    elif type(head) is not torch.nn.Linear:
        reason = f"the head is a {type(head).__name__}"
    else:
        ids = torch.arange(4, device=head.weight.device)[None]
        with headless(model):
            hidden = model(input_ids=ids, use_cache=False).logits
        expected = model(input_ids=ids, use_cache=False).logits.float()
        logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
        if not torch.equal(logits, expected):
            reason = "this family changes the logits after its head"
    if reason:
        distributed.say(f"the loss goes through whole logits, with more memory: {reason}")
    return reason is None
