"""What a training run takes: memory and disk, for ``--dry-run``."""

from typing import NamedTuple

from harness import distributed


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
