"""Rotations of the residual stream leave the function alone, in the family's own architecture."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import families
from harness.blocks import rotation
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, compress
from harness.errors import UserError

WINDOWS = families.windows(3)
RMS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"]
LAYER_NORMS = ["opt", "gpt2", "falcon", "falcon-new", "neox", "starcoder2"]


def logits(decoder):
    hidden = decoder.embed(WINDOWS)
    for index in range(len(decoder)):
        decoder.load(index)
        hidden = decoder.forward(index, hidden)
        decoder.release(index)
    return decoder.logits(WINDOWS, hidden)


@pytest.mark.parametrize("family", [*RMS, *LAYER_NORMS])
def test_logits_stay(family, tmp_path):
    families.save(family, tmp_path / "model")
    turned = rotation.find(tmp_path / "model")
    plain = Decoder(tmp_path / "model", dtype=torch.float32)
    expected = logits(plain)
    rotated = Decoder(tmp_path / "model", dtype=torch.float32, transform=turned)
    error = (logits(rotated) - expected).norm() / expected.norm()
    assert error < 1e-5
    # It is not the identity.
    change = rotated.embed(WINDOWS) - plain.embed(WINDOWS)
    assert change.norm() > 0.1 * plain.embed(WINDOWS).norm()
    # As a result it is an ordinary checkpoint of the family.
    compress(rotated, Method("rotate", {}, [], ()), tmp_path / "out", base="model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == type(plain.model).__name__
    with torch.no_grad():
        got = model(WINDOWS).logits
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_phi_and_an_embedding_of_the_same_width(tmp_path):
    config = transformers.PhiConfig(**(families.GATED | {"partial_rotary_factor": 0.5}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    expected = logits(Decoder(tmp_path / "model", dtype=torch.float32))
    turned = rotation.find(tmp_path / "model", random=True)
    got = logits(Decoder(tmp_path / "model", dtype=torch.float32, transform=turned))
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["bloom", "gemma2", "mixtral", "gemma3", "olmo2"])
def test_families_that_would_change_are_refused(family, tmp_path):
    more = {
        "gemma3": ("Gemma3TextConfig", families.GQA | {"head_dim": 8}),
        "olmo2": ("Olmo2Config", families.GQA),
    }
    if family in more:
        kind, words = more[family]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**words))
        model.save_pretrained(tmp_path / "model")
    else:
        families.save(family, tmp_path / "model")
    with pytest.raises(UserError, match=r"cannot be rotated: .*; leave the rotation out"):
        rotation.find(tmp_path / "model")


def test_a_gain_of_zero_under_a_bias_is_refused(tmp_path):
    model = families.build("gpt2")
    model.transformer.h[3].ln_1.weight.data[5] = 0
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"h\.3\.ln_1\.weight is zero where it has a bias"):
        rotation.find(tmp_path / "model")


def test_a_16_bit_model_keeps_its_dtype_and_is_rounded_once(tmp_path):
    model = families.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    turned = rotation.find(tmp_path / "model")
    rotated = Decoder(tmp_path / "model", dtype=torch.float32, transform=turned)
    name = "model.layers.1.mlp.up_proj.weight"
    gain = model.model.layers[1].post_attention_layernorm.weight.double()
    expected = (model.get_parameter(name).double() * gain) @ turned.q
    assert torch.equal(rotated.stored(name), expected.to(torch.bfloat16))
