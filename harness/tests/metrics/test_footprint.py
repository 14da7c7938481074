"""Sizes against sums by hand; MACs against torch's flop counter with eager attention."""

import json
import struct

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from harness.checkpoint import layouts
from harness.checkpoint.nonuniform import skeleton
from harness.errors import UserError
from harness.metrics import footprint as fp
from harness.metrics.macs import macs_per_token
from harness.quant.grid import Grid
from harness.quant.scheme import Scheme

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LlamaConfig", SIZES),
        ("Qwen3Config", {**SIZES, "head_dim": 16}),
        ("GPT2Config", {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_macs_equal_the_flop_counter(kind, settings):
    config = getattr(transformers, kind)(**settings, bos_token_id=0, eos_token_id=0)
    length = 24
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    counted = counter.get_total_flops() / 2 / length
    assert macs_per_token(skeleton(config), length)["total"] == counted


def test_macs_follow_the_sizes_in_the_file():
    model = skeleton(transformers.LlamaConfig(**SIZES))
    before = macs_per_token(model, 8)
    pruned = {"model.layers.0.self_attn.q_proj": (16, 32), "model.layers.1.mlp.up_proj": (40, 32)}
    after = macs_per_token(model, 8, pruned)
    assert before["linears"] - after["linears"] == 16 * 32 + 8 * 32
    assert before["attention"] - after["attention"] == 2 * 16 * 8


def save(folder, tensors, quantization=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def described(layout, symmetric=True):
    return layouts.of(layout).config(Scheme(Grid(4, 32, symmetric)), False)


def test_dense_checkpoint_counts_parameters_and_not_masks(tmp_path):
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    size = fp.footprint(tmp_path, tied=True)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.bits_per_weight is None
    assert size.bits_per_parameter == 16
    assert size.disk_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert fp.memory_bytes(model) >= 2 * size.parameters

    old = {
        "h.0.attn.c_attn.weight": torch.zeros(8, 24),
        "h.0.attn.bias": torch.zeros(1, 1, 16, 16, dtype=torch.uint8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "rotary_emb.inv_freq": torch.zeros(4),
    }
    assert fp.footprint(save(tmp_path / "old", old)).parameters == 8 * 24


def test_packed_linears_count_as_the_matrices_they_stand_for(tmp_path):
    rows, columns, groups = 40, 64, 2
    packed = {
        "a.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        "a.weight_scale": torch.zeros(rows, groups, dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([rows, columns]),
        "a.bias": torch.zeros(rows, dtype=torch.bfloat16),
        "norm.weight": torch.zeros(columns, dtype=torch.bfloat16),
    }
    size = fp.footprint(save(tmp_path / "ct", packed, described("compressed-tensors")))
    assert size.quantized_parameters == rows * columns
    assert size.parameters == rows * columns + rows + columns
    held = rows * columns // 2 + 2 * rows * groups + 16
    assert size.bits_per_weight == 8 * held / (rows * columns)

    gptq = {
        "a.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        "a.qzeros": torch.zeros(groups, rows // 8, dtype=torch.int32),
        "a.scales": torch.zeros(groups, rows, dtype=torch.float16),
        "a.g_idx": torch.zeros(columns, dtype=torch.int32),
    }
    size = fp.footprint(save(tmp_path / "gptq", gptq, described("gptq")))
    assert size.parameters == size.quantized_parameters == rows * columns
    held = rows * columns // 2 + groups * rows // 2 + 2 * groups * rows + 4 * columns
    assert size.bits_per_weight == 8 * held / (rows * columns)


def test_shards_are_summed_and_a_missing_one_is_named(tmp_path):
    parts = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    for i, (name, tensor) in enumerate(parts.items()):
        save_file({name: tensor}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    assert fp.footprint(tmp_path).parameters == 17
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-1\.safetensors, which is not there"):
        fp.footprint(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "header", "garbage"])
def test_damage_is_named(tmp_path, damage):
    path = save(tmp_path, {"a": torch.zeros(8, 8)}) / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(
        {
            "cut": raw[:-5],
            "header": struct.pack("<Q", 10**9) + raw[8:],
            "garbage": raw[:8] + b"?" * (len(raw) - 8),
        }[damage]
    )
    with pytest.raises(UserError, match="corrupt or truncated"):
        fp.footprint(tmp_path)


def test_memory_counts_tied_weights_once():
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert fp.memory_bytes(model) <= parameters + buffers
    assert fp.loaded_bits_per_weight(model) is None
