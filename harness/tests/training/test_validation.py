"""Held-out means and perplexity: shared among ranks, they are what one process finds."""

import math

import pytest
import torch

import families
from harness import distributed
from harness.metrics import perplexity
from harness.training import batching, validation


@pytest.fixture(scope="module")
def model():
    return families.build("llama", num_hidden_layers=1)


def shares_of_ranks(monkeypatch, ranks, measure):
    """What each rank would add: with sums over the ranks left out, once for every rank."""
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(measure())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_perplexity_is_shared(model, monkeypatch, ranks):
    windows = families.windows(5, 12)
    expected = perplexity.perplexity(model, windows).value
    monkeypatch.setattr(distributed, "sum_number", lambda value: value)
    found = shares_of_ranks(
        monkeypatch, ranks, lambda: math.log(validation.perplexity(model, windows))
    )
    assert math.exp(sum(found)) == pytest.approx(expected, rel=1e-12)
    assert ranks > 1 or math.exp(found[0]) == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_held_out_means_are_shared(model, monkeypatch, ranks):
    rows = [(families.windows(1, n, seed=n)[0], first) for n, first in ((9, 4), (5, 1), (12, 9))]

    def collate(indices):
        return batching.collate([rows[i] for i in indices], 0)

    def loss_of(running, batch):
        loss, _ = validation.label_loss(running, batch)
        return loss, {"twice": 2 * loss}

    sums = []
    monkeypatch.setattr(distributed, "sum_number", lambda value: sums.append(value) or value)
    shares_of_ranks(
        monkeypatch, ranks, lambda: validation.held_out(model, 3, collate, loss_of, batch=1)
    )
    tokens, loss, twice = (sum(sums[i::3]) for i in range(3))
    expected = 0.0
    with torch.no_grad():
        for ids, first in rows:
            log_q = model(ids[None]).logits[0, first - 1 : -1].log_softmax(-1)
            expected -= log_q[torch.arange(len(log_q)), ids[first:]].sum().item()
    assert tokens == sum(len(ids) - first for ids, first in rows)
    assert loss == pytest.approx(expected, rel=1e-5) and twice == pytest.approx(2 * loss)
