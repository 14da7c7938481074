"""Packed checkpoints run in vLLM's integer kernels and say what their dense twins say.

`nox -s vllm` has the environment. Every engine is started once, all in one process.
"""

import importlib.util

import pytest
import torch
import vllm_tokens
from gptq import quantize

from harness import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
# name -> settings; those of one twin group hold the same integers at the same scales.
CHECKPOINTS = {
    "half-packed": {"sym": True, "dtype": "float16"},
    "half-gptq": {"sym": True, "dtype": "float16", "format": "gptq"},
    "half-dense": {"sym": True, "dtype": "float16", "format": "dense"},
    "bfloat-packed": {"sym": True},
    "bfloat-dense": {"sym": True, "format": "dense"},
    "zeros-packed": {"sym": False, "dtype": "float16"},
    "zeros-dense": {"sym": False, "dtype": "float16", "format": "dense"},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """All checkpoints, quantized from tiny-llama, and vLLM's tokens."""
    root = tmp_path_factory.mktemp("vllm")
    for name, settings in CHECKPOINTS.items():
        quantize(
            "tiny-llama", "stdlib", out=root / name, wbits=4, groupsize=128, nsamples=8, seqlen=256,
            **settings,
        )  # fmt: skip
    tokenizer = checkpoint.load_tokenizer("tiny-llama")
    prompts = [tokenizer(text)["input_ids"] for text in vllm_tokens.TEXTS]
    tokens, log = vllm_tokens.ask([root / name for name in CHECKPOINTS], prompts, root)
    return {"root": root, "prompts": prompts, "tokens": tokens, "log": log}


@pytest.mark.parametrize("twin", ["half", "bfloat", "zeros"])
def test_packed_checkpoints_generate_what_their_dense_twin_does(job, twin):
    model = checkpoint.load_model(job["root"] / f"{twin}-dense")
    expected = vllm_tokens.transformers_tokens(model, job["prompts"])
    eps, exact = torch.finfo(model.dtype).eps, model.float()
    for name in CHECKPOINTS:
        if name.startswith(twin):
            found = job["tokens"][str(job["root"] / name)]
            agreed = vllm_tokens.agreement(exact, eps, job["prompts"], found, expected)
            # 192, 186 and 192 of 192 measured
            assert agreed > len(expected) * vllm_tokens.NEW / 2, name


def test_vllm_computes_on_the_packed_integers(job):
    """Both packed layouts, not dense copies of them, reach vLLM's mixed-precision kernels."""
    assert "Kernel for CompressedTensors" in job["log"]
    assert "Kernel for AutoGPTQ" in job["log"]
