"""Blocks of unequal size: built, loaded, walked, counted, packed; refused by plain transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.blocks.streams import stream_logits
from harness.checkpoint import load, nonuniform, readers
from harness.checkpoint.nonuniform import skeleton
from harness.metrics.footprint import linear_shapes, stored_size
from harness.metrics.macs import macs_per_token
from harness.quant import grid
from harness.quant.scheme import Scheme

KEPT = [0, 3]
PREFIX = "transformer.h"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """BLOOM whose block 1 keeps heads 0 and 3 and whose block 3 keeps half of its MLP, cut by hand;
    and the model with the rest at zero."""
    folder = tmp_path_factory.mktemp("uneven")
    model = families.save("bloom", folder, tokenizer=True, hidden_size=64)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    base = "" if "h.0.mlp.dense_h_to_4h.weight" in tensors else "transformer."
    heads = torch.arange(4 * 16).view(4, 16)[KEPT].flatten()
    fused = torch.arange(4 * 48).view(4, 48)[KEPT].flatten()
    channels = torch.arange(0, 256, 2)

    def cut(name, lines, dim):
        full = f"{base}h.{name}"
        tensors[full] = tensors[full].index_select(dim, lines).contiguous()
        tensor = model.get_parameter(f"transformer.h.{name}")
        gone = torch.tensor([i for i in range(tensor.shape[dim]) if i not in set(lines.tolist())])
        tensor.data.index_fill_(dim, gone, 0)

    for kind in ("weight", "bias"):
        cut(f"1.self_attention.query_key_value.{kind}", fused, 0)
        cut(f"3.mlp.dense_h_to_4h.{kind}", channels, 0)
    cut("1.self_attention.dense.weight", heads, 1)
    cut("3.mlp.dense_4h_to_h.weight", channels, 1)
    save_file(tensors, file, metadata={"format": "pt"})
    entries = [{"heads": 4, "kv_heads": 4, "channels": 256, "linears": {}} for _ in range(5)]
    entries[1] |= {
        "heads": 2,
        "kv_heads": 2,
        "attention": "self_attention",
        "kept_heads": KEPT,
        "linears": {
            "self_attention.query_key_value": [96, 64],
            "self_attention.dense": [64, 32],
        },
    }
    shapes = {"mlp.dense_h_to_4h": [128, 64], "mlp.dense_4h_to_h": [64, 128]}
    entries[3] |= {"channels": 128, "linears": shapes}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {nonuniform.KEY: entries}))
    return folder, model


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def test_it_computes_and_generates_as_the_model_with_zeros(uneven):
    folder, model = uneven
    small, ids = load.load_model(folder), families.windows(3)
    assert (logits(small, ids) - logits(model, ids)).abs().max() < 1e-4
    streamed = torch.cat([part for _, part in stream_logits(folder, ids, batch_size=3)])
    assert torch.equal(streamed, logits(small, ids))
    tokens = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(small.generate(ids, **tokens), model.generate(ids, **tokens))


def test_plain_transformers_refuses(uneven):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(uneven[0])
    config = load.load_config(uneven[0])
    assert "differ in size" in readers.describe("dense", None, config, None)


def test_it_is_counted_as_it_is(uneven):
    folder, _ = uneven
    config = load.load_config(folder)
    model = skeleton(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert stored_size(folder, config).parameters == parameters
    macs = macs_per_token(model, 100)
    assert macs == macs_per_token(model, 100, linear_shapes(folder))
    full = 64 * (3 * 64 + 64 + 2 * 256)
    assert macs["linears"] == 5 * full - 32 * 64 * 4 - 128 * 64 * 2
    assert macs["attention"] == 2 * 100 * (4 * 64 + 32)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_a_layer_wise_method_goes_on_from_it(uneven, layout, tmp_path):
    folder, _ = uneven
    a_grid = grid.Grid(4, 32, True)
    scale = torch.float16 if layout == "gptq" else torch.float32

    def update(matrices, statistics, hand):
        return {n: sequential.Update(grid.nearest(w, a_grid, scale)) for n, w in matrices.items()}

    method = sequential.Method(
        "nearest", {}, [sequential.per_stage(update)], (), layout=layout, scheme=Scheme(a_grid)
    )
    sequential.compress(Decoder(folder), method, tmp_path / "out", base=str(folder))
    small, ids = load.load_model(tmp_path / "out"), families.windows(3)
    streamed = torch.cat([p for _, p in stream_logits(tmp_path / "out", ids, batch_size=3)])
    assert torch.equal(streamed, logits(small, ids))
    close = (logits(small, ids) - logits(load.load_model(folder), ids)).abs().mean()
    assert 0 < close < logits(small, ids).std()


def test_bitsandbytes_quantizes_it(uneven):
    pytest.importorskip("bitsandbytes")
    folder, _ = uneven
    with pytest.raises(load.UserError, match=r"multiples of 64.*self_attention.dense has 32"):
        load.load_model(folder, load="nf4-dq")
    small, ids = load.load_model(folder, load="int8"), families.windows(2)
    error = (logits(small, ids) - logits(load.load_model(folder), ids)).abs().mean()
    assert 0 < error < 0.2 * logits(small, ids).std()


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
LLAMA |= {"intermediate_size": 48, "attention_bias": False, "mlp_bias": False}


def test_ordinary_fields_where_the_family_has_them():
    q, k = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    changes = {"heads": 4, "kv_heads": 2, "head_dim": 4}
    same = nonuniform.ordinary(LLAMA, {q: (16, 32), k: (8, 32)}, changes)
    assert same == LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2}
    # 32 is no multiple of 6.
    changes = {"heads": 6, "kv_heads": 3, "head_dim": 4}
    twin = nonuniform.ordinary(LLAMA, {q: (24, 32), k: (12, 32)}, changes)
    assert (twin["model_type"], twin["sliding_window"]) == ("mistral", None)
    biased = LLAMA | {"attention_bias": True}
    assert nonuniform.ordinary(biased, {q: (24, 32), k: (12, 32)}, changes) is None
    assert nonuniform.ordinary(LLAMA, {q: (20, 32)}, changes) is None
    opt = {"model_type": "opt", "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 64}
    fc1 = "model.decoder.layers.0.fc1.weight"
    assert nonuniform.ordinary(opt, {fc1: (40, 32)}, {"channels": 40})["ffn_dim"] == 40
    layers = LLAMA | {"layer_types": ["full_attention"] * 2}
    assert nonuniform.with_fields(layers, {"layers": 1})["layer_types"] == ["full_attention"]
