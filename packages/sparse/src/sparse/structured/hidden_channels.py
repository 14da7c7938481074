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

from harness.blocks import residual
from harness.blocks.decoder import Decoder
from harness.blocks.residual import COLUMNS, GAIN, ROWS, SHIFT, Hold
from harness.checkpoint import nonuniform
from harness.errors import UserError
from harness.modules import get_matrix
from sparse.structured.groups import TOKENS, TOLERANCE, Structure, embed_something

NORMS = "its norms are no plain RMS norms"
EPSILONS = ("variance_epsilon", "eps")


def block_linears(decoder: Decoder) -> dict[int, dict[str, Hold]]:
    """:func:`harness.blocks.residual.of_block` of every block, looked for once per shape.

    Raises:
        UserError: as there.
    """
    holds = {}
    try:
        for index, alike in residual.one_of_each_shape(decoder).items():
            holds |= dict.fromkeys(alike, residual.of_block(decoder, index))
    except UserError as error:
        raise UserError(_refusal(decoder, str(error))) from error
    return holds


def outside(decoder: Decoder) -> dict[str, Hold]:
    """:func:`harness.blocks.residual.of_model`.

    Raises:
        UserError: a parameter outside the blocks holds something else.
    """
    holds, once = residual.of_model(decoder), {}
    for name, parameter in decoder.model.named_parameters():  # tied ones are there once
        if name.startswith(f"{decoder.prefix}."):
            continue
        if name not in holds:
            raise UserError(_refusal(decoder, f"{name} is {list(parameter.shape)}"))
        once[name] = holds[name]
    return once


def _axis(hold: Hold) -> int:
    """The dimension of the parameter, as it is stored, along which it holds the channels."""
    return int((hold.how == COLUMNS) != hold.turned)


def cut(
    tensors: dict[str, torch.Tensor], holds: dict[str, Hold], alive: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``tensors`` without the dead channels; ``alive`` [D] bool. Names as in ``holds``."""
    tensors = dict(tensors)
    factor = sqrt(len(alive) / int(alive.sum()))
    for name, hold in holds.items():
        if name not in tensors:  # tied to another
            continue
        mask = alive.to(tensors[name].device)
        if _axis(hold) == 1:
            tensors[name] = tensors[name][:, mask]
        else:
            tensors[name] = tensors[name][mask]
        if hold.how in (GAIN, SHIFT):
            tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
    return tensors


@torch.no_grad()
def zero(module: nn.Module, holds: dict[str, Hold], alive: torch.Tensor) -> None:
    """Zero in place what writes the dead channels: to the model they are gone."""
    for name, hold in holds.items():
        parameter = module.get_parameter(name)
        mask = ~alive.to(parameter.device)
        if hold.how == ROWS and _axis(hold) == 0:
            parameter[mask] = 0
        elif hold.how == ROWS or isinstance(
            module.get_submodule(name.rpartition(".")[0]), nn.Embedding
        ):
            parameter[:, mask] = 0


@torch.no_grad()
def check(decoder: Decoder, index: int, holds: dict[str, Hold], alive: torch.Tensor) -> None:
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
