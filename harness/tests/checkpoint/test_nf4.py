"""bitsandbytes' NF4 on load, of pruned checkpoints too: measured, or refused in one line."""

import json

import pytest
import torch

import families
from harness.checkpoint import load
from harness.cli import main
from harness.metrics import footprint, speed

pytest.importorskip("bitsandbytes")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def test_speed_and_size_with_double_quantization(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "COPY_BYTES", 2**20)
    families.save("llama", "wide", dtype=torch.bfloat16, tokenizer=True, **WIDE)
    (tmp_path / "text.txt").write_text("one two three four " * 200)
    words = ["eval", "wide", "--load", "nf4-dq", "--ppl", "text.txt", "--limit", "1", "--speed"]
    assert main([*words, "--out", "r.json"]) == 0
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics["footprint"]["settings"]["load"] == "nf4-dq"  # what the curves' names go by
    rows = {row["label"]: row["value"] for row in metrics["speed"]["rows"]}
    assert rows["decode, ms/token"] == pytest.approx(1e3 / rows["decode tokens/s"])
    details = metrics["speed"]["details"]
    last = (details["new_tokens"] - 1) * details["decode_ms_token"] / 1e3
    assert rows["generation, s"] == pytest.approx(details["first_token_s"] + last)
    # Where the CPU has the instructions, the first forward repacks weights and drops attributes.
    model = load.load_model("wide", load="nf4-dq")
    before = footprint.memory_bytes(model)
    model(families.windows(1))
    assert footprint.memory_bytes(model) == pytest.approx(before, rel=0.2)


def test_sizes_that_blocks_of_64_do_not_divide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    families.save("llama", "cut", tokenizer=True, **WIDE | {"intermediate_size": 104})
    assert main(["eval", "cut", "--load", "nf4-dq", "--ppl", "stdlib", "--limit", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "down_proj has 104" in error and "--load int8" in error
