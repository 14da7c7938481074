"""Training keeps a pruned model's zeros, or asks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from minillm import finetune

WORDS = ["--data", "set.jsonl", "--lr", "0.01", "--max-length", "32", "--total-iters", "3",
         "--eval-interval", "3", "--dtype", "float32"]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    families.save("llama", tmp_path / "model", tokenizer=True, num_hidden_layers=2)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor *= tensor.abs() > tensor.abs().median()
    save_file(tensors, path, metadata={"format": "pt"})
    rows = [{"prompt": f"{i}:", "response": "return left"} for i in range(60)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_full_tuning_keeps_them_and_lora_asks(place, capsys):
    before = load_file(place / "model" / "model.safetensors")
    assert finetune.main(["model", *WORDS, "--out", "out"]) == 0
    assert "its zeros stay zeros in training" in capsys.readouterr().err
    after = load_file(place / "out" / "model.safetensors")
    for name, tensor in before.items():
        if "_proj" in name:
            assert torch.equal(after[name] == 0, tensor == 0), name
            assert not torch.equal(after[name], tensor)
    assert finetune.main(["model", *WORDS, "--peft", "lora", "--out", "lora"]) == 2
    assert "add --densify to fill them knowingly" in capsys.readouterr().err
    assert not (place / "lora").exists()
    words = ["model", *WORDS, "--peft", "lora", "--densify", "--out", "lora"]
    assert finetune.main(words) == 0
    assert "are filled by LoRA (--densify)" in capsys.readouterr().err
