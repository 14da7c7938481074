"""Batches, padding and shared starts change nothing: against one forward per sequence."""

import pytest
import torch
import transformers
from harness.scoring import position_logits, shared_start

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


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_forward_per_sequence(family):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**SIZES, **FAMILIES[family])
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
    assert widths == [(1, 50), (4, 1)]
