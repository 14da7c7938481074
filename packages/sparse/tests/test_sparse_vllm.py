"""Pruned checkpoints, uniform in shape, serve from vLLM with the tokens of plain transformers.

`nox -s vllm` has the environment.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

import vllm_tokens
from harness.checkpoint import load
from sparse import llm_pruner, sparsegpt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
DATA = ["--nsamples", "8", "--seqlen", "256"]
EVERY_BLOCK = ["--block_attention_layer_start", "0", "--block_attention_layer_end", "6",
               "--block_mlp_layer_start", "0", "--block_mlp_layer_end", "6"]  # fmt: skip
COMMANDS = {
    "zeros": (sparsegpt, ["tiny-llama", "stdlib", "--sparsity", "0.5", *DATA]),
    "two-of-four": (sparsegpt, ["tiny-llama", "stdlib", "--prunen", "2", "--prunem", "4", *DATA]),
    "heads": (llm_pruner, ["tiny-llama", "stdlib", "--pruning_ratio", "0.5", "--block_wise",
                           *EVERY_BLOCK]),
    "width": (llm_pruner, ["tiny-llama", "stdlib", "--pruning_ratio", "0.25", "--channel_wise"]),
    "depth": (llm_pruner, ["tiny-llama", "stdlib", "--layer_wise", "--layer", "4"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    for name, (command, words) in COMMANDS.items():
        assert command.main([*words, "--out", str(root / name)]) == 0
    tokenizer = load.load_tokenizer("tiny-llama")
    prompts = [tokenizer(text)["input_ids"] for text in vllm_tokens.TEXTS]
    tokens, _ = vllm_tokens.ask([root / name for name in COMMANDS], prompts, root)
    return {"root": root, "prompts": prompts, "tokens": tokens}


@pytest.mark.parametrize("name", COMMANDS)
def test_vllm_says_what_transformers_says(job, name):
    model = AutoModelForCausalLM.from_pretrained(job["root"] / name).eval()
    expected = vllm_tokens.transformers_tokens(model, job["prompts"])
    found = job["tokens"][str(job["root"] / name)]
    eps = torch.finfo(model.dtype).eps
    agreed = vllm_tokens.agreement(model.float(), eps, job["prompts"], found, expected)
    assert agreed > len(expected) * vllm_tokens.NEW / 2, agreed
