"""Divergences against their formulas in float64, and as losses against plain autograd."""

import math
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.errors import UserError
from harness.losses import divergence as d
from harness.metrics.distance import compare_models


def probabilities(logits, temperature):
    return (logits.double() / temperature).softmax(-1)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def formula(name, p, q, beta=0.3):
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[name]()


def measure(name):
    if name == "total_variation":
        return partial(d.mean_over_rows, d.tv_rows)
    return partial(d.jsd, beta=0.3) if name == "jsd" else getattr(d, name)


NAMES = ("forward_kl", "reverse_kl", "jsd", "total_variation")


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    teacher = 3 * torch.randn(2, 9, 31, generator=generator)
    return teacher, teacher + torch.randn(2, 9, 31, generator=generator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_equal_the_formula(name, temperature, logits):
    teacher, student = logits
    mask = torch.arange(18).reshape(2, 9) % 3 != 0
    student.requires_grad_()
    value = measure(name)(teacher, student, mask, temperature, chunk=4)
    value.backward()

    twin = student.detach().double().requires_grad_()
    p, q = probabilities(teacher, temperature), probabilities(twin, temperature)
    expected = formula(name, p, q)[mask].mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), twin.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_cakld_is_its_formula(beta, logits):
    """Its ends are the two KL divergences; the gradient is checked by differences too."""
    teacher, student = (x.double().flatten(0, 1)[:6, :7] for x in logits)
    p, q = teacher.softmax(-1), student.softmax(-1)
    log_p = teacher.log_softmax(-1)
    found = d.cakld_rows(log_p, student.log_softmax(-1), beta)
    torch.testing.assert_close(found, beta * kl(q, p) + (1 - beta) * kl(p, q))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: d.cakld_rows(log_p, x.log_softmax(-1), beta), student)
    whole = d.mean_over_rows(partial(d.cakld_rows, beta=beta), *(x.float() for x in logits))
    forward, reverse = d.forward_kl(*logits), d.reverse_kl(*logits)
    torch.testing.assert_close(whole, beta * reverse + (1 - beta) * forward)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_change_the_value(name, logits):
    whole = measure(name)(*logits, chunk=1000)
    for chunk in (1, 5):
        assert measure(name)(*logits, chunk=chunk).item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_loss_of_ones_own_is_a_row_function(logits):
    teacher, student = logits

    def mixed(log_p, log_q):
        return 0.2 * d.reverse_kl_rows(log_p, log_q) + 0.8 * d.kl_rows(log_p, log_q)

    expected = 0.2 * d.reverse_kl(teacher, student) + 0.8 * d.forward_kl(teacher, student)
    torch.testing.assert_close(d.mean_over_rows(mixed, teacher, student), expected)


def test_sums_of_several_columns_with_what_else_a_row_needs(logits):
    teacher, student = logits
    weights = torch.arange(18.0).reshape(2, 9) % 4
    labels = torch.arange(18).reshape(2, 9)

    def rows(log_p, log_q, label):
        nll = -log_q.gather(-1, label[:, None])[:, 0]
        return torch.stack([nll, d.kl_rows(log_p, log_q)], -1)

    student.requires_grad_()
    sums = d.sum_over_rows(rows, teacher, student, weights, chunk=4, extras=[labels])
    (2 * sums[0] + sums[1]).backward()
    twin = student.detach().double().requires_grad_()
    log_q = twin.log_softmax(-1)
    nll = (-log_q.gather(-1, labels[..., None])[..., 0] * weights).sum()
    divergence = (kl(probabilities(teacher, 1), log_q.exp()) * weights).sum()
    (2 * nll + divergence).backward()
    torch.testing.assert_close(sums.double(), torch.stack([nll, divergence]), rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)


def test_masked_rows_may_hold_anything_and_none_left_gives_zero(logits):
    teacher, student = logits
    mask = torch.ones(2, 9)
    mask[1, 4] = 0
    student[1, 4] = math.nan
    student.requires_grad_()
    d.forward_kl(teacher, student, mask).backward()
    assert student.grad[1, 4].eq(0).all() and student.grad.isfinite().all()
    assert d.forward_kl(teacher, student, torch.zeros(2, 9)).item() == 0


def test_forbidden_tokens_are_no_nan(logits):
    teacher, student = logits
    teacher[..., 3] = student[..., 3] = -math.inf
    expected = d.forward_kl(
        torch.cat([teacher[..., :3], teacher[..., 4:]], -1),
        torch.cat([student[..., :3], student[..., 4:]], -1),
    )
    student.requires_grad_()
    value = d.forward_kl(teacher, student)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert student.grad.isfinite().all()


def test_backward_keeps_one_gradient_in_the_students_dtype():
    """What two full float32 log-softmax tensors would hold must not be held between the passes."""
    student = torch.randn(64, 50, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(64, 50, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = d.forward_kl(teacher, student, chunk=8)
    assert sum(t.numel() for t in saved if t.dtype == torch.float32) <= 64 + 2
    loss.backward()
    assert student.grad.dtype == torch.bfloat16


def test_shapes_must_agree(logits):
    with pytest.raises(ValueError, match="differ in shape"):
        d.forward_kl(logits[0], logits[1][:, 1:])


def tiny(seed, vocabulary=53):
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **size, **heads)).eval()


def test_models_are_compared_over_all_tokens():
    dense, compressed = tiny(0), tiny(1)
    windows = torch.randint(0, 53, (5, 12))
    result = compare_models(dense, compressed, windows, batch_size=2)
    with torch.no_grad():
        p, q = (m(windows).logits.double().softmax(-1) for m in (dense, compressed))
    assert result.forward_kl == pytest.approx(kl(p, q).mean().item(), rel=1e-4)
    assert result.reverse_kl == pytest.approx(kl(q, p).mean().item(), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.top1_agreement == pytest.approx(agreement)
    assert result.tokens == 60
    same = compare_models(dense, dense, windows)
    assert same.forward_kl == pytest.approx(0, abs=1e-6) and same.top1_agreement == 1
    with pytest.raises(UserError, match="53 and 59"):
        compare_models(dense, tiny(0, 59), windows)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(logits):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for name in NAMES:
        values = []
        for device in ("cpu", "cuda"):
            teacher, student = (x.detach().to(device) for x in logits)
            student.requires_grad_()
            value = measure(name)(teacher, student, chunk=5)
            value.backward()
            values.append((value.item(), student.grad.cpu()))
        assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
        torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-4, atol=1e-6)
