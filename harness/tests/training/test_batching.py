"""How examples are dealt to steps and ranks, and padded."""

import random
from types import SimpleNamespace

from harness import distributed
from harness.training import batching
from harness.training.engine import Training


def test_every_epoch_shows_every_example_once_however_it_is_dealt(monkeypatch):
    lengths = [random.Random(i).randrange(5, 50) for i in range(30)]

    def dealt(ranks, accumulate, step):
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        micro = []
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            mine = batching.deal(lengths, step, Training(1e-3, 9, 2, accumulate, seed=5))
            assert len(mine) == accumulate
            micro += mine
        return micro

    one = [dealt(1, 4, step) for step in range(15)]
    flat = [i for step in one for micro in step for i in micro]
    assert all(flat.count(i) == 4 for i in range(30))
    assert sorted(one[0]) == sorted(dealt(2, 2, 0)) and one[0] != one[1]
    # Like lengths together: no micro-batch has one that a later one is longer than.
    assert [lengths[i] for micro in one[0] for i in micro] == sorted(
        (lengths[i] for micro in one[0] for i in micro), reverse=True
    )


def test_a_batch_that_does_not_fill_every_forward_is_shared_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    sizes, indices = [], []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        micro = batching.deal(list(range(7)), 0, Training(1e-3, 9, 2, 2, batch=7))
        sizes += map(len, micro)
        indices += [index for forward in micro for index in forward]
    assert sorted(sizes) == [1, 2, 2, 2] and sorted(indices) == list(range(7))


def test_padding_is_a_token_that_the_model_knows():
    added = SimpleNamespace(pad_token_id=4096, eos_token_id=2)
    assert batching.pad_id(added) == 2
    assert batching.pad_id(SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0
