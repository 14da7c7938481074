"""Teacher and student: which logits are compared, and LoRA from its start to a plain checkpoint."""

import pytest
import torch
from transformers import AutoTokenizer

import families
from harness.errors import UserError
from harness.training import batching
from minillm import finetune_run, losses, models

FAMILIES = ["llama", "gpt2"]


def running(model):
    """What the losses ask of DeepSpeed's engine."""
    model.eval()
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        families.save(family, folder / family, tokenizer=True)
    families.save("llama", folder / "padded", tokenizer=True, vocab_size=320)
    return folder


def test_padding_of_the_vocabulary_is_cut_exactly(place, capsys):
    """A teacher whose embeddings are padded, with noise where no token is, teaches what the same
    teacher without padding does."""
    assert models.shared_columns(place / "padded", place / "llama") == families.VOCAB
    assert "the first 288 of 320 and 288" in capsys.readouterr().err
    plain, student = families.build("llama", seed=1), families.build("llama")
    padded = families.build("llama", seed=1, vocab_size=320)
    state = padded.state_dict()
    for name, tensor in plain.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
        else:
            state[name][: len(tensor)] = tensor
            state[name][len(tensor) :] = 50
    padded.load_state_dict(state)
    rows = [(ids.long(), 4) for ids in families.windows(3, 12)]
    batch = batching.collate(rows, 0)
    found = []
    for teacher, columns in ((plain, None), (padded, 288)):
        for fused in (False, True):
            student.zero_grad()
            loss, parts = finetune_run.distillation(
                teacher, losses.mix_rows, columns, fused, running(student), batch
            )
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in student.parameters()])
            found.append((loss.detach(), *parts.values(), gradients))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_special_tokens_of_one_side_are_cut_and_other_tokenizers_refused(place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    families.save("llama", tmp_path / "chat", vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<chat>"]})
    tokenizer.save_pretrained(tmp_path / "chat")
    assert models.shared_columns(tmp_path / "chat", place / "llama") == families.VOCAB
    with pytest.raises(UserError, match=r"different tokenizers, .* use --align uld") as error:
        models.shared_columns("tiny-llama", place / "llama")
    assert "(4096 tokens)" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_the_adapted_model(place, family, tmp_path):
    lora = {"r": 2, "alpha": 6, "dropout": 0.5, "seed": 0}
    before = families.build(family)
    adapted = models.add_lora(families.build(family), **lora).eval()
    ids = families.windows(2)
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, before(input_ids=ids).logits)
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        for parameter in trained.values():
            torch.nn.init.normal_(parameter, std=0.2)
        plain = models.merged(families.build(family), trained, torch.float32, **lora)
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
