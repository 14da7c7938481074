"""``answers_driver.py MODEL DATA``: what a model says, its probabilities and its Rouge-L, in the
folder it is called in; on every rank of a launcher."""

import json
import sys
from pathlib import Path

import torch

from harness import distributed
from harness.training import teacher_cache
from minillm import cache_teacher, evaluate, generate


def main(model, folder):
    torch.set_num_threads(1)
    teacher_cache.SHARD_BYTES = 600
    words = [model, "--data", folder, "--max-length", "32", "--max-prompt-length", "16"]
    words += ["--batch-size", "3"]
    code = (
        generate.main([*words, "--out", "said.jsonl"])
        or cache_teacher.main([*words, "--topk", "8", "--out", "cache"])
        or evaluate.main([*words, "--seeds", "10", "20", "--out", "results.json"])
    )
    if distributed.rank() == 0 and not code:
        # The rest of it are times.
        path = Path("results.json")
        details = [metric["details"] for metric in json.loads(path.read_text())["metrics"].values()]
        path.write_text(json.dumps(details))
    print(f"ranks {distributed.world_size()}, exit code {code}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
