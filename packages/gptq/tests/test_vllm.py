"""Packed checkpoints run in vLLM's integer kernels and say what their dense twins say.

`nox -s vllm` has the environment. Every engine is started once, all in one process.
"""

import importlib.util

import pytest
import torch

import vllm_tokens
from gptq import quantize
from harness.checkpoint import load
from harness.checkpoint.weights import Weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
# name -> settings; those of one twin group hold the same integers at the same scales. The last of a
# group is dense, and all that a CPU without vLLM's integer kernels runs.
CHECKPOINTS = {
    "half-packed": {"sym": True},
    "half-gptq": {"sym": True, "format": "gptq"},
    "half-dense": {"sym": True, "format": "dense"},
    "bfloat-packed": {"sym": True},
    "bfloat-dense": {"sym": True, "format": "dense"},
    "zeros-packed": {"sym": False},
    "zeros-dense": {"sym": False, "format": "dense"},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """All checkpoints, quantized from tiny-llama, and vLLM's tokens."""
    root = tmp_path_factory.mktemp("vllm")
    half = root / "tiny-llama-half"
    load.load_model("tiny-llama", dtype="float16").save_pretrained(half)
    load.load_tokenizer("tiny-llama").save_pretrained(half)
    for name, settings in CHECKPOINTS.items():
        model = "tiny-llama" if name.startswith("bfloat") else str(half)
        quantize(
            model, "stdlib", out=root / name, wbits=4, groupsize=128, nsamples=8, seqlen=256,
            **settings,
        )  # fmt: skip
    tokenizer = load.load_tokenizer("tiny-llama")
    prompts = [tokenizer(text)["input_ids"] for text in vllm_tokens.TEXTS]
    asked = [root / name for name in CHECKPOINTS if runs(name)]
    tokens, log = vllm_tokens.ask(asked, prompts, root)
    return {"root": root, "prompts": prompts, "tokens": tokens, "log": log}


def runs(name: str) -> bool:
    return name.endswith("dense") or vllm_tokens.packs()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_generate_what_their_dense_twin_does_in_transformers(job, name):
    if not runs(name):
        pytest.skip(vllm_tokens.NO_KERNELS)
    twin = job["root"] / f"{name.partition('-')[0]}-dense"
    model = load.load_model(twin, dtype=Weights(twin).dtype)
    expected = vllm_tokens.transformers_tokens(model, job["prompts"])
    eps, exact = torch.finfo(model.dtype).eps, model.float()
    found = job["tokens"][str(job["root"] / name)]
    agreed = vllm_tokens.agreement(exact, eps, job["prompts"], found, expected)
    # 192, 186 and 192 of 192 measured
    assert agreed > len(expected) * vllm_tokens.NEW / 2


def test_packed_integers_without_kernels_are_refused_in_one_line(job, capsys):
    if vllm_tokens.packs():
        pytest.skip("this vLLM has kernels for packed integers on this CPU")
    from harness import cli

    words = ["eval", str(job["root"] / "bfloat-packed"), "--speed", "--engine", "vllm"]
    assert cli.main(words) == 2
    assert "no kernels on this CPU" in capsys.readouterr().err.splitlines()[-1]


def test_vllm_computes_on_the_packed_integers(job):
    """Both packed layouts, not dense copies of them, reach vLLM's mixed-precision kernels."""
    if not vllm_tokens.packs():
        pytest.skip(vllm_tokens.NO_KERNELS)
    assert "Kernel for CompressedTensors" in job["log"]
    assert "Kernel for AutoGPTQ" in job["log"]
