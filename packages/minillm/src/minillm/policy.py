"""MiniLLM's objective part by part: pure functions on tensors (Gu et al., arXiv 2306.08543).

The student q learns to lower KL(q || p) to the teacher p along sequences that it writes itself.
With r_t = log p(y_t) - log q(y_t), the gradient of KL(q || p) is E_q sum_t -R_t grad log q(y_t),
R_t the rewards from t on (eq. 2). What is done about its variance and its side effects:

* a part of each token is drawn from the teacher (`mixed_log_probs`, sec. 2.2), made good for by
  a weight per token (`importance_weights`; the product over earlier tokens is left out: biased,
  but of low variance);
* rewards are averaged over the tokens that are left and discounted (`advantages`), so that length
  does not pay, then whitened over all rollouts (`whiten`);
* several steps are made on the same rollouts, with a clipped ratio (`clipped_surrogate`);
* the part of the gradient that lies in the next token alone is summed over the whole vocabulary,
  not sampled (the single-step term: the reverse KL of the position, in `policy_rows`).

Letters: B rollouts, T response positions (the end token is one of them), R rows of a chunk, V
vocabulary. All float32. Two departures of the original's code from the paper are kept as defaults,
because the published numbers were made so: R_t counts r_t although the single-step term holds it
already (``future`` is the paper's), and the weight is inside the clip.
"""

import math

import torch
from torch import Tensor

from harness.losses.divergence import reverse_kl_rows


def mixed_log_probs(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log((1 - alpha) q + alpha p) [.., V] or of single tokens [..]; alpha 0 is the student."""
    if alpha <= 0:
        return log_q
    if alpha >= 1:
        return log_p
    return torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha))


def importance_weights(student_logp: Tensor, mixed_logp: Tensor) -> Tensor:
    """w_t = q(y_t) / mixture(y_t) [..]: at most 1 / (1 - alpha)."""
    return (student_logp - mixed_logp).exp()


def rewards(
    teacher_logp: Tensor, student_logp: Tensor, scaling: float = 0.5, clip: float = 100.0
) -> Tensor:
    """r_t = (log p(y_t) - log q(y_t)) / scaling [..], within +- clip."""
    return ((teacher_logp - student_logp) / scaling).clamp(-clip, clip)


def advantages(
    reward: Tensor,
    mask: Tensor,
    gamma: float = 0.95,
    length_norm: bool = True,
    future: bool = False,
) -> Tensor:
    """Discounted sum of the rewards from each token on, over the number of tokens left.

    Args:
        reward: [B, T]; 0 is read where the mask is 0.
        mask: [B, T]; 1 at the response's tokens, which come first.
        length_norm: divide by the tokens left, this one included (with ``future``: after it).
        future: only the rewards after the token (the paper's R_{t+1}), for use beside the
            single-step term.

    Returns:
        [B, T], 0 outside the mask.
    """
    mask = mask.to(reward.dtype)
    running, columns = torch.zeros_like(reward[:, 0]), []
    for column in (reward * mask).unbind(1)[::-1]:
        columns.append(running if future else column + gamma * running)
        running = column + gamma * running
    total = torch.stack(columns[::-1], 1)
    if length_norm:
        left = mask.flip(1).cumsum(1).flip(1) - (1 if future else 0)
        total = total / left.clamp_min(1)
    return total * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the mask, those of all ranks; 0 outside it.

    values float32 [B, T], mask [B, T].
    """
    inside = values[mask.bool()].double()
    if not len(inside):
        return torch.zeros_like(values)
    scale = (inside.var(correction=0) + 1e-8).rsqrt()
    return ((values - inside.mean()) * scale).to(values.dtype) * mask.to(values.dtype)


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor, clip: float = 0.2
) -> Tensor:
    """max(-A rho, -A clip(rho, 1 +- clip)), rho = q(y_t) / q_old(y_t) w_t; [..], to be minimised.

    ``logp`` [..] has the gradient. The weight is multiplied in before the clip. ``clip`` inf: none.
    """
    ratio = (logp - old_logp).exp() * weight
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def policy_rows(
    log_p: Tensor,
    log_q: Tensor,
    tokens: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    weight: Tensor,
    clip: float = 0.2,
    single_step: bool = True,
) -> Tensor:
    """A row function (losses.py): [R, 3], the loss, its sampled part, and the single-step term.

    Args:
        tokens: int64 [R], the sampled tokens; old_logp, advantage, weight [R] belong to them.
        single_step: whether the loss counts the single-step term KL(q || p) of the position, whose
            weight is 1, also where the prefix is partly the teacher's.
    """
    logp = log_q.gather(-1, tokens[:, None])[:, 0]
    sampled = clipped_surrogate(logp, old_logp, advantage, weight, clip)
    single = reverse_kl_rows(log_p, log_q)
    return torch.stack([sampled + single if single_step else sampled, sampled, single], -1)
