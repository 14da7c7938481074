"""Greedy tokens of checkpoints in vLLM: python vllm_tokens.py JOB.json; see test_vllm.py.

JOB.json holds {"folders": [...], "prompts": [[token id, ...], ...], "new": count}; the tokens are
added to it as {"tokens": {folder: [[token id, ...], ...]}}.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    greedy = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True)
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
