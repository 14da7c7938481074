"""MiniLLM's objective: each part against float64, and the estimator's gradient by enumeration.

The language: 5 tokens, of which one ends a sequence, at most 3 long; the student is a free table of
logits per prefix, so the exact gradient of KL(student || teacher) is an ordinary sum.
"""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from minillm import policy
from minillm.losses import LOSSES

V, T, END = 5, 3, 4
PREFIXES = [prefix for n in range(T) for prefix in product(range(V - 1), repeat=n)]


def all_sequences():
    """tokens [N, T], their prefix numbers [N, T] and masks [N, T]: every sequence there is."""
    rows = []
    for tokens in product(range(V), repeat=T):
        stop = tokens.index(END) + 1 if END in tokens else T
        if not any(tokens[stop:]):
            prefixes = [PREFIXES.index(tokens[:t]) if t < stop else 0 for t in range(T)]
            rows.append((tokens, prefixes, [t < stop for t in range(T)]))
    return tuple(torch.tensor(part) for part in zip(*rows, strict=True))


TOKENS, WHERE, MASK = all_sequences()


@pytest.fixture
def tables():
    """Logits [prefixes, V], float64, of the teacher and of the student, which differ much."""
    draw = torch.Generator().manual_seed(2)
    shape = (len(PREFIXES), V)
    teacher, student = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return teacher, student.requires_grad_()


def token_logp(logits):
    """log-probabilities [N, T] of all sequences' tokens; 0 outside the mask."""
    logp = logits.log_softmax(-1)[WHERE].gather(-1, TOKENS[..., None])[..., 0]
    return logp * MASK


def exact_gradient(teacher, student):
    log_p, log_q = token_logp(teacher).sum(1), token_logp(student).sum(1)
    divergence = (log_q.exp() * (log_q - log_p)).sum()
    return torch.autograd.grad(divergence, student)[0]


def estimates(teacher, student, alpha=0.0, single_step=False, product=False, **options):
    """(chance of being drawn [N], gradient of the objective on it [N, prefixes, V]) per sequence,
    through the functions of policy.py; ``product``: weights over all tokens so far, not in MiniLLM.
    """
    log_p, log_q = teacher.log_softmax(-1), student.detach().log_softmax(-1)
    mixed = policy.mixed_log_probs(log_p, log_q, alpha)
    ours, theirs, both = (token_logp(logs) for logs in (log_q, log_p, mixed))
    weight = policy.importance_weights(ours, both)
    reward = policy.rewards(theirs, ours, scaling=1.0)
    options = {"gamma": 1.0, "length_norm": False} | options
    advantage = policy.advantages(reward, MASK, **options)
    if product:  # R_t's tokens, too, were drawn from the mixture: weigh the whole sequence
        weight = weight.prod(1, keepdim=True).expand(-1, T)
    gradients = []
    for n in range(len(TOKENS)):
        rows = policy.policy_rows(
            log_p[WHERE[n]], student.log_softmax(-1)[WHERE[n]], TOKENS[n], ours[n], advantage[n],
            weight[n], clip=float("inf"), single_step=single_step,
        )  # fmt: skip
        gradients.append(torch.autograd.grad((rows[:, 0] * MASK[n]).sum(), student)[0])
    return both.sum(1).exp(), torch.stack(gradients)


def expected(tables, **options):
    chance, gradients = estimates(*tables, **options)
    assert chance.sum().item() == pytest.approx(1)
    return (chance[:, None, None] * gradients).sum(0)


def off(found, exact):
    """The bias of an expected gradient, as a share of the exact one's length."""
    return ((found - exact).norm() / exact.norm()).item()


def test_without_mixing_the_estimator_is_unbiased(tables):
    exact = exact_gradient(*tables)
    assert off(expected(tables), exact) < 1e-6
    # The paper's decomposition: the next token's part exactly, the later rewards by sampling.
    assert off(expected(tables, single_step=True, future=True), exact) < 1e-6


def test_the_mean_of_samples_lies_in_its_confidence_interval(tables):
    """200,000 samples: every coordinate within 4.5 of its standard errors (105 coordinates, so that
    a right estimator fails for one seed in 1,400), and together as far off as chance has it."""
    exact = exact_gradient(*tables)
    for options in ({}, {"single_step": True, "future": True}):
        chance, gradients = estimates(*tables, **options)
        draw = torch.Generator().manual_seed(0)
        count = 200_000
        drawn = torch.multinomial(chance, count, replacement=True, generator=draw)
        share = torch.bincount(drawn, minlength=len(chance)).double() / count
        mean = (share[:, None, None] * gradients).sum(0)
        variance = (chance[:, None, None] * (gradients - exact).square()).sum(0)
        score = (mean - exact) / (variance / count).sqrt()
        assert score.abs().max() < 4.5
        assert 0.3 < score.square().mean() < 2  # the coordinates are not independent


def test_the_bias_of_each_approximation(tables):
    """What the choices of the paper and of its code cost here, stated as the bias's share of the
    exact gradient's length and the angle's cosine, so that a change of them is noticed."""
    exact = exact_gradient(*tables)

    def cost(**options):
        found = expected(tables, **options)
        return off(found, exact), F.cosine_similarity(found.flatten(), exact.flatten(), 0).item()

    # Weights per token leave prefixes and later tokens as the mixture draws them; a product over
    # all tokens would not.
    assert cost(alpha=0.2) == pytest.approx((0.167, 0.987), abs=2e-3)
    assert cost(alpha=0.02) == pytest.approx((0.017, 1.000), abs=2e-3)
    assert off(expected(tables, alpha=0.2, product=True), exact) < 1e-6
    # The sum from t on beside the single-step term counts the token's own reward twice: longer by
    # about as much again, in nearly the same direction.
    assert cost(single_step=True) == pytest.approx((1.131, 0.986), abs=2e-3)
    # Averaging over the tokens left weighs positions differently.
    assert cost(length_norm=True) == pytest.approx((0.592, 0.807), abs=2e-3)
    paper = {"alpha": 0.2, "length_norm": True, "gamma": 0.95, "single_step": True}
    assert cost(**paper, future=True) == pytest.approx((0.243, 0.975), abs=2e-3)
    assert cost(**paper) == pytest.approx((1.189, 0.887), abs=2e-3)


def test_mixture_and_weights():
    p, q = (torch.rand(6, 7).softmax(-1) for _ in range(2))
    mixed = policy.mixed_log_probs(p.log(), q.log(), 0.2)
    torch.testing.assert_close(mixed.exp(), 0.8 * q + 0.2 * p)
    weight = policy.importance_weights(q.log(), mixed)
    torch.testing.assert_close(weight, q / (0.8 * q + 0.2 * p))
    assert weight.max() < 1 / 0.8
    assert torch.equal(policy.mixed_log_probs(p.log(), q.log(), 0.0), q.log())


def test_rewards_are_scaled_then_clipped():
    teacher, student = torch.tensor([-1.0, -9.0, -0.1]), torch.tensor([-2.0, -1.0, -0.1])
    assert policy.rewards(teacher, student, 0.5, 3.0).tolist() == [2.0, -3.0, 0.0]


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("future", [True, False])
def test_advantages_equal_their_sum(length_norm, future):
    draw = torch.Generator().manual_seed(0)
    reward = torch.randn(3, 6, generator=draw)
    lengths = [6, 2, 1]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = policy.advantages(reward, mask, 0.9, length_norm, future)
    for row, long in enumerate(lengths):
        for t in range(6):
            # The paper's R_{t+1} starts undiscounted at the next token.
            first = t + future
            terms = [0.9 ** (k - first) * reward[row, k].item() for k in range(first, long)]
            value = sum(terms) / (max(1, len(terms)) if length_norm else 1)
            assert found[row, t].item() == pytest.approx(value if t < long else 0, abs=1e-6)


def test_whitening_reads_the_tokens_alone():
    values, mask = 3 + 2 * torch.randn(8, 5), torch.rand(8, 5) < 0.7
    white = policy.whiten(values, mask)
    inside = values[mask].double()
    expected = (inside - inside.mean()) / inside.std(correction=0)
    torch.testing.assert_close(white[mask].double(), expected, rtol=1e-5, atol=1e-5)
    assert white[~mask].eq(0).all()
    assert policy.whiten(values, mask & False).eq(0).all()


def test_the_surrogate_is_clipped_after_the_weight():
    """ratio 1 alone is inside; times the weight 1.5 it is outside, and its gradient is cut."""
    logp = torch.zeros(4, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    weight = torch.tensor([1.5, 1.5, 0.5, 0.5])
    loss = policy.clipped_surrogate(logp, torch.zeros(4), advantage, weight, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    loss.sum().backward()
    assert logp.grad.tolist() == [0.0, 1.5, -0.5, 0.0]


def test_the_single_step_term_is_the_whole_reverse_kl():
    p, q = torch.randn(4, 9), torch.randn(4, 9)
    zeros = torch.zeros(4)
    rows = policy.policy_rows(
        p.log_softmax(-1), q.log_softmax(-1), torch.arange(4), zeros, zeros, zeros
    )
    assert rows[:, 2].sum().item() == pytest.approx(LOSSES["reverse_kl"](p, q).item(), rel=1e-5)
    torch.testing.assert_close(rows[:, 0], rows[:, 1] + rows[:, 2])
