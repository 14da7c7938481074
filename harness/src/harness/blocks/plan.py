"""``--dry-run``: what a layer-wise pass would do, and about what it needs; nothing is written."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from harness import precision
from harness.blocks.sequential import Method
from harness.checkpoint import layouts, packed, runs, side_files
from harness.checkpoint.recipe import nominal_ratio
from harness.modules import get_matrix, linears

# Name -> (out, in) of a block's linears.
Shapes = dict[str, tuple[int, int]]
# (shapes, tokens, bytes of the hidden states, bytes per number) ->
# (multiply-adds in the model's dtype, in float32, bytes beside the block's weights).
Cost = Callable[[Shapes, int, int, int], tuple[float, float, float]]
# Bytes of float32 copies, codes and errors that a solver has of a stage's weights (six copies), and
# of its matrix of second moments (five), at the worst moment.
OF_WEIGHTS, OF_MOMENTS = 24, 20
# Bytes of the JSON that a tensor, and a row of the log, take.
HEADER, ROW = 200, 400


def hessian_cost(shapes: Shapes, tokens, hidden, item) -> tuple[float, float, float]:
    """Of a pass that gathers second moments and solves with them, O x I x I a stage."""
    forward = tokens * sum(o * i for o, i in shapes.values())
    stages = likely_stages(shapes)
    solver = sum(tokens * i * i / 2 + o * i * i for o, i in stages)
    solving = max(OF_MOMENTS * i * i + OF_WEIGHTS * o * i for o, i in stages)
    return forward, solver, 3 * hidden + solving + paused_bytes(shapes, tokens, item)


def likely_stages(shapes: Shapes) -> list[tuple[int, int]]:
    """(out, in) of linears of one module with inputs of one width, taken together: what feeds them
    may be one tensor."""
    together = {}
    for name, (rows, columns) in shapes.items():
        key = (name.rpartition(".")[0], columns)
        together[key] = together.get(key, 0) + rows
    return [(rows, columns) for (_, columns), rows in together.items()]


def activation_bytes(shapes: Shapes, tokens: int, item: int) -> int:
    """Inputs and outputs of a block's linears."""
    return tokens * sum(o + i for o, i in shapes.values()) * item


def paused_bytes(shapes: Shapes, tokens: int, item: int) -> int:
    """What forwards hold that wait for one of a block's linears: the outputs of those before it in
    its module, and its input."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        parts.setdefault(name.rpartition(".")[0], []).append(shape)
    widths = (sum(o for o, _ in part) + max(i for _, i in part) for part in parts.values())
    return tokens * max(widths) * item


def print_plan(
    decoder,
    method: Method,
    out: str | Path,
    tokens: int,
    cost: Cost = hessian_cost,
    side: Callable[[int, int], int] = lambda rows, columns: 0,
) -> None:
    """Print the plan of :func:`harness.blocks.sequential.compress` block by block.

    Time is what the multiply-adds alone take, at the speed of large products, each dtype's timed
    for a quarter of a second: about right for large models, too little for tiny ones. Memory holds
    what this process has taken already.

    Args:
        tokens: calibration tokens in all windows (0: no data is looked at).
        cost: what the method needs for a block, where data is looked at.
        side: bytes of a linear's tensors in the method's side file, from (out, in).

    Raises:
        UserError: the output folder is in the way (checked without --overwrite).
    """
    runs.RunFolder(out).check(overwrite=True)
    speed, exact = (
        multiply_adds_per_second(decoder.device, dtype) for dtype in (decoder.dtype, torch.float32)
    )
    item, stored = decoder.dtype.itemsize, decoder.stored_dtype.itemsize
    print(
        f"{method.name}: {len(decoder)} blocks -> {out} ({method.layout}, computed in "
        f"{precision.name(decoder.dtype)}, stored in {precision.name(decoder.stored_dtype)})"
    )
    print("| blocks | linears | weights (M) | memory (GB) | disk (MB) | time (s) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    outer = decoder.outer_size()
    begun = psutil.Process().memory_info().rss
    begun += 0 if decoder.device.type == "cuda" else outer * item
    total_disk = total_time = peak = 0.0
    for first, last, shapes, others in _same_blocks(decoder):
        weights = sum(o * i for o, i in shapes.values())
        hidden = tokens * decoder.config.get_text_config().hidden_size * item
        largest = max((o * i for o, i in shapes.values()), default=0)
        work, exact_work, more = (
            cost(shapes, tokens, hidden, item)
            if tokens and shapes
            else (0, 0, OF_WEIGHTS * largest)
        )
        # The result waits for the disk while the block's own weights are there.
        memory = begun + (weights + others) * (item + stored) + more
        disk = sum(
            _linear_bytes(method, f"{decoder.prefix}.{first}.{name}", *shape, decoder.stored_dtype)
            for name, shape in shapes.items()
        )
        disk += others * stored
        # At the end they are there twice, block by block and together.
        disk += 2 * sum(side(*shape) for shape in shapes.values())
        seconds = work / speed + exact_work / exact if tokens else weights / 1e8
        count = last - first + 1
        name = f"{first}" if count == 1 else f"{first}-{last}, each"
        print(
            f"| {name} | {len(shapes)} | {weights / 1e6:.2f} | {memory / 1e9:.2f} | "
            f"{disk / 1e6:.1f} | {seconds:.1f} |"
        )
        total_disk += disk * count + count * len(shapes) * (4 * HEADER + ROW)
        total_time += seconds * count
        peak = max(peak, memory)
    total_disk += outer * stored + side_files.nbytes(decoder.weights.folder) + 10 * ROW
    print(
        f"in all: at most about {peak / 1e9:.2f} GB of memory, {total_disk / 1e6 + 0.05:.1f} MB of "
        f"disk, {total_time / 60:.1f} minutes"
    )


def _linear_bytes(method: Method, name: str, rows: int, columns: int, dtype) -> float:
    """Of one linear's tensors in the result."""
    kind = layouts.of(method.layout)
    if kind.HOLDS == "codes":
        return packed.nbytes(method.layout, method.scheme.of(name), rows, columns, dtype)
    nonzeros = rows * columns * (1 - (nominal_ratio(method.settings) or 0))
    dense = rows * columns * dtype.itemsize
    return min(dense, kind.nbytes(rows, columns, nonzeros, dtype.itemsize))


def _same_blocks(decoder) -> list[tuple[int, int, Shapes, int]]:
    """Runs of blocks with equal shapes: first, last, those of the linears, and how many numbers the
    block has beside them."""
    equal = []
    for index, block in enumerate(decoder.blocks):
        shapes = {name: tuple(get_matrix(m).shape) for name, m in linears(block).items()}
        others = sum(p.numel() for p in block.parameters())
        others -= sum(o * i for o, i in shapes.values())
        if equal and equal[-1][2:] == [shapes, others]:
            equal[-1][1] = index
        else:
            equal.append([index, index, shapes, others])
    return equal


def multiply_adds_per_second(device, dtype) -> float:
    """By products of two matrices of 1,024, for a quarter of a second; of 256 where one of those
    would take longer."""
    for n in (1024,) if device.type == "cuda" else (256, 1024):
        a = torch.randn(n, n, device=device, dtype=dtype)
        start = time.perf_counter()
        a @ a
        if n == 256 and time.perf_counter() - start > 0.25 / 4**3:
            break
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.25:
        a @ a
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return count * n**3 / (time.perf_counter() - start)
