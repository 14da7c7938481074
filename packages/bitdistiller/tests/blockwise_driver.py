"""``blockwise_driver.py MODEL TEXT FOLDER TIMES SEED``: block-wise runs killed at random."""

import sys
from pathlib import Path

from bitdistiller import blockwise
from kill_driver import drive

FLAGS = "--q_group_size 16 --nsamples 4 --val_size 2 --seqlen 16 --epochs 1 --weight_lr 1e-3"


def main(model, text, folder, times, seed):
    words = [model, text, *FLAGS.split()]
    # The first block's grids, its shard, the last block's shard, the grid file, the result itself.
    renames = [2, 3, 9, 16, 17]
    drive(
        lambda out: blockwise.main([*words, "--out", str(out)]), Path(folder), int(times),
        int(seed), renames,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
