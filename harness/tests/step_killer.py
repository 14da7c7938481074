"""``step_killer.py MODULE STEP WORDS ...``: `python -m MODULE WORDS ...`, a command that trains,
killed by its own signal 9 as step STEP begins."""

import importlib
import os
import signal
import sys

from harness.training import engine


def main(module, step, *words):
    real = engine.train_step

    def until(running, training, now, *rest):
        if now == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(running, training, now, *rest)

    engine.train_step = until
    return importlib.import_module(module).main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
