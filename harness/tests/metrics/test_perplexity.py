"""Perplexity against loops a reader can check by eye."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harness.checkpoint import load
from harness.errors import UserError
from harness.losses import nll
from harness.metrics import perplexity

SHARED = Path(__file__).resolve().parents[4] / "shared"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def transformers_loop(model, windows) -> float:
    losses = []
    for window in windows:
        with torch.no_grad():
            losses.append(model(window[None], labels=window[None]).loss.double())
    return torch.exp(torch.stack(losses).mean()).item()


def test_equals_the_transformers_loop(monkeypatch):
    model = tiny_llama()
    windows = torch.randint(0, 97, (5, 24))
    # Slices that do not divide the rows, and batches that do not divide the windows.
    monkeypatch.setattr(nll, "CHUNK_ELEMENTS", 7 * 97)
    result = perplexity.perplexity(model, windows, batch_size=2)
    assert result.value == pytest.approx(transformers_loop(model, windows), rel=1e-5)
    assert (result.tokens, result.windows) == (5 * 23, 5)
    assert result.value == pytest.approx(math.exp(result.nll_sum / result.tokens))


def test_streamed_logits_give_the_same():
    model = tiny_llama()
    windows = torch.randint(0, 97, (3, 16))
    stream = perplexity.model_logits(model, windows, 2)
    next(stream)
    assert torch.is_grad_enabled()  # a half-read stream leaves the caller's mode alone
    streamed = nll.perplexity_of_logits(perplexity.model_logits(model, windows, 2), windows)
    assert streamed.value == pytest.approx(perplexity.perplexity(model, windows).value, rel=1e-6)


def test_nan_is_named_with_its_window():
    windows = torch.randint(0, 97, (3, 8))
    logits = torch.randn(3, 8, 97)
    logits[2, 4, 5] = math.nan
    with pytest.raises(UserError, match="window 2 contain NaN"):
        nll.perplexity_of_logits([(0, logits)], windows)


def test_window_follows_the_context():
    config = tiny_llama().config
    assert load.window_length(config) == 64
    assert load.window_length(config, 10) == 10
    with pytest.raises(UserError, match="context of 64"):
        load.window_length(config, 65)


@pytest.mark.realdata
def test_stories_on_wikitext_equals_ten_lines():
    path, text = SHARED / "models/stories260K", SHARED / "data/wikitext-2/test.txt"
    if not (path.exists() and text.exists()):
        pytest.skip("needs ../shared/models/stories260K and ../shared/data/wikitext-2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = tokenizer(text.read_text(encoding="utf-8")[:60_000], return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[:12]
    result = perplexity.perplexity(model, windows, batch_size=4)
    assert result.value == pytest.approx(transformers_loop(model, windows), rel=1e-4)
