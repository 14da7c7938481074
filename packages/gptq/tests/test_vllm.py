"""Packed checkpoints run in vLLM's integer kernels and say what their dense twins say.

`nox -s vllm` has the environment. Every engine is started once, all in one process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
TEXTS = [
    "def __init__(self",
    "import os\nimport ",
    "class Error(Exception):\n    ",
    "    for name in names:\n        if ",
    "try:\n    from ",
    "    if not isinstance(value, ",
]
NEW = 32


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
    job = {
        "folders": [str(root / name) for name in CHECKPOINTS],
        "prompts": [tokenizer(text)["input_ids"] for text in TEXTS],
        "new": NEW,
    }
    path = root / "job.json"
    path.write_text(json.dumps(job))
    script = Path(__file__).with_name("vllm_tokens.py")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, str(script), str(path)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return {**json.loads(path.read_text()), "root": root, "log": done.stdout}


def agreement(model, eps, prompts, found, expected) -> int:
    """How many tokens two engines agree on; where they part, rounding must be able to explain it.

    Engines add up in different orders. So the two tokens at which they part must be within eight
    roundings (``eps`` of the largest logit) of each other in the float32 logits of ``model``.
    """
    agreed = 0
    for prompt, some, others in zip(prompts, found, expected, strict=True):
        same = [a == b for a, b in zip(some, others, strict=True)]
        count = same.index(False) if False in same else len(same)
        agreed += count
        if count < len(same):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + others[:count]])).logits[0, -1]
            gap = (logits[some[count]] - logits[others[count]]).abs()
            assert gap < 8 * eps * logits.abs().max()
    return agreed


@pytest.mark.parametrize("twin", ["half", "bfloat", "zeros"])
def test_packed_checkpoints_generate_what_their_dense_twin_does(job, twin):
    model = checkpoint.load_model(job["root"] / f"{twin}-dense")
    expected = []
    for prompt in job["prompts"]:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW)
        expected.append(ids[0, len(prompt) :].tolist())
    eps, exact = torch.finfo(model.dtype).eps, model.float()
    for name in CHECKPOINTS:
        if name.startswith(twin):
            found = job["tokens"][str(job["root"] / name)]
            agreed = agreement(exact, eps, job["prompts"], found, expected)
            assert agreed > len(expected) * NEW / 2, name  # 192, 186 and 192 of 192 measured


def test_vllm_computes_on_the_packed_integers(job):
    """Both packed layouts, not dense copies of them, reach vLLM's mixed-precision kernels."""
    assert "Kernel for CompressedTensors" in job["log"]
    assert "Kernel for AutoGPTQ" in job["log"]
