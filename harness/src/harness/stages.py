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
import re
from collections.abc import Callable, Sequence

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.errors import UserError, nearest

# What marks a linear that the user wants left alone.
IGNORED = "harness_ignored"
# Inputs [2, 2], weight [3, 2] and bias [3] of a product that no routing leaves as it is.
SMALL = ([[1.0, 2.0], [3.0, -4.0]], [[0.5, -1.0], [2.0, 0.25], [-3.0, 1.0]], [0.1, -0.2, 0.3])


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """Name within the block -> every module of it that maps x to x Wᵀ + b, and does no more."""
    return {n: m for n, m in block.named_modules() if is_linear(m)}


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is nn.Linear or Conv1D, or of a subclass that computes the same (Falcon's,
    which routers, with their choice of experts, do not)."""
    if getattr(module, IGNORED, False):
        return False
    if type(module) in (nn.Linear, Conv1D):
        return True
    return isinstance(module, nn.Linear) and _computes_a_product(type(module))


@functools.cache
def _computes_a_product(kind: type[nn.Linear]) -> bool:
    """Tried out on an instance that has nothing but a small weight and a bias."""
    x, weight, bias = (torch.tensor(values, device="cpu") for values in SMALL)
    bare = kind.__new__(kind)
    nn.Module.__init__(bare)
    # Past nn.Module's own registers: models are built where those send parameters to no device.
    bare.__dict__ |= {"weight": weight, "bias": bias, "in_features": 2, "out_features": 3}
    try:
        found = bare.forward(x)
        return isinstance(found, torch.Tensor) and torch.allclose(found, x @ weight.T + bias)
    except Exception:  # it asks for more than those
        return False


def ignore(prefix: str, blocks: nn.ModuleList, patterns: Sequence[str]) -> list[str]:
    """Leave linears of ``blocks``, whose list is called ``prefix``, out of all that
    :func:`linears` tells from now on; returns their full names.

    A pattern is a full name, its last parts ("dt_proj", "mlp.down_proj"), or "re:" and a regular
    expression that matches from the full name's beginning, as in compressed-tensors' ``ignore``.

    Raises:
        UserError: a pattern meets no linear, or is no regular expression.
    """
    every = {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in linears(block).items()
    }
    left_out = set()
    for pattern in patterns:
        try:
            met = [name for name in every if _meets(pattern, name)]
        except re.error as error:
            raise UserError(f"--ignore {pattern}: no regular expression ({error}).") from error
        if not met:
            words = {w for n in every for w in (n, n.split(".", prefix.count(".") + 2)[-1])}
            words |= {name.rpartition(".")[2] for name in every}
            raise UserError(
                f"--ignore {pattern}: no linear of the blocks is called so."
                + nearest(pattern, words)
            )
        left_out.update(met)
    if len(left_out) == len(every) and every:
        raise UserError("--ignore leaves no linear to work on.")
    for name in left_out:
        setattr(every[name], IGNORED, True)
    return sorted(left_out)


def _meets(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def turn(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """[out, in] from a weight as ``module`` holds it, and back: GPT-2's Conv1D has [in, out]."""
    return matrix.T if isinstance(module, Conv1D) else matrix


def get_matrix(module: nn.Module) -> torch.Tensor:
    """The weight as [out, in]."""
    return turn(module, module.weight.data)


@torch.no_grad()
def set_matrix(module: nn.Module, matrix: torch.Tensor) -> None:
    """Inverse of :func:`get_matrix`, in place; [out, in] of any float dtype."""
    module.weight.data.copy_(turn(module, matrix))


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

    def finish(self, batch: int) -> torch.Tensor:
        """Run ``batch`` to the end of the block and return the block's output."""
        self.target = len(self.hooks)
        worker = self.paused[batch] or greenlet(self.forwards[batch])
        self.paused[batch] = None
        return worker.switch()

    def close(self) -> None:
        """Drop unfinished forwards and remove the hooks."""
        for worker in self.paused:
            if worker is not None and not worker.dead:
                worker.throw()
        self.paused = []
        for hook in self.hooks:
            hook.remove()
