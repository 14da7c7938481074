"""Teacher and student: which of their logits are compared."""

import pytest
import torch
from transformers import AutoTokenizer

import families
from harness.errors import UserError
from harness.losses import from_hidden
from harness.training import batching, distillation


def running(model):
    """What the losses ask of DeepSpeed's engine."""
    model.eval()
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    families.save("llama", folder / "llama", tokenizer=True)
    families.save("llama", folder / "padded", tokenizer=True, vocab_size=320)
    return folder


def test_padding_of_the_vocabulary_is_cut_exactly(place, capsys):
    """A teacher whose embeddings are padded, with noise where no token is, teaches what the same
    teacher without padding does."""
    assert distillation.shared_columns(place / "padded", place / "llama") == families.VOCAB
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
            loss, parts = distillation.over_labels(
                teacher, from_hidden.mix_rows, columns, fused, running(student), batch
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
    assert distillation.shared_columns(tmp_path / "chat", place / "llama") == families.VOCAB
    with pytest.raises(UserError, match=r"different tokenizers, .* use --align uld") as error:
        distillation.shared_columns("tiny-llama", place / "llama", "--align uld, or ")
    assert "(4096 tokens)" in str(error.value) and "\n" not in str(error.value)
