"""Taking hidden channels out of a whole model: one coordinate of the residual stream everywhere.

That is a column of the embedding and the head, a column of every linear that reads the stream, a
row of every linear that writes to it, and an entry of every norm on it.

An RMS norm divides by the root of the mean of squares over n channels. Over the k that stay the
mean of the same sum is n/k times as large, so norm weights are multiplied by sqrt(n/k) and epsilon
by n/k: taking out channels that are zero then changes nothing. The original leaves both as they
were.
Layer norms subtract a mean to which channels at zero belong, and cannot be mended like this.

Legend: D hidden channels, k of them kept.
"""

import copy
from math import sqrt

import torch
from torch import nn

from harness.blocks.decoder import Decoder
from harness.checkpoint import nonuniform
from harness.errors import UserError
from harness.modules import get_matrix
from sparse.structured.groups import TOKENS, TOLERANCE, Structure, embed_something

NORMS = "its norms are no plain RMS norms"
EPSILONS = ("variance_epsilon", "eps")
# How a parameter holds the hidden channels: as rows, columns, or the entries of a norm.
ROWS, COLUMNS, NORM = 0, 1, 2


def of_block(decoder: Decoder, index: int, structure: Structure) -> dict[str, int]:
    """Parameter name in block ``index`` -> how it holds the hidden channels.

    Raises:
        UserError: the block has parameters of another kind (fused experts).
    """
    block, found = decoder.blocks[index], {}
    width = decoder.config.get_text_config().hidden_size
    for name in structure.residual_readers:
        found[f"{name}.weight"] = COLUMNS
    for name in structure.residual_writers:
        found[f"{name}.weight"] = ROWS
        if block.get_submodule(name).bias is not None:
            found[f"{name}.bias"] = ROWS
    readers = {f"{name}.bias" for name in structure.residual_readers}
    for name, parameter in block.named_parameters():
        if name in found or name in readers:
            continue
        if parameter.ndim == 1 and len(parameter) == width:
            found[name] = NORM
        elif parameter.ndim > 1:
            raise UserError(_refusal(decoder, f"{name} belongs to no linear layer"))
    return found


def of_model(decoder: Decoder) -> dict[str, int]:
    """The same for what lies outside the blocks; tied parameters once."""
    found = {}
    width = decoder.config.get_text_config().hidden_size
    for name, parameter in decoder.model.named_parameters():
        if name.startswith(f"{decoder.prefix}."):
            continue
        if parameter.shape[-1] != width or parameter.ndim > 2:
            raise UserError(_refusal(decoder, f"{name} is {list(parameter.shape)}"))
        found[name] = COLUMNS if parameter.ndim == 2 else NORM
    return found


def cut(
    tensors: dict[str, torch.Tensor], holds: dict[str, int], alive: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``tensors`` without the dead channels; ``alive`` [D] bool. Names as in ``holds``."""
    tensors = dict(tensors)
    factor = sqrt(len(alive) / int(alive.sum()))
    for name, how in holds.items():
        if name not in tensors:  # tied to another
            continue
        mask = alive.to(tensors[name].device)
        if how == COLUMNS:
            tensors[name] = tensors[name][:, mask]
        else:
            tensors[name] = tensors[name][mask]
        if how == NORM:
            tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
    return tensors


@torch.no_grad()
def zero(module: nn.Module, holds: dict[str, int], alive: torch.Tensor) -> None:
    """Zero in place what writes the dead channels: to the model they are gone."""
    for name, how in holds.items():
        parameter = module.get_parameter(name)
        mask = ~alive.to(parameter.device)
        if how == ROWS:
            parameter[mask] = 0
        elif isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            parameter[:, mask] = 0


@torch.no_grad()
def check(decoder: Decoder, index: int, holds: dict[str, int], alive: torch.Tensor) -> None:
    """Raise :class:`UserError` unless block ``index`` without the dead channels gives what it gives
    with them at zero; a float32 ``decoder``."""
    block = decoder.load(index)
    embed_something(decoder, 1)
    generator = torch.Generator().manual_seed(index)
    hidden = torch.randn(1, TOKENS, len(alive), generator=generator) * alive
    hidden = hidden.to(decoder.device)
    zero(block, holds, alive)
    kept = alive.to(decoder.device)
    wanted = decoder.forward(index, hidden)[..., kept]
    small = copy.deepcopy(block)
    decoder.release(index)
    for name, tensor in cut(small.state_dict(), holds, alive).items():
        owner, _, leaf = name.rpartition(".")
        small.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for module in small.modules():
        for name in EPSILONS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, getattr(module, name) * len(alive) / int(alive.sum()))
    try:
        got = decoder.forward(index, hidden[..., kept], block=small)
        wrong = (got - wanted).abs().max() > TOLERANCE * wanted.abs().max()
    except (RuntimeError, ValueError) as error:
        raise UserError(_refusal(decoder, NORMS)) from error
    if wrong:
        raise UserError(_refusal(decoder, NORMS))


def check_untied(decoder: Decoder, structure: Structure, kept: int, raw: dict) -> None:
    """Raise :class:`UserError` where the family's config.json ``raw`` cannot give block 0 ``kept``
    hidden channels and leave its heads and MLP as they are."""
    shapes = {}
    for name in structure.residual_readers:
        rows = get_matrix(decoder.blocks[0].get_submodule(name)).shape[0]
        shapes[f"{decoder.prefix}.0.{name}.weight"] = (rows, kept)
    changes = {"hidden_size": kept, "head_dim": nonuniform.head_dim(decoder.config)}
    if nonuniform.ordinary(raw, shapes, changes) is None:
        raise UserError(
            f"channel-wise on tied sizes: in {type(decoder.model).__name__} the size of heads or "
            "MLP follows from hidden_size; use --block_wise."
        )


def _refusal(decoder: Decoder, why: str) -> str:
    return (
        f"hidden channels cannot be taken out of {type(decoder.model).__name__} ({why}); "
        "use --block_wise."
    )
