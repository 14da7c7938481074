"""``llm_pruner_driver.py kill MODEL TEXT FOLDER``: runs killed at random and repeated.
``llm_pruner_driver.py ranks MODEL TEXT``: several runs, alone or under torchrun."""

import sys
from pathlib import Path

import torch

from harness import distributed
from kill_driver import drive
from sparse import llm_pruner
from sparse.llm_pruner import prune

SHORT = ["--num_examples", "5", "--max_seq_len", "32"]
STEPS = ["--pruning_ratio", ".3", "--taylor", "param_mix", "--iterative_steps", "2"]
OPTIONS = {
    "global": {"pruning_ratio": 0.4, "global_pruning": True},
    "hidden": {"pruning_ratio": 0.25, "channel_wise": True},
    "random": {"pruning_ratio": 0.5, "pruner_type": "random"},
    "layers": {"layer_wise": True, "layer": 2},
}


def kill(model, text, folder):
    words = [model, text, *SHORT, *STEPS]
    # The first block's shard, the last one, and the result itself.
    renames = [2, 2 * 4, 2 * 4 + 7]
    drive(lambda out: llm_pruner.main([*words, "--out", str(out)]), Path(folder), 2, 0, renames)


def ranks(model, text):
    torch.set_num_threads(1)
    for name, options in OPTIONS.items():
        prune(model, text, out=name, num_examples=5, max_seq_len=32, **options)
    count = distributed.world_size()
    code = llm_pruner.main([model, text, *SHORT, *STEPS, "--out", "cli"])  # leaves the group
    print(f"ranks {count}, exit code {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit({"kill": kill, "ranks": ranks}[sys.argv[1]](*sys.argv[2:]))
