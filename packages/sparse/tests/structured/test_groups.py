"""Groups against each family's own layout, written out here: taking out groups that are zero leaves
the logits as they were, whole, block by block, and while generating with a cache."""

import pytest
import torch
import transformers

import families
from harness.blocks.decoder import Decoder
from harness.blocks.streams import stream_logits
from harness.checkpoint import load, nonuniform
from harness.errors import UserError
from sparse.llm_pruner import prune
from sparse.structured import groups

HEADS, HIDDEN = 4, families.HIDDEN
EVERYWHERE = {
    "block_attention_layer_start": 0,
    "block_attention_layer_end": 5,
    "block_mlp_layer_start": 0,
    "block_mlp_layer_end": 5,
}
SPLIT = ("llama", "mha", "opt", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "starcoder2")
FUSED = ("gpt2", "bloom", "neox", "falcon", "falcon-new", "phi3")
QUIET = {"pruner_type": "l2", "pruning_ratio": 0.5, "multiple": 1}


def save(family, folder):
    """A float32 model in ``folder``; "mha" is LLaMA without grouped queries."""
    if family == "mha":
        return families.save("llama", folder, num_key_value_heads=4)
    return families.save(family, folder)


def of_head(family: str, group: int, width: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Rows of every linear that feeds a group of heads, and "out": columns of what reads it."""
    g = HEADS // kv_heads
    queries = torch.arange(group * g * width, (group + 1) * g * width)
    keys = torch.arange(group * width, (group + 1) * width)
    if family == "gpt2":
        fused = torch.cat([queries + i * HEADS * width for i in range(3)])
        return {"c_attn": fused, "c_proj": queries}
    if family in ("bloom", "neox", "falcon-new"):
        each = (g + 2) * width
        fused = torch.arange(group * each, (group + 1) * each)
        return {"query_key_value": fused, "dense": queries}
    if family == "phi3":
        k = HEADS * width
        fused = torch.cat([queries, k + keys, k + kv_heads * width + keys])
        return {"qkv_proj": fused, "o_proj": queries}
    out = "out_proj" if family == "opt" else "o_proj"
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, out: queries}


OUT = ("c_proj", "dense", "o_proj", "out_proj", "fc2", "down_proj", "dense_4h_to_h")


@torch.no_grad()
def zero_half(family: str, model) -> None:
    """Zero half of every block's heads and channels, with biases, by the family's layout."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    kv_heads = {"falcon": 1, "falcon-new": 2}.get(family) or getattr(
        config, "num_key_value_heads", HEADS
    )
    width = getattr(config, "head_dim", None) or HIDDEN // HEADS
    for name, module in model.named_modules():
        if not name.endswith(("attn", "attention")) or not list(module.children()):
            continue
        for group in torch.randperm(kv_heads, generator=generator)[: kv_heads // 2].tolist():
            for leaf, lines in of_head(family, group, width, kv_heads).items():
                zero(module.get_submodule(leaf), lines, columns=leaf in OUT)
    for name, module in model.named_modules():
        leaves = [n for n, m in module.named_children() if n in OUT[4:] or n == "c_proj"]
        if not leaves or name.endswith(("attn", "attention")):
            continue
        columns = matrix(module.get_submodule(leaves[0])).shape[1]
        gone = torch.randperm(columns, generator=generator)[: columns // 2]
        zero(module.get_submodule(leaves[0]), gone, columns=True)
        for leaf in ("fc1", "c_fc", "dense_h_to_4h", "gate_proj", "up_proj", "gate_up_proj"):
            if hasattr(module, leaf):
                both = torch.cat([gone, gone + columns]) if leaf == "gate_up_proj" else gone
                zero(module.get_submodule(leaf), both, columns=False)


def matrix(module):
    return module.weight.T if hasattr(module, "nf") else module.weight


def zero(module, lines, columns):
    if columns:
        matrix(module)[:, lines] = 0
        return
    matrix(module)[lines] = 0
    if module.bias is not None:
        module.bias[lines] = 0


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", [*SPLIT, *FUSED, "mixtral"])
def test_groups_that_are_zero_leave_no_trace(family, tmp_path, capfd):
    model = save(family, tmp_path / "model")
    zero_half(family, model)
    model.save_pretrained(tmp_path / "model")
    result = prune(tmp_path / "model", out=tmp_path / "out", **QUIET, **EVERYWHERE)
    rows, notes = result["rows"], capfd.readouterr().err
    if family != "falcon":  # multi-query: one key and value for all heads, one group
        assert all(row["heads"] == [4, 2] for row in rows)
    assert ("all of it is one group" in notes) == (family == "falcon")
    if family != "mixtral":  # its experts are no linear layers
        assert all(row["channels"][1] == row["channels"][0] // 2 for row in rows)
    assert result["parameters"][1] < 0.95 * result["parameters"][0]

    ids = families.windows(3, 20)
    small, wanted = load.load_model(tmp_path / "out"), logits(model, ids)
    assert (logits(small, ids) - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
    streamed = torch.cat([part for _, part in stream_logits(tmp_path / "out", ids, batch_size=3)])
    assert torch.equal(streamed, logits(small, ids))
    tokens = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(small.generate(ids, **tokens), model.generate(ids, **tokens))
    assert sum(p.numel() for p in small.parameters()) == result["parameters"][1]


RMS = ("llama", "mha", "mistral", "qwen2", "qwen3", "phi3")


@pytest.mark.parametrize("family", RMS)
def test_hidden_channels_that_are_zero_leave_no_trace(family, tmp_path):
    model = save(family, tmp_path / "model")
    gone = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(2))[:10]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or parameter.shape == (HIDDEN,):
                parameter[gone] = 0
            elif parameter.ndim == 2:
                parameter[:, gone] = 0
    model.save_pretrained(tmp_path / "model")
    options = QUIET | {"pruning_ratio": 10 / HIDDEN, "channel_wise": True}
    result = prune(tmp_path / "model", out=tmp_path / "out", **options)
    assert result["hidden"] == [32, 22] and result["ordinary"]
    ids = families.windows(3)
    wanted = logits(model, ids)
    got = logits(load.load_model(tmp_path / "out"), ids)
    assert (got - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


REFUSED = {
    **dict.fromkeys(("opt", "gpt2", "bloom", "falcon", "falcon-new", "neox"), "on tied sizes"),
    **dict.fromkeys(("gemma", "gemma2", "starcoder2"), "no plain RMS norms"),
    "mixtral": "mlp.gate.weight belongs to no linear layer",
}


@pytest.mark.parametrize("family", REFUSED)
def test_hidden_channels_of_other_families_are_refused(family, tmp_path):
    families.save(family, tmp_path / "model")
    with pytest.raises(UserError, match=REFUSED[family]):
        prune(tmp_path / "model", out=tmp_path / "out", **QUIET, channel_wise=True)
    assert not list(tmp_path.glob("out*"))


def test_a_block_that_cannot_do_without_a_head_is_refused(tmp_path, monkeypatch):
    families.save("bloom", tmp_path / "model")
    # As if the slopes of the heads that stay were not handed on.
    monkeypatch.setattr(nonuniform, "head_axis", lambda *args: None)
    with pytest.raises(UserError, match="block 0 of BloomForCausalLM"):
        prune(tmp_path / "model", out=tmp_path / "out", **QUIET, **EVERYWHERE)


def test_a_norm_over_all_heads_makes_them_one_group(tmp_path):
    config = transformers.Olmo2Config(**families.GATED)
    transformers.Olmo2ForCausalLM(config).save_pretrained(tmp_path)
    structure = groups.find(Decoder(tmp_path, dtype=torch.float32), 1)
    assert [some.reader for some in structure.groups] == ["mlp.down_proj"]
    assert structure.left == {"self_attn.o_proj": "all of it is one group"}
