"""``bitdistiller.train --dry-run``: what training takes, activations aside."""

import math
from pathlib import Path

from harness.decoder import Decoder
from harness.footprint import stored_size
from harness.stages import get_matrix, linears

from harness import distributed


def show(args, source: Path, grid, training, dtype: str) -> None:
    """Print the plan of the parsed flags."""
    decoder = Decoder(source, sizes_only=True)
    parameters = stored_size(source, decoder.config).parameters
    shapes = [get_matrix(m).shape for block in decoder.blocks for m in linears(block).values()]
    weights = sum(map(math.prod, shapes))
    item = 4 if dtype == "float32" else 2
    ranks = distributed.world_size()
    groups = sum(rows * (columns // grid.columns_per_group(columns)) for rows, columns in shapes)
    trained = {"weights": weights, "scales": groups, "all": weights + 2 * groups}[args.learn]
    # AdamW's two moments, and a float32 copy: ZeRO makes one of float32 weights too.
    optimizer = trained * (12 if training.zero or item == 2 else 8)
    states = optimizer / (ranks if training.zero else 1)
    gradients = trained * item / (ranks if training.zero > 1 else 1)
    student = parameters * item / (ranks if training.zero > 2 else 1)
    teacher = 0 if args.kd_loss_type == "ce" or args.teacher_cache else parameters * item
    if training.zero < 3:
        # What the student does not train, it has from the teacher.
        teacher = min(teacher, weights * item)
    memory = (states + gradients + student + teacher) / 1e9
    best, state = trained * item, trained * item + optimizer
    # The last state and its best weights, newer ones, and the next state or the result.
    running = 2 * best + state + max(state, parameters * item)
    print(
        f"{args.kd_loss_type}: {args.model} ({parameters / 1e6:.2f} M parameters, "
        f"{weights / 1e6:.2f} M of them to {grid.bits} bits in groups of {grid.group_size}, "
        f"{dtype}) -> {args.out}"
    )
    print(
        f"memory: about {memory:.2f} GB a process, of which the teacher {teacher / 1e9:.2f}, and "
        f"the activations of {training.micro_batch} examples; disk: {parameters * item / 1e6:.1f} "
        f"MB, and while it runs {running / 1e6:.1f} MB"
    )
