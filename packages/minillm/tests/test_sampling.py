"""Rollouts against a loop without caches, batches or padding; their frequencies by enumeration."""

from itertools import product

import pytest
import torch

import families
from harness.generation.responses import pad_left
from minillm.sampling import sample, uniforms

END, PAD, LENGTH = 7, 9, 10


def rollouts(family, alpha, prompts, draws, **options):
    student, teacher = (families.build(family, seed=seed) for seed in (0, 1))
    ids, mask = pad_left(prompts, PAD)
    settings = {"alpha": alpha, "ends": [END], "pad": PAD} | options
    return student, teacher, sample(student, teacher, ids, mask, draws, **settings)


@torch.no_grad()
def slow(student, teacher, prompt, draws, alpha, vocabulary):
    """One response at a time, whole forwards, no padding: tokens and their log-probabilities."""
    ids, found = prompt, []
    for draw in draws:
        logits = (model(ids[None]).logits[0, -1, :vocabulary] for model in (student, teacher))
        q, p = (some.double().softmax(-1) for some in logits)
        mixed = (1 - alpha) * q + alpha * p
        token = int((mixed.cumsum(0) <= draw * mixed.sum()).sum())
        found.append([token, *(some[token].log().item() for some in (q, p, mixed))])
        ids = torch.cat([ids, torch.tensor([token])])
        if token == END:
            break
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "mistral"])
def test_equals_a_loop_without_caches(family):
    prompts = [families.windows(1, n, seed=n)[0] for n in (4, 11, 1, 6)]
    draws = uniforms(4, LENGTH, seed=3)
    student, teacher, found = rollouts(family, 0.3, prompts, draws, vocabulary=12)
    ended = 0
    for row, prompt in enumerate(prompts):
        expected = slow(student, teacher, prompt, draws[row], 0.3, 12)
        long = len(expected)
        assert found.mask[row].tolist() == [t < long for t in range(found.mask.shape[1])]
        assert found.responses[row, :long].tolist() == [step[0] for step in expected]
        assert found.responses[row, long:].eq(PAD).all()
        names = ("student_logp", "teacher_logp", "mixed_logp")
        for name, values in zip(names, list(zip(*expected, strict=True))[1:], strict=True):
            logp = getattr(found, name)[row]
            torch.testing.assert_close(logp[:long], torch.tensor(values), rtol=0, atol=2e-4)
            assert logp[long:].eq(0).all()
        ended += expected[-1][0] == END
    assert ended, "no response ended early: choose another seed"


def test_without_a_teacher_the_same_numbers_draw_the_same_tokens():
    prompts = [families.windows(1, 5)[0]]
    draws = uniforms(1, LENGTH, seed=0)
    student, _, found = rollouts("llama", 0.0, prompts, draws)
    ids, mask = pad_left(prompts, PAD)
    alone = sample(student, None, ids, mask, draws, alpha=0.2, ends=[END], pad=PAD)
    assert torch.equal(found.responses, alone.responses)
    assert torch.equal(found.student_logp, alone.mixed_logp)
    assert found.teacher_logp.ne(0).any() and alone.teacher_logp.eq(0).all()


def test_a_rollout_does_not_depend_on_its_batch():
    prompts = [families.windows(1, n, seed=n)[0] for n in (3, 9, 6)]
    draws = uniforms(3, LENGTH, seed=5)
    _, _, whole = rollouts("llama", 0.2, prompts, draws)
    _, _, part = rollouts("llama", 0.2, prompts[2:], draws[2:])
    long = int(part.mask.sum())
    assert whole.responses[2, :long].tolist() == part.responses[0, :long].tolist()
    torch.testing.assert_close(whole.mixed_logp[2, :long], part.mixed_logp[0, :long])


def test_frequencies_are_those_of_the_mixture():
    """Vocabulary 5, at most 3 tokens: 20,000 rollouts against all sequences' probabilities."""
    count, ends = 20_000, 4
    prompt = torch.tensor([1, 2])
    draws = uniforms(count, 3, seed=1)
    student, teacher, found = rollouts(
        "llama", 0.4, [prompt] * count, draws, vocabulary=5, ends=[ends]
    )
    chance = {}
    for tokens in product(range(5), repeat=3):
        stop = tokens.index(ends) + 1 if ends in tokens else 3
        if stop < 3 and any(tokens[stop:]):
            continue
        ids = torch.cat([prompt, torch.tensor(tokens)])[None]
        with torch.no_grad():
            q, p = (m(ids).logits[0, 1:4, :5].double().softmax(-1) for m in (student, teacher))
        mixed = 0.6 * q + 0.4 * p
        chance[tokens[:stop]] = torch.stack([mixed[t, tokens[t]] for t in range(stop)]).prod()
    assert sum(chance.values()).item() == pytest.approx(1)
    seen = dict.fromkeys(chance, 0)
    for row, mask in zip(found.responses.tolist(), found.mask.sum(1).tolist(), strict=True):
        seen[tuple(row[:mask])] += 1
    spread = sum(
        (seen[tokens] - count * p.item()) ** 2 / (count * p.item()) for tokens, p in chance.items()
    )
    # Chi-square with len(chance) - 1 degrees of freedom; five standard deviations above its mean.
    freedom = len(chance) - 1
    assert spread < freedom + 5 * (2 * freedom) ** 0.5
