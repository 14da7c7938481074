"""For the tests of bitdistiller.train: a folder with a tiny model and data, and runs there."""

import json
import random

import datasets
import torch
from safetensors.torch import load_file

import families
from bitdistiller import train

STEPS = 3
QUICK = ["--q_group_size", "16", "--model_max_length", "32", "--learning_rate", "0.003"]


def make(folder):
    """model/ (LLaMA, float32; bfloat16/ and float16/ are stored so), set.jsonl (60 rows of a prompt
    and a response) and text.txt."""
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=2)
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        families.save("llama", folder / name, tokenizer=True, num_hidden_layers=2, dtype=dtype)
    draw, words = random.Random(0), families.TEXT.split()
    rows = [
        {"prompt": " ".join(draw.choices(words, k=draw.randint(1, 4))) + ":",
         "response": " " + " ".join(draw.choices(words, k=draw.randint(1, 5)))}
        for _ in range(60)
    ]  # fmt: skip
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=90)) for _ in "ab"))
    return folder


def cache_beside(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))


def run(place, out, *words, code=0, steps=STEPS, data="set.jsonl", model="model"):
    """``bitdistiller.train``; later words win over QUICK's and those here."""
    words = [place / model, "--data", place / data, *QUICK, "--per_device_train_batch_size", 8,
             "--max_steps", steps, "--out", out, *words]  # fmt: skip
    assert train.main([str(word) for word in words]) == code
    return out


def log(folder):
    return json.loads((folder / "compression_log.json").read_text())


def looks(folder):
    return log(folder)["looks"]


def weights(folder):
    return load_file(folder / "model.safetensors")
