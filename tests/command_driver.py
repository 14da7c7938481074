"""``command_driver.py JSON``: {folder: [suffix of results, module, words]}; runs of each command,
killed at their renames, in its folder."""

import importlib
import json
import sys
from pathlib import Path

from harness.training import teacher_cache
from kill_driver import drive


def main(commands):
    teacher_cache.SHARD_BYTES = 600
    for folder, (suffix, module, words) in json.loads(commands).items():
        Path(folder).mkdir()
        command = importlib.import_module(module)
        drive(
            lambda out, c=command, w=words: c.main([*w, "--out", str(out)]), Path(folder),
            suffix=suffix,
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
