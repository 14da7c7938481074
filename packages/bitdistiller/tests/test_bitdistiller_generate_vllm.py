"""The command in vLLM: greedy text is that of transformers, and a killed run ends with the same
bytes.

`nox -s vllm` has the environment. vLLM is started twice.
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
from harness.generation.response_file import continuations
from harness.generation.responses import Sampling, transformers_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MODEL, NEW = "tiny-llama", vllm_tokens.NEW
COMMAND = [MODEL, "--dataset", "asked.jsonl", "--max_new_tokens", str(NEW), "--dtype", "float32",
           "--batch_size", "4"]  # fmt: skip
# Three commands on one engine, which takes a minute to start: a greedy one, a sampled one, and the
# sampled one again, killed in its second batch.
DRIVER = """
import os, signal, sys
from bitdistiller import generate
from harness.generation import responses
real, engines = responses.start_vllm, []
class Dying:
    def __init__(self, engine):
        self.engine, self.calls = engine, 0
    def generate(self, *words, **more):
        self.calls += 1
        if self.calls == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.engine.generate(*words, **more)
def start(folder, **settings):
    if not engines:
        engines.append(Dying(real(folder, **settings)))
    return engines[0]
responses.start_vllm = start
if __name__ == "__main__":
    words = sys.argv[1:]
    assert not generate.main([*words, "--temperature", "0", "--out", "greedy.jsonl"])
    assert not generate.main([*words, "--out", "whole.jsonl"])
    generate.main([*words, "--out", "again.jsonl"])
"""


def run(folder, *words) -> subprocess.CompletedProcess:
    words = [sys.executable, *words, *COMMAND]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    rows = (json.dumps({"prompt": text}) + "\n" for text in vllm_tokens.TEXTS)
    (folder / "asked.jsonl").write_text("".join(rows))
    (folder / "driver.py").write_text(DRIVER)
    killed = run(folder, "driver.py")
    assert killed.returncode == -9, killed.stderr[-3000:]
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_text_is_that_of_transformers(place):
    found = rows(place / "greedy.jsonl")
    assert [row["prompt"] for row in found] == vllm_tokens.TEXTS
    tokenizer = load.load_tokenizer(MODEL)
    model = load.load_model(MODEL, dtype="float32")
    prompts = example_sets.prompt_ids(tokenizer, vllm_tokens.TEXTS)
    said = transformers_engine(model, tokenizer, Sampling(NEW, temperature=0.0))(prompts, [0] * 6)
    agreed = 0
    for row, prompt, ids in zip(found, prompts, said, strict=True):
        texts = [continuations(tokenizer, [prompt], [ids[:end]])[0] for end in range(len(ids) + 1)]
        if row["response"] == texts[-1]:
            assert row["ended"] == (len(ids) < NEW)
            agreed += 1
            continue
        # Engines add up in different orders: where they part, the two likeliest must be as good as
        # equal.
        same = max(end for end, text in enumerate(texts) if row["response"].startswith(text))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids[:same]])).logits[0, -1]
        first, second = logits.topk(2).values
        assert first - second < 8 * torch.finfo(torch.float32).eps * logits.abs().max()
    assert agreed >= 4, agreed


def test_a_killed_run_ends_with_the_same_bytes(place):
    assert (place / "again.jsonl.partial").is_dir()
    done = run(place, "-m", "bitdistiller.generate", "--out", "again.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "engine: vllm" in done.stderr and "resuming: 4 responses are there" in done.stderr
    assert "| asked  |       6 |" in done.stdout
    whole = (place / "whole.jsonl").read_bytes()
    assert (place / "again.jsonl").read_bytes() == whole != (place / "greedy.jsonl").read_bytes()
