"""Greedy tokens of checkpoints in vLLM, and how they are compared with transformers'.

``python vllm_tokens.py JOB.json`` is the process that holds the engines: JOB.json holds
{"folders": [...], "prompts": [[token id, ...], ...], "new": count}; the tokens are added to it as
{"tokens": {folder: [[token id, ...], ...]}}.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

NO_KERNELS = "this vLLM has no kernels for packed integers on this CPU (they need AVX-512)"
TEXTS = [
    "def __init__(self",
    "import os\nimport ",
    "class Error(Exception):\n    ",
    "    for name in names:\n        if ",
    "try:\n    from ",
    "    if not isinstance(value, ",
]
NEW = 32


@functools.cache
def packs() -> bool:
    """Whether vLLM computes on packed integers here; else what needs it is skipped (NO_KERNELS)."""
    from harness.generation.vllm_loading import has_weight_only_kernels

    return has_weight_only_kernels()


def ask(folders: list[Path], prompts: list[list[int]], scratch: Path) -> tuple[dict, str]:
    """{folder: NEW greedy tokens per prompt} from one engine per folder, and vLLM's log."""
    path = scratch / "job.json"
    path.write_text(json.dumps({"folders": list(map(str, folders)), "prompts": prompts}))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(path.read_text())["tokens"], done.stdout


def transformers_tokens(model, prompts: list[list[int]]) -> list[list[int]]:
    """What ``model`` continues each prompt with: NEW greedy tokens."""
    import torch

    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def agreement(model, eps: float, prompts, found, expected) -> int:
    """How many tokens two engines agree on; where they part, rounding must be able to explain it.

    Engines add up in different orders. So the two tokens at which they part must be within eight
    roundings (``eps`` of the largest logit) of each other in the float32 logits of ``model``.
    """
    import torch

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


def main(path: Path) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(path.read_text())
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    job["tokens"] = {}
    for folder in job["folders"]:
        model = LLM(folder, max_model_len=256, max_num_seqs=len(prompts), enforce_eager=True)
        answers = model.generate(prompts, greedy, use_tqdm=False)
        job["tokens"][folder] = [list(answer.outputs[0].token_ids) for answer in answers]
        model.llm_engine.engine_core.shutdown()
        del model
    path.write_text(json.dumps(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
