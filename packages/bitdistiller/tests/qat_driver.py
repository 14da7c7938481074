"""``qat_driver.py STEP WORDS ...``: `python -m bitdistiller.train WORDS ...` that kills itself with
signal 9 as step STEP begins."""

import os
import signal
import sys

from bitdistiller import train

from harness import engine


def main(step, *words):
    real = engine.train_step

    def until(running, training, now, *rest):
        if now == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(running, training, now, *rest)

    engine.train_step = until
    return train.main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
