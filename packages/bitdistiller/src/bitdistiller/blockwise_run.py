"""Blocks trained one after another to give, quantized, what they gave dense (EfficientQAT's
Block-AP, arXiv 2407.11062, section 3.2): weights, scales and zero points together.

    two streams of hidden states, of the dense model and of the blocks quantized so far
    for each block: target = dense block on the dense stream
                    minimise |quantized block on the quantized stream - target|²
                    both streams go on through their own block

The loop stands in harness.blocks.block_training; here is what is trained.
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bitdistiller import clip_file, result, student
from harness import locks, modules
from harness.blocks.block_training import train
from harness.blocks.job import Job, claim, draw, open_decoder, run_job
from harness.blocks.plan import activation_bytes
from harness.blocks.sequential import BlockInHand, Method, Update
from harness.checkpoint import hashes, load
from harness.errors import UserError
from harness.modules import get_matrix
from harness.quant import masks
from harness.quant.fake_quant import FakeQuantLinear
from harness.quant.grid import Grid
from harness.quant.scheme import Scheme

STEP = 1.25  # time of a training step with fake quantization over that without, for --dry-run


@dataclass
class Plan:
    """How every block is trained.

    Attributes:
        ranges: clip ranges by name, or None: the grids begin at the weights' extremes.
        held_out: how many of the last windows are measured on, not trained on.
    """

    grid: Grid
    ranges: student.Ranges | None
    epochs: int
    batch_size: int
    quant_lr: float
    weight_lr: float
    held_out: int


@locks.releasing
def run(settings, command: str) -> list[dict]:
    """Train every block and write the result folder ``settings.out``: quantized values, dense, and
    grid.safetensors. Resumable block by block.

    Args:
        settings: :class:`bitdistiller.blockwise.Settings`. command: for the card.

    Returns:
        One row per linear: its block's relative error "before" and after ("error").

    Raises:
        UserError: anything the user can mend, in one line.
    """
    s = settings
    grid = Grid(s.bits, s.group_size)
    weight_lr = (2e-5 if s.bits == 2 else 1e-5) if s.weight_lr is None else s.weight_lr
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("blocks are trained by one process; start it without torchrun.")
    result.check_dense(load.resolve(s.model))
    job = Job.of(settings, command)
    decoder = open_decoder(job, trains=True)
    ranges = None if s.clip is None else clip_file.read(s.clip, decoder.weights.folder, grid)
    claim(job, decoder, Scheme(grid), "dense")
    student.check(decoder.model, grid, ranges=ranges, learn="all")
    noted = {
        "bits": s.bits, "group_size": s.group_size, "clip": s.clip and _mark(s.clip),
        "val_size": s.val_size, "batch_size": s.batch_size, "epochs": s.epochs,
        "quant_lr": s.quant_lr, "weight_lr": weight_lr,
    }  # fmt: skip
    drawn = draw(job, decoder, s.dataset, s.nsamples + s.val_size, s.seqlen, s.val_size)

    def split(windows: torch.Tensor) -> list[torch.Tensor]:
        train, held_out = windows[: s.nsamples], windows[s.nsamples :]
        return [*train.split(s.batch_size), *held_out.split(s.batch_size)]

    plan = Plan(grid, ranges, s.epochs, s.batch_size, s.quant_lr, weight_lr, s.val_size)
    method = Method(
        "block-ap", noted, [partial(train_block, plan)], ("quantized", "dense"), split,
        side_file=result.FILE, side_note={result.NOTE: result.note(grid)},
    )  # fmt: skip

    def side(rows: int, columns: int) -> int:
        groups = columns // grid.columns_per_group(columns)
        return rows * groups * (decoder.stored_dtype.itemsize + 1)

    cost = partial(_cost, plan, drawn[0].shape[1])
    return run_job(job, decoder, method, drawn, cost=cost, side=side)


def _cost(plan: Plan, seqlen: int, shapes, tokens, hidden, item) -> tuple[float, float, float]:
    """As `blocks.plan.Cost`. A step is a forward and twice that backward; both streams go through
    the block once, and the windows held out two times more."""
    held_out = plan.held_out * seqlen
    passes = 3 * STEP * plan.epochs * (tokens - held_out) + 2 * tokens + 2 * held_out
    weights = sum(o * i for o, i in shapes.values())
    batch = activation_bytes(shapes, plan.batch_size * seqlen, item)
    return passes * weights, 0, 2 * hidden + 16 * weights + 2 * batch


def _mark(clip: str | Path) -> str:
    """The clip file as the user named it, and a hash, so that a resumed run has the same one."""
    return f"{clip} ({hashes.file_hash(clip_file.locate(clip))})"


def train_block(plan: Plan, hand: BlockInHand) -> None:
    """The act: the block's linears compute with quantized weights while they are trained with their
    grids; then they are put as the values that these stand for."""
    model = hand.decoder.model
    linears = {f"{hand.prefix}.{n}": module for n, module in modules.linears(hand.block).items()}
    placed = student.put_in(
        model, linears, plan.grid, ranges=plan.ranges, learn="all", dtype=hand.decoder.stored_dtype
    )
    for module in placed.values():
        _widen(module)
        masks.keep(module)
    held_out = -(-plan.held_out // plan.batch_size)
    before, after = train(
        hand, _groups(placed, plan), epochs=plan.epochs, held_out=held_out,
        rates="--weight_lr and --quant_lr",
    )  # fmt: skip
    if after > before:
        print(
            f"{hand} got worse; lower --weight_lr and --quant_lr, or give more windows",
            file=sys.stderr,
        )
    updates = {}
    for name, module in placed.items():
        plain, quantized = module.unwrap()
        values = get_matrix(plain)
        plain.weight.data = plain.weight.data.to(hand.decoder.dtype)
        model.set_submodule(name, plain)
        side = {"scale": quantized.scale, "zero": quantized.zero}
        updates[name.removeprefix(f"{hand.prefix}.")] = Update(values, after, side=side)
    hand.put(updates)
    hand.note("before", before)


def _widen(module: FakeQuantLinear) -> None:
    """Train in float32 what will be stored in the model's dtype."""
    for name in ("weight", "scale", "zero"):
        setattr(module, name, nn.Parameter(getattr(module, name).detach().float()))


def _groups(placed: dict[str, FakeQuantLinear], plan: Plan) -> list[dict]:
    """AdamW's two groups: grids, then weights. A rate of 0 leaves its group as it is."""
    parts = placed.values()
    return [
        {"params": [p for m in parts for p in (m.scale, m.zero)], "lr": plan.quant_lr},
        {"params": [m.weight for m in parts], "lr": plan.weight_lr},
    ]
