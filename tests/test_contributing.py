"""What CONTRIBUTING.md shows works: a method added as its page says."""

import re
from pathlib import Path

from harness.checkpoint.load import load_model
from harness.checkpoint.weights import Weights

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


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
