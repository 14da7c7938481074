"""``sparse_resume_driver.py METHOD MODEL TEXT FOLDER TIMES SEED [FLAG ...]``: kills at random."""

import importlib
import sys
from pathlib import Path

from harness.blocks import decoder
from kill_driver import drive


def main(method, model, text, folder, times, seed, *flags):
    decoder.TOKENS_PER_BATCH = 64
    command = importlib.import_module(f"sparse.{method}")
    words = [model, text, "--seqlen", "32", "--nsamples", "7", *flags]
    # The first block's shard, the last one, and the result itself.
    renames = [2, 2 * 4, 2 * 4 + 7]
    drive(
        lambda out: command.main([*words, "--out", str(out)]), Path(folder), int(times), int(seed),
        renames,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
