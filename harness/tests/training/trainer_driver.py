"""``trainer_driver.py MODEL OUT ZERO ACCUMULATE [FATE STEP]``: twelve steps of a tiny model, of 8
windows. FATE at step STEP: "kill" (signal 9), "stop" (interrupted) or "nan" (a loss is none)."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from harness import distributed
from harness.checkpoint import load, runs
from harness.cli import run
from harness.training import engine, loop

STEPS, WINDOWS = 12, 8


def windows(step):
    return torch.randint(0, 288, (WINDOWS, 16), generator=torch.Generator().manual_seed(step))


def micro_batches(step, accumulate):
    ranks, rank = distributed.world_size(), distributed.rank()
    parts = windows(step).split(WINDOWS // ranks // accumulate)[rank::ranks]
    return [{"ids": ids, "tokens": ids[:, 1:].numel(), "step": step} for ids in parts]


def cross_entropy(running, ids):
    logits = running(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="sum")


def main(source, out, zero=0, accumulate=2, fate=None, at=-1, dtype="auto", minutes=None, **more):
    torch.set_num_threads(1)
    zero, accumulate, at = int(zero), int(accumulate), int(at)
    source, out = Path(source), Path(out)

    def loss_of(running, batch):
        if batch["step"] == at and fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if batch["step"] == at and fate == "stop":
            raise KeyboardInterrupt
        loss = cross_entropy(running, batch["ids"])
        if batch["step"] == at and fate == "nan":
            loss = loss * float("nan")
        return loss, {"tenth": loss.detach() / 10}

    def evaluate(running, step):
        with torch.no_grad():
            loss = cross_entropy(running, windows(10**6)).item()
        return {"value": loss / WINDOWS / 15}

    def body():
        engine.launch("cpu")
        size = WINDOWS // accumulate // distributed.world_size()
        training = engine.Training(
            3e-3, STEPS, size, accumulate, minutes=minutes, warmup=2, zero=zero
        )
        with engine.group():
            loop.train(
                load.load_model(source, dtype=dtype).train(),
                training,
                loss_of=loss_of,
                batches=lambda step: micro_batches(step, accumulate),
                out=out,
                identity=runs.fingerprint(source, None, {"zero": zero, "at": STEPS}),
                step_entry={"method": "tiny", "base": "a", "command": "b", "settings": {}},
                source=source,
                **{
                    "evaluate": evaluate, "eval_steps": 5, "save_steps": 2,
                    "boundary": lambda step: step % 3 == 0, **more,
                },
            )  # fmt: skip

    return run(body)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
