"""``resume_driver.py MODEL TEXT FOLDER TIMES SEED [FLAG ...]``: GPTQ runs killed at random."""

import sys
from pathlib import Path

from gptq import cli
from harness.blocks import decoder
from kill_driver import drive


def main(model, text, folder, times, seed, *flags):
    decoder.TOKENS_PER_BATCH = 64
    words = [model, text, "--seqlen", "32", "--nsamples", "7", "--groupsize", "16", *flags]
    # The first block's shard, the last one, and the result itself.
    renames = [2, 2 * 4, 2 * 4 + 7]
    drive(
        lambda out: cli.main([*words, "--out", str(out)]), Path(folder), int(times), int(seed),
        renames,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
