"""``engine_driver.py OUT.json ZERO ACCUMULATE MODE``: eight steps of a tiny model on DeepSpeed.

MODE "straight" trains through, saving a state after four steps; "resume" goes on from it.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import families
from harness import distributed
from harness.training import engine, states


def micro_batches(step):
    """Four micro-batches of two windows, with uneven numbers of trained tokens."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, families.VOCAB, (8, 16), generator=draw)
    mask = torch.rand(8, 15, generator=draw) < torch.rand(8, 1, generator=draw)
    cuts = zip(ids.split(2), mask.split(2), strict=True)
    batches = [{"ids": i, "mask": m, "tokens": m.sum().item()} for i, m in cuts]
    return batches[distributed.rank() :: distributed.world_size()]


def main(out, zero, accumulate, mode):
    torch.set_num_threads(1)
    engine.launch("cpu")
    model = families.build("llama", attention_dropout=0.0)
    training = engine.Training(1e-3, 8, 2, int(accumulate), warmup=2, zero=int(zero))
    running = engine.start(model, training)
    saved = Path(out).with_suffix(".states")
    state = states.load(running, saved) if mode == "resume" else None

    def loss_of(batch):
        logits = running(input_ids=batch["ids"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
        return (losses * batch["mask"]).sum(), {"noise": torch.rand(()) * batch["tokens"]}

    rows = []
    for step in range(state["step"] if state else 0, training.steps):
        rows.append(engine.train_step(running, training, step, micro_batches(step), loss_of))
        if step == 3 and mode == "straight":
            states.save(running, saved, {"step": 4})
        with engine.whole_weights(running.module) as whole:
            # As generation does: ranks end at different lengths.
            sums = [whole(input_ids=torch.arange(9)[None]).logits.sum().item()] * 2
            for _ in range(distributed.rank()):
                sums[1] = whole(input_ids=torch.arange(9)[None]).logits.sum().item()
            rows[-1]["logits"] = sums[0]
            assert sums[0] == sums[1]
    found = engine.weights(running)
    with engine.whole_weights(running.module) as whole:
        sizes = sum(p.numel() for p in whole.parameters())
    if distributed.rank() == 0:
        total = sum(t.double().abs().sum().item() for t in found.values())
        Path(out).write_text(json.dumps({"rows": rows, "weights": total, "sizes": sizes}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
