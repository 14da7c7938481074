"""What CONTRIBUTING.md shows works: a method and a layout added as its page says."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, Update, compress, per_stage
from harness.checkpoint import layouts
from harness.checkpoint.load import load_model
from harness.checkpoint.weights import Weights
from harness.cli import main
from harness.errors import UserError
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_a_layout_of_its_own_file(tmp_path, monkeypatch, capsys):
    """Written, told, measured, loaded and converted by code that does not know its name."""
    toy = types.ModuleType("harness.checkpoint.layouts.toy")
    exec(compile(next(b for b in blocks() if "HOLDS" in b), "CONTRIBUTING.md", "exec"), vars(toy))
    monkeypatch.setattr(layouts, "LAYOUTS", (*layouts.LAYOUTS, "toy"))
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    families.save("llama", tmp_path / "model", tokenizer=True)
    families.save("gpt2", tmp_path / "turned")
    grid = Grid(4, 16, True)

    def update(matrices, statistics, hand):
        return {n: Update(nearest(m, grid, torch.float32)) for n, m in matrices.items()}

    for name in ("model", "turned"):
        for layout in ("toy", "dense"):
            method = Method("rtn", {}, [per_stage(update)], (), layout=layout, scheme=Scheme(grid))
            out = tmp_path / f"{name}-{layout}"
            compress(Decoder(tmp_path / name), method, out, base="m")
        one, other = (load_model(tmp_path / f"{name}-{x}") for x in ("toy", "dense"))
        with torch.no_grad():
            ids = families.windows(2)
            assert torch.equal(one(ids).logits, other(ids).logits)
    toy_folder = tmp_path / "model-toy"
    assert main(["info", str(toy_folder)]) == 0
    shown = capsys.readouterr().out
    assert "toy, 4 bits, groups of 16, symmetric" in shown
    assert "10.000 per weight of the quantized linears" in shown  # a byte, and 32 bits for 16
    back = tmp_path / "back"
    assert main(["convert", str(toy_folder), "--format", "dense", "--out", str(back)]) == 0
    for name, tensor in load_model(back).state_dict().items():
        assert torch.equal(tensor, load_model(tmp_path / "model-dense").state_dict()[name])
    tensors = load_file(toy_folder / "model-00002-of-00006.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = torch.ones(3, 2)
    save_file(tensors, toy_folder / "model-00002-of-00006.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj.scales has shape .* do not belong together"):
        load_model(toy_folder)


def test_a_method_in_forty_lines(tmp_path):
    code = next(block for block in blocks() if "def quantize(" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 45
    names = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    rows = names["quantize"]("tiny-llama-student", "stdlib", str(tmp_path / "out"))
    assert {row["share"] for row in rows} <= set(names["SHARES"]) and len(rows) > 1
    assert any(row["share"] < 1 for row in rows)
    assert Weights(tmp_path / "out").layout == "compressed-tensors"
    assert load_model(tmp_path / "out").config.model_type == "llama"
