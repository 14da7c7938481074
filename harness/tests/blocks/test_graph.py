"""What makes a stage's input, found from tensors and proved: scales and shifts fold in there."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import families
from harness.blocks import graph
from harness.blocks.decoder import Decoder
from harness.blocks.stages import find_stages
from harness.modules import get_matrix

GQA, GATED, ANY = families.GQA, families.GATED, families.ANY
MOE = GQA | {
    "moe_intermediate_size": 24, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24,
}  # fmt: skip
MORE = {
    "falcon-rw": ("FalconConfig", families.SHARED | {"alibi": True, "multi_query": False,
                  "parallel_attn": False, "bias": True}),
    "bigcode": ("GPTBigCodeConfig", ANY | families.SIZES | {"n_embd": 32, "n_positions": 64}),
    "gemma3": ("Gemma3TextConfig", GQA | {"head_dim": 8}),
    "phi": ("PhiConfig", GATED),
    "cohere": ("CohereConfig", GQA),
    "olmo2": ("Olmo2Config", GQA),
    "qwen2-moe": ("Qwen2MoeConfig", MOE | {"num_experts": 4}),
    "deepseek-v3": ("DeepseekV3Config", MOE | {"num_key_value_heads": 4, "q_lora_rank": 16,
                    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                    "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                    "first_k_dense_replace": 1}),
}  # fmt: skip
# End of the name of a stage's first linear -> end of the name of what makes its input.
LLAMA = {
    "q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm",
    "down_proj": "up_proj",
}  # fmt: skip
SANDWICHED = LLAMA | {"gate_proj": "pre_feedforward_layernorm"}
FUSED = {
    "query_key_value": "input_layernorm", "dense": "query_key_value",
    "dense_h_to_4h": "post_attention_layernorm", "dense_4h_to_h": None,
}  # fmt: skip
GPT2 = {"c_attn": "ln_1", "attn.c_proj": "c_attn", "c_fc": "ln_2", "mlp.c_proj": None}
EXPECTED = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma"], LLAMA),
    **dict.fromkeys(["gemma2", "gemma3"], SANDWICHED),
    **dict.fromkeys(["bloom", "falcon-rw", "neox"], FUSED),
    **dict.fromkeys(["gpt2", "bigcode"], GPT2),
    "opt": {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm",
            "fc2": "fc1"},
    # Attention and MLP side by side read one norm.
    "falcon": {"query_key_value": "input_layernorm", "dense": "query_key_value",
               "dense_4h_to_h": None},
    "falcon-new": {"query_key_value": "ln_attn", "dense": "query_key_value",
                   "dense_h_to_4h": "ln_mlp", "dense_4h_to_h": None},
    "starcoder2": {"q_proj": "input_layernorm", "o_proj": "v_proj",
                   "c_fc": "post_attention_layernorm", "c_proj": None},
    "phi": {"q_proj": "input_layernorm", "dense": "v_proj", "fc2": None},
    "phi3": {"qkv_proj": "input_layernorm", "o_proj": "qkv_proj",
             "gate_up_proj": "post_attention_layernorm", "down_proj": "gate_up_proj"},
    "cohere": {"q_proj": "input_layernorm", "o_proj": "v_proj", "down_proj": "up_proj"},
    "olmo2": {"q_proj": None, "o_proj": "v_proj", "gate_proj": None, "down_proj": "up_proj"},
    "mixtral": {"q_proj": "input_layernorm", "o_proj": "v_proj"},
    # Its router and its experts read the second norm too.
    "qwen2-moe": {"q_proj": "input_layernorm", "o_proj": "v_proj",
                  "shared_expert.gate_proj": None, "shared_expert.down_proj": "up_proj"},
    "deepseek-v3": {"q_a_proj": "input_layernorm", "q_b_proj": "q_a_layernorm",
                    "kv_b_proj": "kv_a_layernorm", "o_proj": "kv_b_proj",
                    "down_proj": "up_proj"},
}  # fmt: skip


@pytest.fixture
def decoder(request, tmp_path):
    family = request.param
    if family in MORE:
        kind, words = MORE[family]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**words))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.08)
        model.save_pretrained(tmp_path)
    else:
        families.save(family, tmp_path)
    decoder = Decoder(tmp_path, dtype=torch.float32)
    decoder.family = family
    return decoder


def found_in(decoder, index=0):
    decoder.load(index)
    hidden = decoder.embed(families.windows(2, 16))
    stages = find_stages(decoder.blocks[index], lambda: decoder.forward(index, hidden))
    return stages, graph.find(decoder, index, stages)


@pytest.mark.parametrize("decoder", EXPECTED, indirect=True)
def test_scales_folded_into_every_producer_leave_the_output(decoder):
    before = torch.get_rng_state()
    stages, producers = found_in(decoder)
    assert torch.equal(torch.get_rng_state(), before)
    block = decoder.blocks[0]
    for end, maker in EXPECTED[decoder.family].items():
        number = next(n for n, names in enumerate(stages) if f".{names[0]}".endswith(f".{end}"))
        producer = producers[number]
        assert (producer and producer.name.split(".")[-1]) == maker, (end, producer)
    # Nothing was changed by looking.
    for name, tensor in decoder.block_tensors(0).items():
        inner = name.removeprefix(f"{decoder.prefix}.0.")
        assert torch.equal(block.state_dict()[inner], tensor)
    hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))
    decoder.embed(families.windows(2, 16))
    output = decoder.forward(0, hidden)
    generator = torch.Generator().manual_seed(4)
    for names, producer in zip(stages, producers, strict=True):
        if producer is None:
            continue
        width = get_matrix(block.get_submodule(names[0])).shape[1]
        scale = 0.5 + 1.5 * torch.rand(width, generator=generator)
        shift = torch.randn(width, generator=generator) if producer.takes_shift else None
        used = graph.fold(block, producer, names, scale, shift)
        assert used.shape == scale.shape and (used > 0).all()
        assert producer.kind == "linear" or torch.equal(used, scale)
    folded = decoder.forward(0, hidden)
    assert (folded - output).norm() < 1e-4 * (output - hidden).norm()


@pytest.mark.parametrize("decoder", ["opt", "bloom", "gpt2", "neox", "starcoder2"], indirect=True)
def test_shifts_where_there_are_biases(decoder):
    _, producers = found_in(decoder)
    # Norms and values; not what a ReLU passes on.
    assert [p and p.takes_shift for p in producers[:3]] == [True, True, True]
    assert producers[3] is None or not producers[3].takes_shift


@pytest.mark.parametrize("decoder", ["llama"], indirect=True)
def test_query_heads_of_one_key_share_a_scale(decoder):
    stages, producers = found_in(decoder)
    rows = producers[1].rows
    assert rows.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    scale = torch.linspace(0.5, 2, 32)
    used = graph.fold(decoder.blocks[0], producers[1], stages[1], scale)
    torch.testing.assert_close(used[:8], (scale[:8] * scale[8:16]).sqrt())
    assert torch.equal(used[:8], used[8:16])
    with pytest.raises(ValueError, match="v_proj takes no shift"):
        graph.fold(decoder.blocks[0], producers[1], stages[1], scale, scale)


@pytest.mark.parametrize("decoder", ["llama"], indirect=True)
def test_a_producer_that_something_else_reads_is_refused(decoder, monkeypatch):
    inner = decoder.load(0).mlp
    real = inner.forward
    monkeypatch.setattr(inner, "forward", lambda x: real(x) + x.mean(-1, keepdim=True))
    _, producers = found_in(decoder)
    assert [p and p.name for p in producers] == [
        "input_layernorm", "self_attn.v_proj", None, "mlp.up_proj"
    ]  # fmt: skip


@pytest.mark.parametrize("decoder", ["llama"], indirect=True)
def test_a_block_that_adds_nothing_and_one_that_gives_no_numbers(decoder):
    """Folding leaves the one as it is; of the other nothing is proved."""
    block = decoder.load(0)
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    hidden = decoder.embed(families.windows(2, 16))
    stages = find_stages(block, lambda: decoder.forward(0, hidden))
    producers = graph.find(decoder, 0, stages)
    assert all(producers) and graph.prove(decoder, 0, stages, producers) == [0, 0, 0, 0]
    block.mlp.down_proj.weight.data[0, 0] = torch.nan
    assert graph.find(decoder, 0, stages) == [None] * 4


@pytest.mark.parametrize("decoder", ["llama"], indirect=True)
def test_a_proof_cut_off_leaves_the_block_as_it_was(decoder, monkeypatch):
    stages, producers = found_in(decoder)
    before = {name: p.clone() for name, p in decoder.blocks[0].named_parameters()}
    outputs = [decoder.forward(0, decoder.embed(families.windows(2, 16)))]
    # The forward before folding; the one after it finds none left.
    monkeypatch.setattr(decoder, "forward", lambda *_: outputs.pop())
    with pytest.raises(IndexError):
        graph.prove(decoder, 0, stages, producers)
    for name, parameter in decoder.blocks[0].named_parameters():
        assert torch.equal(parameter, before[name]), name
