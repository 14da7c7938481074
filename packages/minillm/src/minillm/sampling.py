"""Rollouts: token by token from a mixture of the student and the teacher, over two KV caches.

Letters: B prompts, P their padded length, T response positions, V vocabulary. Prompts are padded on
the left, responses on the right. A token is where the sequence's own uniform number falls in the
cumulated mixture, so a rollout depends on neither its batch nor the number of ranks.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.policy import mixed_log_probs

# Finished rollouts leave the caches when no more than this share of them is still being written.
KEPT = 0.75


@dataclass
class Rollouts:
    """Responses and the log-probabilities, in nats, that their tokens had when they were drawn.

    Attributes:
        prompts, prompt_mask: int64 [B, P]. responses: int64 [B, T], padded after the end token.
        mask: bool [B, T], true up to the end token, that included.
        student_logp, teacher_logp, mixed_logp: float32 [B, T], 0 outside the mask.
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    mask: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    mixed_logp: Tensor


def uniforms(count: int, length: int, seed: int) -> Tensor:
    """float64 [count, length] in [0, 1): the random numbers of ``count`` rollouts, equal per seed
    on every rank, which then takes its own rows."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, length, generator=draw, dtype=torch.float64)


@torch.no_grad()
def sample(
    student,
    teacher,
    prompts: Tensor,
    prompt_mask: Tensor,
    draws: Tensor,
    *,
    alpha: float,
    ends: Iterable[int],
    pad: int,
    vocabulary: int | None = None,
) -> Rollouts:
    """Draw a response to each prompt from (1 - alpha) student + alpha teacher, at temperature 1.

    Args:
        student, teacher: causal LMs without dropout, on one device; teacher None: the student
            alone, and the teacher's log-probabilities are 0.
        prompts, prompt_mask: int64 [B, P], padded on the left.
        draws: float64 [B, T] (`uniforms`); T is the longest response.
        ends: the ids that end a response. pad: what is written behind it.
        vocabulary: the first so many ids, which both models share; none other is drawn.
    """
    device = prompts.device
    draws, ends = draws.to(device), torch.tensor(sorted(ends), device=device)
    models = [_Stepper(model, vocabulary) for model in (student, teacher) if model is not None]
    count, longest = draws.shape
    responses = torch.full((count, longest), pad, device=device)
    inside = torch.zeros(count, longest, dtype=torch.bool, device=device)
    logp = torch.zeros(3, count, longest, device=device)
    rows = torch.arange(count, device=device)  # which rollouts the caches are of
    running = torch.ones_like(rows, dtype=torch.bool)
    ids, mask = prompts, prompt_mask
    for t in range(longest):
        log_q, *rest = (model(ids, mask) for model in models)
        log_p = rest[0] if rest else log_q
        mixed = mixed_log_probs(log_p, log_q, alpha if rest else 0.0)
        drawn = _pick(mixed.double().exp(), draws[rows, t])
        each = [logs.gather(-1, drawn[:, None])[:, 0] for logs in (log_q, log_p, mixed)]
        at = rows[running]
        responses[at, t], inside[at, t] = drawn[running], True
        logp[:, at, t] = torch.stack(each)[:, running]
        ids, mask = drawn[:, None], torch.cat([mask, running[:, None].to(mask.dtype)], 1)
        running = running & ~torch.isin(drawn, ends)
        left = int(running.sum())
        if not left:
            break
        if left <= KEPT * len(running):
            rows, ids, mask = rows[running], ids[running], mask[running]
            for model in models:
                model.cache.batch_select_indices(running.nonzero()[:, 0])
            running = running[running]
    long = t + 1
    ours, theirs, both = logp[:, :, :long]
    if teacher is None:
        theirs = torch.zeros_like(ours)
    return Rollouts(prompts, prompt_mask, responses[:, :long], inside[:, :long], ours, theirs, both)


def _pick(probabilities: Tensor, draw: Tensor) -> Tensor:
    """int64 [B]: where draw [B] falls in the cumulated probabilities [B, V]."""
    heap = probabilities.cumsum(-1)
    place = torch.searchsorted(heap, draw[:, None] * heap[:, -1:], right=True)[:, 0]
    return place.clamp_max(probabilities.shape[-1] - 1)


class _Stepper:
    """A model and its cache: the ids that are new -> log-probabilities [B, V] of what follows."""

    def __init__(self, model, vocabulary: int | None):
        from transformers import DynamicCache

        self.model, self.vocabulary = model, vocabulary
        self.cache = DynamicCache(config=model.config)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.known = inspect.signature(inner.forward).parameters

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        # Padding has no place in the count of positions; BLOOM and others count by themselves.
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        extra = {"position_ids": positions, "logits_to_keep": 1}
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in extra.items() if name in self.known},
        )
        return out.logits[:, -1, : self.vocabulary].float().log_softmax(-1)
