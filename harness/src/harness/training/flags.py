"""Settings of every command that trains on DeepSpeed. No torch up here."""

import argparse
from dataclasses import dataclass

import harness.settings
from harness.settings import flag


@dataclass(frozen=True, kw_only=True)
class Shared(harness.settings.Shared):
    """shared by all commands"""

    # The deepspeed launcher hands this to every process, which has it from its environment too.
    local_rank: int | None = flag(None, argparse.SUPPRESS)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """DeepSpeed (more processes: deepspeed or torchrun before the command)"""

    zero: int = flag(
        0, "what processes share: 1 optimizer states, 2 and gradients, 3 and weights (default 0)",
        choices=range(4),
    )  # fmt: skip
    offload: bool = flag(False, "optimizer states in CPU memory; 3: weights too")
    gradient_checkpointing: bool = flag(
        False, "less memory, a third more time: activations are made again in the backward pass"
    )
