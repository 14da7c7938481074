"""Passes in one process (or, under torchrun, in each): ``clip_ranks_driver.py MODEL TEXT``.

Results go to the working directory.
"""

import sys

import torch

from bitdistiller import autoclip
from bitdistiller.autoclip import clip
from harness import distributed
from harness.blocks import decoder


def main(model, text):
    torch.set_num_threads(1)
    decoder.TOKENS_PER_BATCH = 64
    common = {"n_samples": 7, "seqlen": 32, "q_group_size": 16}
    clip(model, text, out="int", w_bit=3, **common)
    clip(model, text, out="levels", quant_type="nf3", **common)
    words = [model, text, "--seqlen", "32", "--n_samples", "4", "--q_group_size", "-1"]
    ranks = distributed.world_size()
    code = autoclip.main([*words, "--out", "cli"])  # leaves the process group
    print(f"ranks {ranks}, exit code {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
