"""Universal logit distillation: the formula, and the places where two tokenizers agree."""

import pytest
import torch
from torch.nn import functional as F

import families
from harness.checkpoint.load import load_tokenizer
from minillm import align

PAIR = {"prompt": "def add(a, b):\n", "response": " return the sum of añb 日本 and more"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    families.save("llama", folder, tokenizer=True)
    return load_tokenizer("tiny-llama"), load_tokenizer(folder)


def test_the_loss_is_the_formula_with_its_gradient():
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 7, 11, generator=draw)
    student = torch.randn(2, 5, 8, generator=draw, requires_grad=True)
    masks = torch.zeros(2, 7).bool(), torch.zeros(2, 5).bool()
    masks[0][0, [1, 4, 6]] = masks[1][0, [0, 1, 3]] = True
    masks[0][1, [5]] = masks[1][1, [4]] = True
    loss = align.uld_loss(teacher, student, masks)
    loss.backward()

    twin = student.detach().double().requires_grad_()
    expected = 0
    for row, t, s in ((0, 1, 0), (0, 4, 1), (0, 6, 3), (1, 5, 4)):
        p = teacher[row, t].double().softmax(-1).sort(descending=True).values
        q = F.pad(twin[row, s].softmax(-1).sort(descending=True).values, (0, 3))
        expected = expected + (p - q).abs().sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)
    masks[0][1, 0] = True
    with pytest.raises(ValueError, match="as many places"):
        align.uld_loss(teacher, student, masks)


def test_at_a_place_both_have_read_the_same_text(tokenizers):
    sides = [align.encode(tokenizer, **PAIR) for tokenizer in tokenizers]
    found = align.places(*sides, longest=500)
    assert len(found[0]) == len(found[1]) > 5
    assert found[0][0] == sides[0][2] - 1 and found[1][0] == sides[1][2] - 1
    for at in zip(*found, strict=True):
        read = {
            tokenizer.decode(side[0][: position + 1])
            for tokenizer, side, position in zip(tokenizers, sides, at, strict=True)
        }
        assert len(read) == 1, read
    # Equal tokenizers agree everywhere, the last place predicting the end.
    same = align.places(sides[0], sides[0], longest=500)
    assert same[0] == same[1] and same[0][-1] == len(sides[0][0]) - 2
    assert max(align.places(*sides, longest=12)[0], default=0) < 11


def test_a_distribution_is_at_distance_0_from_its_permutation():
    logits = torch.randn(1, 4, 9)
    mask = torch.ones(1, 4).bool()
    loss = align.uld_loss(logits, logits[..., torch.randperm(9)], (mask, mask))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_a_batch_trains_a_student_on_a_teacher_of_other_tokens(tokenizers):
    teacher = families.build("llama", vocab_size=len(tokenizers[0]))
    teacher.lm_head.weight.data.mul_(10)  # sharp: a flat one is as far from all that are sharper
    student = families.build("llama", vocab_size=len(tokenizers[1]))
    pairs = [PAIR, {"prompt": "x = 1\n", "response": "sets x"}]
    some = align.batch(pairs, *tokenizers, longest=60, pads=(0, 0))
    assert some["tokens"] == sum(
        len(tokenizers[1](p["response"], add_special_tokens=False)["input_ids"]) + 1 for p in pairs
    )
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    seen = []
    for _ in range(8):
        loss, parts = align.distillation(teacher, 0.5, student, some)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append({name: value.item() for name, value in parts.items()})
    assert seen[-1]["ce"] < seen[0]["ce"] and seen[-1]["uld"] < seen[0]["uld"]
    assert loss.item() == pytest.approx((seen[-1]["ce"] + seen[-1]["uld"]) / 2, rel=1e-5)
