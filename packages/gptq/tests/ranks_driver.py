"""Several passes in one process (or, under torchrun, in each): ``ranks_driver.py MODEL TEXT``.

Results go to the working directory. At the end the rows of a matrix are dealt out and put together.
"""

import sys

import torch

from gptq import cli, quantize
from harness import distributed
from harness.blocks import decoder

COMMON = {"seqlen": 32, "groupsize": 16}
RUNS = {
    "ordered": COMMON | {"nsamples": 7, "wbits": 3, "act_order": True, "true_sequential": True},
    "plain": COMMON | {"nsamples": 7, "wbits": 4, "sym": True, "format": "gptq"},
    "dynamic": COMMON | {"nsamples": 7, "wbits": 2, "act_order": True, "format": "dense"},
    # Fewer batches than ranks: one has nothing to run.
    "single": COMMON | {"nsamples": 2, "wbits": 4, "true_sequential": True},
    "nearest": {"wbits": 4, "nearest": True},
}


def main(model, text):
    torch.set_num_threads(1)
    decoder.TOKENS_PER_BATCH = 64
    for name, options in RUNS.items():
        quantize(model, text, out=name, **options)
    for rows in (1, 5, 8):
        whole = torch.arange(rows * 3).view(rows, 3)
        part = whole[distributed.shares(rows)[distributed.rank()]]
        assert torch.equal(distributed.gather_rows(part, rows), whole)
    words = [model, text, "--seqlen", "32", "--nsamples", "4", "--out", "cli"]
    ranks = distributed.world_size()
    code = cli.main(words)  # leaves the process group
    print(f"ranks {ranks}, exit code {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
