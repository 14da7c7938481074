"""Responses from vLLM: greedy ones are those of transformers, sampled ones are distributed as the
model says, each from its own seed.

`nox -s vllm` has the environment.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import vllm_tokens
from harness.checkpoint import load
from harness.data import example_sets
from harness.generation.responses import Sampling, transformers_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MODEL = "tiny-llama-student"
NEW = vllm_tokens.NEW
# An engine takes a minute to start, and most of what it needs is not to be in pytest's process.
DRIVER = f"""
import json, sys
from harness.checkpoint import load
from harness.generation.responses import Sampling, vllm_engine
prompts, temperature = json.loads(sys.argv[1])
folder = load.resolve({MODEL!r})
tokenizer = load.load_tokenizer(folder)
sampling = Sampling({NEW}, temperature=temperature)
ask = vllm_engine(folder, tokenizer, sampling, 256, "float32")
seeds = list(range(len(prompts)))
said = [ask(prompts, seeds), ask(prompts[::-1], seeds[::-1])[::-1], ask(prompts, seeds[::-1])]
print("SAID", json.dumps(said))
"""


def answers(prompts, temperature):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([prompts, temperature])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(done.stdout.rpartition("SAID ")[2].splitlines()[0])


@pytest.fixture(scope="module")
def model():
    return load.load_model(MODEL, dtype="float32")


def test_greedy_responses_are_those_of_transformers(model):
    tokenizer = load.load_tokenizer(MODEL)
    prompts = example_sets.prompt_ids(tokenizer, vllm_tokens.TEXTS)
    found = answers(prompts, 0.0)
    assert found[0] == found[1] == found[2]
    ask = transformers_engine(model, tokenizer, Sampling(NEW, temperature=0.0))
    expected = ask(prompts, [0] * len(prompts))
    end = tokenizer.eos_token_id
    pairs = [
        [(ids + [end] * NEW)[:NEW] for ids in some] for some in (found[0], expected)
    ]  # fmt: skip
    eps = torch.finfo(torch.float32).eps
    agreed = vllm_tokens.agreement(model, eps, prompts, *pairs)
    assert agreed > len(prompts) * NEW / 2, agreed


def test_sampled_responses_are_distributed_as_the_model_says(model):
    tokenizer = load.load_tokenizer(MODEL)
    end = tokenizer.eos_token_id
    prompts = example_sets.prompt_ids(tokenizer, vllm_tokens.TEXTS * 8)
    same, turned, other = answers(prompts, 1.0)
    agree = sum(a == b for a, b in zip(same, turned, strict=True))
    assert agree > 0.8 * len(prompts)  # rounding may part some: batches add up in other orders
    assert sum(a == b for a, b in zip(same, other, strict=True)) < 0.2 * len(prompts)
    surprise = []
    for prompt, said in zip(prompts, same, strict=True):
        assert len(said) <= NEW and end not in said
        ids = torch.tensor([prompt + said + [end] * (len(said) < NEW)])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        drawn = log_p.gather(1, ids[0, len(prompt) :, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        surprise += (-drawn - entropy).tolist()
    # The surprise at a token drawn from p is p's entropy, on average.
    surprise = torch.tensor(surprise)
    assert surprise.mean().abs() < 5 * surprise.std() / len(surprise) ** 0.5, surprise.mean()


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", "stdlib-doc", "--gen-num", "6", "--max-length", "96", "--engine", "vllm"]
    run = [sys.executable, "-m", "minillm.generate", MODEL, *words, "--out", "made.jsonl"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert rows and all(set(row) == {"prompt", "response"} for row in rows)
    assert len({row["response"] for row in rows}) > 1
