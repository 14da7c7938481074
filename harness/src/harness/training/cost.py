"""What a training run takes: memory and disk, for ``--dry-run``."""

from typing import NamedTuple

from harness import distributed
from harness.checkpoint import load
from harness.metrics.footprint import stored_size


class TrainingCost(NamedTuple):
    """Bytes: of a process's memory without activations and teacher, of the result, and of all that
    lies on disk at the worst moment."""

    memory: float
    result: float
    disk: float


def training_cost(parameters: int, trained: int, item: int, stored: int, zero: int) -> TrainingCost:
    """What ``training.loop.train`` takes for a model of ``parameters`` numbers, ``trained`` of
    them trained, of ``item`` bytes each while it runs and ``stored`` in the result, at this ZeRO
    stage."""
    ranks = distributed.world_size()
    # AdamW's two moments, and a float32 copy: ZeRO makes one of float32 weights too.
    optimizer = trained * (12 if zero or item == 2 else 8)
    states = optimizer / (ranks if zero else 1)
    gradients = trained * item / (ranks if zero > 1 else 1)
    weights = parameters * item / (ranks if zero > 2 else 1)
    best, state, result = trained * item, trained * item + optimizer, parameters * stored
    # The last state and its best weights, newer ones, and the next state or the result.
    disk = 2 * best + state + max(state, result)
    return TrainingCost(states + gradients + weights, result, disk)


def model_bytes(model: str, item: int) -> int:
    """Of a model in memory, ``item`` bytes a parameter."""
    folder = load.resolve(model)
    return stored_size(folder, load.load_config(folder)).parameters * item


def print_plan(title: str, cost: TrainingCost, activations: str, teacher: float = 0.0) -> None:
    """What --dry-run says: a title, and what the run takes. ``teacher``: bytes; ``activations``: of
    what they come on top."""
    print(title)
    of_teacher = f", of which the teacher {teacher / 1e9:.2f}" if teacher else ""
    print(
        f"memory: about {(cost.memory + teacher) / 1e9:.2f} GB a process{of_teacher}, and the "
        f"activations of {activations}; disk: {cost.result / 1e6:.1f} MB, and while it runs "
        f"{cost.disk / 1e6:.1f} MB"
    )
