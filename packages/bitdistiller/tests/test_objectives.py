"""Losses and beta against sums written out in float64, one example at a time."""

from types import SimpleNamespace

import pytest
import torch

import families
from bitdistiller import objectives
from harness.training import batching, teacher_cache

BETA = 0.3


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def formula(kind, p, q):
    m = (p + q) / 2
    return {
        "cakld": lambda: BETA * kl(q, p) + (1 - BETA) * kl(p, q),
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: (kl(p, m) + kl(q, m)) / 2,
    }[kind]()


@pytest.fixture
def models():
    return families.build("llama", num_hidden_layers=2), families.build(
        "llama", num_hidden_layers=2, seed=1
    )


def rows_of(lengths=((9, 4), (5, 1), (12, 9))):
    """Examples of different lengths and prompts: their batch has pads."""
    return [(families.windows(1, n, seed=n)[0], first) for n, first in lengths]


def with_cache(teacher, batch, top):
    """The batch with what a cache of ``top`` tokens holds of its labels."""
    logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = teacher_cache.compress(logits[batch["labels"] != batching.IGNORED], top)
    kinds = {"ids": torch.long, "log_probs": torch.float32, "log_tail": torch.float32}
    return batch | {f"teacher_{key}": found[key].to(kind) for key, kind in kinds.items()}


@pytest.mark.parametrize("kind", ["cakld", "forward", "reverse", "jsd"])
def test_losses_are_sums_over_the_responses(models, kind):
    teacher, student = models
    rows = rows_of()
    batch = batching.collate(rows, 0)
    total = ce = 0
    doubles = [m.double() for m in (families.build("llama", num_hidden_layers=2), student)]
    for ids, first in rows:
        with torch.no_grad():
            p = doubles[0](ids[None]).logits[0, first - 1 : -1].softmax(-1)
        q = doubles[1](ids[None]).logits[0, first - 1 : -1].softmax(-1)
        total = total + formula(kind, p, q).sum()
        ce += -q.log()[torch.arange(len(q)), ids[first:]].sum().item()
    total.backward()
    expected = {name: p.grad.float() for name, p in student.named_parameters()}
    student.zero_grad()
    student.float()
    function = objectives.row_function(kind, BETA)
    cache = objectives.from_cache(function, families.VOCAB)
    for loss_of, given, close in (
        (objectives.from_teacher(teacher, function, True), batch, 1e-4),
        (objectives.from_teacher(teacher, function, False), batch, 1e-4),
        # All tokens of the vocabulary, in float16.
        (cache, with_cache(teacher, batch, families.VOCAB), 2e-2),
    ):
        loss, report = loss_of(student, given)
        assert loss.item() == pytest.approx(total.item(), rel=close)
        assert report["ce"].item() == pytest.approx(ce, rel=1e-4)
        loss.backward()
        for name, parameter in student.named_parameters():
            apart = (parameter.grad - expected[name]).norm()
            assert apart < close * expected[name].norm() + 1e-5, name
        student.zero_grad()


def test_beta_counts_labels_only():
    """Two batches of 3 and 1 labels; what the model says of prompts and pads must not matter."""
    tops = {5: 0.9, 6: 0.6, 7: 0.4, 8: 0.5}

    def teacher(input_ids, **rest):
        logits = torch.full((*input_ids.shape, 3), -30.0)
        for token, top in tops.items():
            logits[input_ids == token] = torch.tensor([(1 - top) / 2, top, (1 - top) / 2]).log()
        return SimpleNamespace(logits=logits)

    teacher.device = torch.device("cpu")
    # A position's distribution is of the token after it: 5, 6 and 7 stand before labels.
    first = batching.collate([(torch.tensor([1, 5, 6, 2]), 2), (torch.tensor([7, 3]), 1)], pad=9)
    second = batching.collate([(torch.tensor([4, 4, 8, 3]), 3)], pad=9)
    assert first["tokens"] == 3 and second["tokens"] == 1
    found = objectives.confidence(teacher, [first, second], fused=False)
    assert found == pytest.approx((0.9 + 0.6 + 0.4 + 0.5) / 4)


def test_beta_of_a_model_and_of_its_cache(models):
    teacher, _ = models
    rows = rows_of()
    highest = []
    with torch.no_grad():
        for ids, first in rows:
            highest += teacher(ids[None]).logits[0, first - 1 : -1].softmax(-1).amax(-1).tolist()
    expected = sum(highest) / len(highest)
    batches = [batching.collate(part, 0) for part in (rows[:2], rows[2:])]
    for fused in (True, False):
        assert objectives.confidence(teacher, batches, fused) == pytest.approx(expected, rel=1e-5)
    stored = [with_cache(teacher, batch, 3) for batch in batches]
    assert objectives.confidence(None, stored) == pytest.approx(expected, rel=1e-3)
