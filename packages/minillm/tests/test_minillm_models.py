"""Teacher and student: LoRA from its start to a plain checkpoint."""

import pytest
import torch

import families
from harness.errors import UserError
from harness.training import lora
from minillm import models

FAMILIES = ["llama", "gpt2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        families.save(family, folder / family, tokenizer=True)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_the_adapted_model(place, family, tmp_path):
    options = {"r": 2, "alpha": 6, "dropout": 0.5, "seed": 0}
    before = families.build(family)
    adapted = lora.add(families.build(family), **options).eval()
    ids = families.windows(2)
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, before(input_ids=ids).logits)
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        for parameter in trained.values():
            torch.nn.init.normal_(parameter, std=0.2)
        plain = lora.merged(families.build(family), trained, torch.float32, **options)
        expected = adapted(input_ids=ids).logits
        assert (expected - before(input_ids=ids).logits).abs().max() > 0.1
        assert plain.state_dict().keys() == before.state_dict().keys()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        # The same adapter, from a folder as peft writes it.
        adapted.save_pretrained(tmp_path / "adapter")
        adapter = str(tmp_path / "adapter")
        loaded = models.load_teacher(place / family, device="cpu", peft_path=adapter)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(UserError, match=r"holds no adapter_config.json"):
        models.load_teacher(place / family, device="cpu", peft_path=str(place))
    with pytest.raises(UserError, match="does not fit the model"):
        models.load_teacher("tiny-llama", device="cpu", peft_path=adapter)
