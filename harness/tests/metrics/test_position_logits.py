"""Batches, padding and shared starts change nothing: against one forward per sequence."""

import pytest
import torch
import transformers

from harness.metrics.position_logits import position_logits, shared_start

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "LlamaConfig": {"num_key_value_heads": 2, "intermediate_size": 48},
    "MistralConfig": {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 24},
    "GPT2Config": {},
    "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "BloomConfig": {},
    "FalconConfig": {"alibi": True},
}
TEXT = {"num_key_value_heads": 2, "intermediate_size": 48}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
       "mamba_chunk_size": 8}  # fmt: skip
# Their caches hold more than keys and values.
HYBRIDS = {
    "Lfm2Config": TEXT | {"layer_types": ["conv", "full_attention"]},
    "Qwen3NextConfig": TEXT | {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"]},
    "JambaConfig": TEXT | {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2,
                           "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 8},
    "BambaConfig": TEXT | SSM | {"attn_layer_indices": [1]},
    "FalconH1Config": TEXT | SSM | {"mamba_d_ssm": 64, "head_dim": 8},
    "GraniteMoeHybridConfig": TEXT | SSM | {
        "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32,
        "layers_block_type": ["mamba", "attention"], "mamba_expand": 2},
    "Mamba2Config": {"num_attention_heads": 4, "num_heads": 4, "head_dim": 16, "expand": 2,
                     "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "RecurrentGemmaConfig": TEXT | {"lru_width": 32, "attention_window_size": 8, "head_dim": 8,
                                    "block_types": ["recurrent", "attention"]},
    "NemotronHConfig": TEXT | {
        "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
        "n_groups": 1, "chunk_size": 8, "layers_block_type": ["mamba", "attention"]},
}  # fmt: skip
FAMILIES |= HYBRIDS


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_forward_per_sequence(family):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**SIZES | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    start = torch.randint(1, 90, (40,)).tolist()
    sequences = [start + torch.randint(1, 90, (n,)).tolist() for n in (3, 9, 1, 5)]
    sequences += [torch.randint(1, 90, (n,)).tolist() for n in (7, 12)]
    positions = [[len(s) - 2, len(s) - 1] for s in sequences]
    groups = [[0, 1, 2, 3], [4, 5]]
    assert [shared_start(sequences, positions, g) for g in groups] == [39, 0]
    for shared in (None, groups):
        seen = set()
        for index, logits in position_logits(model, sequences, positions, 3, groups=shared):
            with torch.no_grad():
                expected = model(torch.tensor([sequences[index]])).logits[0, -2:]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            seen.add(index)
        assert seen == set(range(6))


def test_the_shared_start_is_run_once():
    config = transformers.LlamaConfig(**SIZES, **FAMILIES["LlamaConfig"])
    model = transformers.LlamaForCausalLM(config).eval()
    sequences = [[*range(1, 51), i] for i in range(60, 64)]
    widths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    list(position_logits(model, sequences, [[50]] * 4, 4, groups=[[0, 1, 2, 3]]))
    # The first three try out whether this model's cache can be shared.
    assert widths == [(1, 50), (2, 51), (2, 1), (1, 50), (4, 1)]
