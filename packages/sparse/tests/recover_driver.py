"""``recover_driver.py MODEL TEXT FOLDER TIMES SEED [FLAG ...]``: recoveries killed at random."""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401  (here, so that the children inherit it)
import peft  # noqa: F401

from kill_driver import drive
from sparse import recover, recover_run  # noqa: F401


def main(model, text, folder, times, seed, *flags):
    words = [model, "--dataset", text, "--cutoff_len", "32", "--max_steps", "8", "--patience", "0"]
    words += ["--eval_steps", "3", "--save_steps", "2", "--batch_size", "4", *flags]
    # At the best weights and the state of a look, in the middle, in the result.
    renames = [1, 2, 3, 5, 8, 12, -1]
    drive(
        lambda out: recover.main([*words, "--out", str(out)]), Path(folder), int(times), int(seed),
        renames, forks_after_run=False,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
