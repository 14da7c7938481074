"""``--dry-run``: what a layer-wise pass would do, and about what it needs; nothing is written. And
what training on DeepSpeed (trainer.py) takes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from harness import distributed, formats, writer
from harness.sequential import Method
from harness.sparsity import nominal_ratio
from harness.stages import get_matrix, linears

# (shapes [(out, in)] of a block's linears, tokens, bytes of the hidden states, bytes per number) ->
# (multiply-adds in the model's dtype, in float32, bytes beside the block's weights).
Cost = Callable[[list[tuple[int, int]], int, int, int], tuple[float, float, float]]


def hessian_cost(shapes, tokens, hidden, item) -> tuple[float, float, float]:
    """Of a pass that gathers second moments and solves with them, O x I x I a linear."""
    forward = tokens * sum(o * i for o, i in shapes)
    solver = sum(tokens * i * i / 2 + o * i * i for o, i in shapes)
    widest = max(i for _, i in shapes)
    return forward, solver, hidden + 16 * widest**2 + activation_bytes(shapes, tokens, item)


def activation_bytes(shapes, tokens: int, item: int) -> int:
    """Inputs and outputs of a block's linears."""
    return tokens * sum(o + i for o, i in shapes) * item


def print_plan(
    decoder, method: Method, out: str | Path, tokens: int, cost: Cost = hessian_cost
) -> None:
    """Print the plan of :func:`harness.sequential.compress` block by block.

    Time is what the multiply-adds alone take, at the speed of large products, each dtype's timed
    for a quarter of a second: about right for large models, too little for tiny ones.

    Args:
        tokens: calibration tokens in all windows (0: no data is looked at).
        cost: what the method needs for a block, where data is looked at.

    Raises:
        UserError: the output folder is in the way (checked without --overwrite).
    """
    writer.check_out(Path(out), overwrite=True)
    speed, exact = (
        multiply_adds_per_second(decoder.device, dtype) for dtype in (decoder.dtype, torch.float32)
    )
    packed = method.grid and method.layout not in formats.PRUNED_FORMATS
    bits = method.grid.bits if packed else None
    kept = 1 - (nominal_ratio(method.settings) or 0) + 1 / (8 * decoder.dtype.itemsize)
    share = min(kept, 1) if method.layout == "bitmask" else 1
    item = decoder.dtype.itemsize
    print(f"{method.name}: {len(decoder)} blocks -> {out} ({method.layout}, {decoder.dtype})")
    print("| blocks | linears | weights (M) | memory (GB) | disk (MB) | time (s) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    total_disk = total_time = peak = 0.0
    for first, last, shapes in _same_blocks(decoder):
        weights = sum(o * i for o, i in shapes)
        widest = max(i for _, i in shapes)
        hidden = tokens * decoder.config.hidden_size * item
        work, exact_work, more = cost(shapes, tokens, hidden, item) if tokens else (0, 0, 0)
        memory = (weights * item + more) / 1e9
        scales = weights / method.grid.columns_per_group(widest) * item if bits else 0
        disk = (weights * bits / 8 + scales if bits else weights * item * share) / 1e6
        seconds = work / speed + exact_work / exact if tokens else weights / 1e8
        count = last - first + 1
        name = f"{first}" if count == 1 else f"{first}-{last}, each"
        print(
            f"| {name} | {len(shapes)} | {weights / 1e6:.2f} | {memory:.2f} | {disk:.1f} | "
            f"{seconds:.1f} |"
        )
        total_disk += disk * count
        total_time += seconds * count
        peak = max(peak, memory)
    outer = decoder.outer_size()
    total_disk += outer * item / 1e6
    print(
        f"in all: at most about {peak + outer * item / 1e9:.2f} GB of memory, {total_disk:.1f} MB "
        f"of disk, {total_time / 60:.1f} minutes"
    )


class TrainingCost(NamedTuple):
    """Bytes: of a process's memory without activations and teacher, of the result, and of all that
    lies on disk at the worst moment."""

    memory: float
    result: float
    disk: float


def training_cost(parameters: int, trained: int, item: int, zero: int) -> TrainingCost:
    """What ``harness.trainer.train`` takes for a model of ``parameters`` numbers, ``trained`` of
    them trained, of ``item`` bytes each, at this ZeRO stage."""
    ranks = distributed.world_size()
    # AdamW's two moments, and a float32 copy: ZeRO makes one of float32 weights too.
    optimizer = trained * (12 if zero or item == 2 else 8)
    states = optimizer / (ranks if zero else 1)
    gradients = trained * item / (ranks if zero > 1 else 1)
    weights = parameters * item / (ranks if zero > 2 else 1)
    best, state, result = trained * item, trained * item + optimizer, parameters * item
    # The last state and its best weights, newer ones, and the next state or the result.
    disk = 2 * best + state + max(state, result)
    return TrainingCost(states + gradients + weights, result, disk)


def _same_blocks(decoder):
    """Runs of blocks with equal shapes: (first, last, [(out, in)])."""
    runs = []
    for index, block in enumerate(decoder.blocks):
        shapes = [tuple(get_matrix(m).shape) for m in linears(block).values()]
        if runs and runs[-1][2] == shapes:
            runs[-1][1] = index
        else:
            runs.append([index, index, shapes])
    return runs


def multiply_adds_per_second(device, dtype) -> float:
    """By products of two matrices of 1,024, for a quarter of a second."""
    n = 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    a @ a
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.25:
        a @ a
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return count * n**3 / (time.perf_counter() - start)
