"""Passes in one process (or, under torchrun, in each): ``sparse_ranks_driver.py MODEL TEXT``.

Results go to the working directory.
"""

import sys

import torch

from harness import distributed
from harness.blocks import decoder
from sparse import prune, wanda

COMMON = {"nsamples": 7, "seqlen": 32, "sparsity": 0.5}
RUNS = {
    "plain": COMMON,
    "ordered": COMMON | {"true_sequential": True, "ratios": "owl", "owl_m": 3.0},
    "packed": COMMON | {"wbits": 4, "format": "compressed-tensors"},
    "norms": COMMON | {"method": "wanda", "ratios": "owl", "owl_m": 3.0},
    # Fewer batches than ranks: one has nothing to run.
    "single": COMMON | {"method": "wanda", "nsamples": 2, "true_sequential": True},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
}


def main(model, text):
    torch.set_num_threads(1)
    decoder.TOKENS_PER_BATCH = 64
    for name, options in RUNS.items():
        prune(model, text, out=name, **options)
    words = [model, text, "--sparsity", ".5", "--seqlen", "32", "--nsamples", "4", "--out", "cli"]
    ranks = distributed.world_size()
    code = wanda.main(words)  # leaves the process group
    print(f"ranks {ranks}, exit code {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
