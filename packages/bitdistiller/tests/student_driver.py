"""``student_driver.py FOLDER ZERO LEARN DTYPE OUT.json``: four steps of a student on DeepSpeed.

FOLDER is a dense model; written are the losses, and whether the finished model gives the logits of
the trained one.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import families
from bitdistiller import result, student
from harness import distributed
from harness.checkpoint import load
from harness.quant.grid import Grid
from harness.training import engine


def main(folder, zero, learn, dtype, out):
    torch.set_num_threads(1)
    engine.launch("cpu")

    def build():
        return student.build(load.load_model(folder, dtype=dtype), Grid(2, 16), learn=learn)

    built, teacher = build(), load.load_model(folder, dtype=dtype).requires_grad_(False)
    if int(zero) < 3:
        student.share(built, teacher)
    trained = [name for name, p in built.named_parameters() if p.requires_grad]
    training = engine.Training(
        3e-3, 4, 2, 2 // distributed.world_size(), zero=int(zero), gradient_checkpointing=True
    )
    running = engine.start(built.train(), training)
    ids = families.windows(4, 12)

    def loss_of(batch):
        logits = running(input_ids=batch["ids"]).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten())
        return losses * batch["tokens"], {}

    share = ids.split(2)[distributed.rank() :: distributed.world_size()]
    micro = [{"ids": part, "tokens": 22} for part in share]
    losses = [
        engine.train_step(running, training, step, micro, loss_of)["loss"] for step in range(4)
    ]
    with torch.no_grad():
        expected = running(input_ids=ids).logits
        frozen = teacher(ids).logits
    found = engine.weights(running)
    if distributed.rank() == 0:
        model = build()
        with torch.no_grad():
            for name in trained:
                model.get_parameter(name).copy_(found[name])
            plain, _, _ = result.finish(model)
            same = torch.equal(plain.eval()(ids).logits, expected)
        dense = load.load_model(folder, dtype=dtype)
        with torch.no_grad():
            same_teacher = torch.equal(dense(ids).logits, frozen)
        values = {"losses": losses, "same": same, "teacher": same_teacher}
        Path(out).write_text(json.dumps(values))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
