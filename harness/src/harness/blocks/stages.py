"""A block's linears, grouped by the tensor that feeds them; and a block's forward, paused there.

A *stage* is the set of linears that share one input (q/k/v; o; gate/up; down). It is found by
running the block once under hooks and grouping by the identity of the input, so no table per model
family is needed.

:class:`PausedForwards` runs a block's forward for many batches at once and stops each of them where
a stage's input has just been made. The method takes its statistics, changes the stage's weights,
and the forwards go on through the changed weights: every sub-layer runs once per batch, where
restarting the block for every stage would run it up to four times. Each forward is a greenlet
(one thread, no locks); what a paused forward keeps alive is what the rest of the block still reads.
"""

import functools
from collections.abc import Callable

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from harness.errors import UserError
from harness.modules import linears


@torch.no_grad()
def find_stages(block: nn.Module, forward: Callable[[], object]) -> list[list[str]]:
    """Names of the block's linears, grouped by shared input, in the order they are called.

    ``forward`` runs the block once. Linears that it does not call are left out.
    """
    inputs: list[torch.Tensor] = []  # kept alive, so that an address means one tensor
    stages: list[list[str]] = []

    def record(name):
        def hook(module, args):
            x = args[0]
            for stage, seen in zip(stages, inputs, strict=True):
                if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape:
                    if name not in stage:
                        stage.append(name)
                    return
            stages.append([name])
            inputs.append(x)

        return hook

    hooks = [m.register_forward_pre_hook(record(n)) for n, m in linears(block).items()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return stages


def _as_it_was(method):
    """Gradients are on or off afterwards as before, though a forward may pause inside a no_grad."""

    @functools.wraps(method)
    def wrapped(*args):
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return method(*args)

    return wrapped


class PausedForwards:
    """Forwards of one block over many batches, advanced together from stage to stage.

    Args:
        block: the block, its weights in place.
        stages: names of linears per stage, from :func:`find_stages`.
        forwards: one function per batch, running the block and returning its output.
        keep: True keeps every forward paused between stages (fastest); False runs each from its
            start up to the wanted stage and drops it (least memory, up to about 2.5 forwards).
    """

    def __init__(self, block, stages: list[list[str]], forwards: list[Callable], keep: bool = True):
        self.forwards = forwards
        self.keep = keep
        self.paused: list[greenlet | None] = [None] * len(forwards)
        self.target = 0
        modules = dict(block.named_modules())
        self.hooks = [
            modules[names[0]].register_forward_pre_hook(self._gate(index))
            for index, names in enumerate(stages)
        ]

    def _gate(self, index: int):
        def hook(module, args):
            if index >= self.target:
                getcurrent().parent.switch((index, args[0]))

        return hook

    @_as_it_was
    def inputs(self, stage: int, batch: int) -> torch.Tensor:
        """Advance ``batch`` to ``stage`` and return that stage's input [B, T, I]."""
        self.target = stage
        worker = self.paused[batch] or greenlet(self.forwards[batch])
        reached = worker.switch()
        if not isinstance(reached, tuple) or reached[0] != stage or worker.dead:
            raise UserError(
                "this model's blocks call their layers in an order that depends on the data; "
                "layer-wise methods need the same order for every window."
            )
        if self.keep:
            self.paused[batch] = worker
        else:
            worker.throw()
        return reached[1]

    @_as_it_was
    def finish(self, batch: int) -> torch.Tensor:
        """Run ``batch`` to the end of the block and return the block's output."""
        self.target = len(self.hooks)
        worker = self.paused[batch] or greenlet(self.forwards[batch])
        self.paused[batch] = None
        return worker.switch()

    @_as_it_was
    def close(self) -> None:
        """Drop unfinished forwards and remove the hooks."""
        for worker in self.paused:
            if worker is not None and not worker.dead:
                worker.throw()
        self.paused = []
        for hook in self.hooks:
            hook.remove()
