"""In vLLM, a result and its 4-bit export, on integer kernels there, say what transformers says.

`nox -s vllm` has the environment.
"""

import importlib.util

import pytest
import torch
from test_student import stored
from transformers import AutoModelForCausalLM

import vllm_tokens
from bitdistiller import export, student
from harness.checkpoint import load
from harness.quant.grid import Grid

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_a_result_and_its_export_generate_what_the_dense_twin_does(tmp_path):
    source = load.resolve("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    result = stored(student.build(model, Grid(4, 128)), source, tmp_path / "result")
    packed = tmp_path / "packed"
    assert export.main([str(result), "--out", str(packed)]) == 0
    tokenizer = load.load_tokenizer("tiny-llama")
    prompts = [tokenizer(text)["input_ids"] for text in vllm_tokens.TEXTS]
    folders = [result, packed] if vllm_tokens.packs() else [result]
    tokens, log = vllm_tokens.ask(folders, prompts, tmp_path)

    twin = load.load_model(result, dtype=torch.bfloat16)
    expected = vllm_tokens.transformers_tokens(twin, prompts)
    eps, exact = torch.finfo(twin.dtype).eps, twin.float()
    for folder in folders:
        agreed = vllm_tokens.agreement(exact, eps, prompts, tokens[str(folder)], expected)
        assert agreed > len(expected) * vllm_tokens.NEW / 2
    if not vllm_tokens.packs():
        pytest.skip(f"the export was not run: {vllm_tokens.NO_KERNELS}")
    assert "Kernel for CompressedTensors" in log
