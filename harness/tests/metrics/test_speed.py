"""Speed on a tiny model: the arithmetic holds together; real generation with a cache runs."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from harness.errors import UserError
from harness.metrics import speed


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=request.param,
        # Ends every sentence at once, unless generation is told not to.
        eos_token_id=list(range(60)),
    )
    return LlamaForCausalLM(config).eval()


def test_numbers_hold_together(model, monkeypatch):
    monkeypatch.setattr(speed, "COPY_BYTES", 2**20)
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: calls.append(generate(*a, **k)))
    result = speed.measure(model, batch_size=2, prompt=12, new=5, repeats=2)
    assert {tuple(ids.shape) for ids in calls} == {(2, 13), (2, 17)}
    step = result.batch_size / result.decode_tokens_s
    assert result.read_gb_s == pytest.approx(result.weight_bytes / step / 1e9)
    embedding = 64 * 32 * 4
    whole = sum(p.numel() * 4 for p in model.parameters())
    buffers = sum(b.numel() * 4 for b in model.buffers())
    tied = model.config.tie_word_embeddings
    assert result.weight_bytes <= whole + buffers - (0 if tied else embedding)
    assert result.weight_bytes >= whole - (0 if tied else embedding)
    assert min(result.prefill_tokens_s, result.first_token_s, result.copy_gb_s) > 0
    assert result.peak_memory_bytes > whole


def test_stored_bytes_leave_out_an_embedding_that_is_only_looked_up(tmp_path):
    tensors = {"model.embed_tokens.weight": torch.zeros(10, 4), "model.norm.weight": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert speed.stored_decode_bytes(tmp_path) == 176
    save_file({**tensors, "lm_head.weight": torch.zeros(10, 4)}, tmp_path / "model.safetensors")
    assert speed.stored_decode_bytes(tmp_path) == 176


def test_lengths_fit_the_context():
    assert speed.lengths(None) == speed.lengths(4096) == (512, 128)
    assert speed.lengths(100) == (80, 20)
    with pytest.raises(UserError, match="too short"):
        speed.lengths(2)


def test_missing_vllm_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(UserError, match="pip install"):
        speed.measure_vllm(tmp_path)


@pytest.mark.gpu
def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    result = speed.measure(model, batch_size=2, prompt=64, new=8, repeats=2)
    whole = sum(p.numel() * 2 for p in model.parameters())
    assert whole < result.peak_memory_bytes < 100 * whole
    assert result.device == "cuda:0" and result.copy_gb_s > 50
