"""``bitdistiller.train --dry-run``: what training takes, activations aside."""

import math
from pathlib import Path

from harness import precision
from harness.blocks.decoder import Decoder
from harness.metrics.footprint import stored_size
from harness.modules import get_matrix, linears
from harness.training.cost import print_plan, training_cost


def show(settings, source: Path, grid, training, dtype, stored_dtype) -> None:
    """Print the plan of completed settings (bitdistiller.train)."""
    decoder = Decoder(source, sizes_only=True)
    parameters = stored_size(source, decoder.config).parameters
    shapes = [get_matrix(m).shape for block in decoder.blocks for m in linears(block).values()]
    weights = sum(map(math.prod, shapes))
    item = dtype.itemsize
    groups = sum(rows * (columns // grid.columns_per_group(columns)) for rows, columns in shapes)
    trained = {"weights": weights, "scales": groups, "all": weights + 2 * groups}[settings.learn]
    teacher = 0 if settings.kd_loss_type == "ce" or settings.teacher_cache else parameters * item
    if training.zero < 3:
        # What the student does not train, it has from the teacher.
        teacher = min(teacher, weights * item)
    print_plan(
        f"{settings.kd_loss_type}: {settings.model} ({parameters / 1e6:.2f} M parameters, "
        f"{weights / 1e6:.2f} M of them to {grid.bits} bits in groups of {grid.group_size}, "
        f"{precision.name(dtype)}) -> {settings.out}",
        training_cost(parameters, trained, item, stored_dtype.itemsize, training.zero),
        f"{training.micro_batch} examples",
        teacher,
    )
