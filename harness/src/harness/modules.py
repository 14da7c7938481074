"""The linears of a model: which modules they are, which are left out, and their matrices."""

import functools
import re
from collections.abc import Sequence

import torch
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
        product = bare.forward(x)
        return isinstance(product, torch.Tensor) and torch.allclose(product, x @ weight.T + bias)
    except Exception:  # it asks for more than those
        return False


def block_linears(prefix: str, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """Full name -> every linear of the blocks (:func:`find_blocks`)."""
    return {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in linears(block).items()
    }


def ignore(prefix: str, blocks: nn.ModuleList, patterns: Sequence[str]) -> list[str]:
    """Leave linears of ``blocks``, whose list is called ``prefix``, out of all that
    :func:`linears` tells from now on; returns their full names.

    A pattern is a full name, its last parts ("dt_proj", "mlp.down_proj"), or "re:" and a regular
    expression that matches from the full name's beginning, as in compressed-tensors' ``ignore``.

    Raises:
        UserError: a pattern meets no linear, or is no regular expression.
    """
    every = block_linears(prefix, blocks)
    left_out = set()
    for pattern in patterns:
        try:
            met = [name for name in every if meets(pattern, name)]
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


def meets(pattern: str, name: str) -> bool:
    """Whether a pattern, as :func:`ignore` takes it, means the linear of this full name."""
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


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: in the model's text part the outermost ModuleList whose
    members hold linears, if one has as many members as the config has blocks that one."""
    text = model.config.get_text_config()
    part = model.get_decoder() if hasattr(model, "get_decoder") else None
    within = next((f"{n}." for n, m in model.named_modules() if m is part and n), "")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linears(b) for b in module)
    ]
    # "decoder" is another thing in some families (ModernBERT's is its head).
    lists = [candidate for candidate in lists if candidate[0].startswith(within)] or lists
    depth = getattr(text, "num_hidden_layers", None)
    for name, module in [candidate for candidate in lists if len(candidate[1]) == depth] or lists:
        return name, module
    raise UserError(f"{type(model).__name__} has no list of blocks with linear layers in them.")
