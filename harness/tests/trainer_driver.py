"""``trainer_driver.py MODEL OUT ZERO ACCUMULATE [KILL]``: twelve steps of a tiny model; KILL is the
step before which the process kills itself with signal 9, or "nan", where a loss is not a number."""

import os
import signal
import sys
from pathlib import Path

import torch
from harness.cli import run
from torch.nn import functional as F

from harness import checkpoint, distributed, engine, trainer, writer

STEPS, WINDOWS = 12, 8


def windows(step):
    return torch.randint(0, 288, (WINDOWS, 16), generator=torch.Generator().manual_seed(step))


def micro_batches(step, accumulate):
    ranks, rank = distributed.world_size(), distributed.rank()
    micro = WINDOWS // ranks // accumulate
    parts = windows(step).split(micro)[rank::ranks]
    return [{"ids": ids, "tokens": ids[:, 1:].numel(), "step": step} for ids in parts]


def main(source, out, zero, accumulate, kill=None):
    torch.set_num_threads(1)
    accumulate = int(accumulate)
    source, out = Path(source), Path(out)

    def loss_of(running, batch):
        if kill is not None and kill.isdigit() and batch["step"] == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        logits = running(input_ids=batch["ids"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="sum")
        if kill == "nan" and batch["step"] == 7:
            losses = losses * float("nan")
        return losses, {"tenth": losses.detach() / 10}

    def evaluate(running, step):
        with torch.no_grad():
            logits = running(input_ids=windows(10**6)).logits[:, :-1]
        ids = windows(10**6)[:, 1:]
        return {"value": F.cross_entropy(logits.transpose(1, 2), ids).item()}

    def body():
        engine.launch("cpu")
        model = checkpoint.load_model(source).train()
        training = engine.Training(
            3e-3, STEPS, WINDOWS // accumulate, accumulate, warmup=2, zero=int(zero)
        )
        step_entry = {"method": "tiny", "base": source.name, "command": "c", "settings": {}}
        found = trainer.train(
            model,
            training,
            batches=lambda step: micro_batches(step, accumulate),
            loss_of=loss_of,
            out=out,
            identity=writer.fingerprint(source, None, {"zero": zero}),
            evaluate=evaluate,
            eval_steps=5,
            save_steps=2,
            boundary=lambda step: step % 3 == 0,
            step_entry=step_entry,
            source=source,
        )
        distributed.say(f"best {found['best_step']} of {found['steps']}")

    code = run(body)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
