"""``clip_resume_driver.py MODEL TEXT FOLDER TIMES SEED``: clipping runs killed at random."""

import sys
from pathlib import Path

from bitdistiller import autoclip
from harness.blocks import decoder
from kill_driver import drive


def main(model, text, folder, times, seed):
    decoder.TOKENS_PER_BATCH = 64
    words = [model, text, "--seqlen", "32", "--n_samples", "7", "--q_group_size", "16"]
    # The first block's side tensors and its shard, the result itself.
    renames = [2, 3, 3 * 2 + 8]
    drive(
        lambda out: autoclip.main([*words, "--out", str(out)]), Path(folder), int(times), int(seed),
        renames,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
