"""``recover_driver.py MODEL TEXT FOLDER TIMES SEED [FLAG ...]``: recoveries killed at random."""

import sys
from pathlib import Path

from kill_driver import drive
from sparse import recover


def main(model, text, folder, times, seed, *flags):
    words = [model, "--dataset", text, "--cutoff_len", "32", "--max_steps", "8", "--patience", "0"]
    words += ["--eval_steps", "3", "--save_steps", "2", "--batch_size", "4", *flags]
    # In the first save, between a state and its record, in the middle, in the result.
    renames = [1, 2, 7, 8, 12, 16, -1]
    drive(
        lambda out: recover.main([*words, "--out", str(out)]), Path(folder), int(times), int(seed),
        renames,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
