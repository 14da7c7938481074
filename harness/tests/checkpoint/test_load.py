"""Whole models from damaged checkpoints: one line, and nothing of transformers' own tables."""

import pytest
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import families
from harness.checkpoint import load
from harness.errors import UserError

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {DOWN: t[DOWN][:, :7].contiguous()},
            rf"{DOWN} has shape \[32, 7\] in .*; config.json asks for \[32, 48\]\. The two",
        ),
        (lambda t: {k: v for k, v in t.items() if k != DOWN}, f"lacks 1 tensors .*, {DOWN} among"),
    ],
    ids=["shape", "missing"],
)
def test_damage_is_told_in_one_line(tmp_path, capsys, change, message):
    families.save("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    before = logging.get_verbosity()
    capsys.readouterr()
    with pytest.raises(UserError, match=message) as caught:
        load.load_model(tmp_path / "model")
    assert "\n" not in str(caught.value) and logging.get_verbosity() == before
    said = capsys.readouterr()
    assert "mismatch" not in (said.err + said.out).lower() and "MISSING" not in said.err
