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


def reference(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens in transformers, each list up to the first step that rounding may decide.

    Engines add up in different orders: where the two best logits are closer than eight units in
    the last place of the largest, either is right, and everything after it may differ.
    """
    model = checkpoint.load_model(folder)
    ulp = torch.finfo(model.dtype).eps
    lists = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].float()
            (best, second), (token, _) = logits.topk(2)
            if best - second < 8 * ulp * best.abs():
                break
            ids.append(int(token))
        lists.append(ids[len(prompt) :])
    return lists


@pytest.mark.parametrize("twin", ["half", "zeros"])
def test_packed_checkpoints_generate_what_their_dense_twin_does(job, twin):
    expected = reference(job["root"] / f"{twin}-dense", job["prompts"])
    assert sum(map(len, expected)) > NEW, "the prompts leave too little to compare"
    for name in CHECKPOINTS:
        if name.startswith(twin):
            found = job["tokens"][str(job["root"] / name)]
            cut = [tokens[: len(list_)] for tokens, list_ in zip(found, expected, strict=True)]
            assert cut == expected, name


def test_bfloat16_tokens_equal_the_dense_twins(job):
    """The usual dtype. Its ties are many, so the twins are compared within vLLM, to the end."""
    packed, dense = (str(job["root"] / name) for name in ("bfloat-packed", "bfloat-dense"))
    assert job["tokens"][packed] == job["tokens"][dense]


def test_vllm_computes_on_the_packed_integers(job):
    """Both packed layouts, not dense copies of them, reach vLLM's mixed-precision kernels."""
    assert "Kernel for CompressedTensors" in job["log"]
    assert "Kernel for AutoGPTQ" in job["log"]
