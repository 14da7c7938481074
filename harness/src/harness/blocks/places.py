"""Tensors put in the places of a module's, which stands on the meta device until then."""

import torch
from torch import nn

from harness import precision
from harness.checkpoint import load, names


def keep_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the tensors that transformers keeps in float32, while a model is loaded in ``dtype``,
    that dtype."""
    kept = precision.kept_in_float32(model, dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and kept(name):
            put(model, name, tensor.float(), buffer=name not in parameters)


def finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, of this name.

    Raises:
        UserError: it holds NaN or infinite values.
    """
    load.check_finite(name, tensor)
    return tensor


def fill(module: nn.Module, tensors: dict[str, torch.Tensor], device, prefix: str = "") -> None:
    """Put ``tensors``, by full name, in the places of ``module``'s, each in the dtype of its
    place."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(prefix)
        is_buffer = name not in parameters
        current = module.get_buffer(name) if is_buffer else parameters[name]
        names.check_shape(full_name, tensor.shape, current.shape)
        put(module, name, tensor.to(device, current.dtype), buffer=is_buffer)


def put(module: nn.Module, name: str, tensor: torch.Tensor, buffer: bool = False) -> None:
    """``tensor`` as the parameter, or the buffer, of this name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if buffer:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
