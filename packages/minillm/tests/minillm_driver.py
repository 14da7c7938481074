"""``minillm_driver.py RESULT.json KILL ARGUMENTS...``: minillm.train_minillm; what trainer.train
returned goes to RESULT.json. KILL is the step before which the process kills itself, or -1."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from harness import distributed
from harness.cli import run
from minillm import train_minillm, train_minillm_run
from minillm.on_policy import OnPolicy


def main(result, kill, *argv):
    torch.set_num_threads(1)
    kept = OnPolicy.batches

    def batches(self, step):
        if step == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(self, step)

    OnPolicy.batches = batches

    def body():
        settings = train_minillm.Settings(**vars(train_minillm.parser().parse_args(argv)))
        with distributed.group():
            found = train_minillm_run.run(settings)
            if distributed.rank() == 0:
                Path(result).write_text(json.dumps(found))

    return run(body)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
