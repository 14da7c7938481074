"""The residual stream of a model: which parameters hold it, and how, whatever the family.

Found by running a block, and what lies outside the blocks, once on one token: what reads the stream
is fed by a norm on it or by the stream itself; what writes to it is what the block adds where all
other linears give zeros.

Legend: D hidden channels, those of the stream.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.blocks.decoder import Decoder
from harness.blocks.graph import Watch, offset_of, same
from harness.errors import UserError
from harness.modules import linears

# How a parameter holds the stream: as columns, as rows, or as the gain or shift of a norm on it.
COLUMNS, ROWS, GAIN, SHIFT = "columns", "rows", "gain", "shift"


@dataclass(frozen=True)
class Hold:
    """How a parameter holds the stream.

    Attributes:
        how: one of the four above. turned: it is stored [in, out].
        norm: the module whose gain its columns are multiplied by, or whose gain or shift it is.
        offset: that norm multiplies by offset + gain. centred: it subtracts the mean.
    """

    how: str
    turned: bool = False
    norm: str | None = None
    offset: float = 0.0
    centred: bool = False


@torch.no_grad()
def of_block(decoder: Decoder, index: int) -> dict[str, Hold]:
    """Parameter name within block ``index`` of a float32 ``decoder`` -> Hold; loads and releases
    the block.

    Raises:
        UserError: a matrix of it belongs to no linear layer (fused experts); the end of a line.
    """
    decoder.embed(torch.zeros(1, 1, dtype=torch.long))
    block = decoder.load(index)
    width = decoder.config.get_text_config().hidden_size
    hidden = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(index))
    hidden = hidden.to(decoder.device)
    watch = Watch({n: m for n, m in block.named_modules() if n}, width)
    decoder.forward(index, hidden)
    watch.close()
    holds = _readers(watch, hidden)
    of_linears = linears(block)
    for name, module in of_linears.items():
        if f"{name}.weight" not in holds and _writes(decoder, index, hidden, of_linears, name):
            holds |= _writer(name, module)
    decoder.release(index)
    for name, parameter in block.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim > 1 and owner not in of_linears:
            raise UserError(f"{name} belongs to no linear layer")
        if parameter.shape == (width,) and name not in holds and owner not in of_linears:
            holds[name] = Hold(GAIN if name.endswith("weight") else SHIFT)
    return holds


@torch.no_grad()
def of_model(decoder: Decoder) -> dict[str, Hold]:
    """The same, by full name, for what lies outside the blocks."""
    start = f"{decoder.prefix}."
    modules = {n: m for n, m in decoder.model.named_modules() if n and not n.startswith(start)}
    ids = torch.zeros(1, 1, dtype=torch.long)
    hidden = torch.randn_like(decoder.embed(ids))
    width = hidden.shape[-1]
    watch = Watch(modules, width)
    decoder.embed(ids)
    decoder.logits(ids, hidden)
    watch.close()
    holds = _readers(watch, hidden)
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == width:
            holds[f"{name}.weight"] = Hold(COLUMNS)
        elif name in watch.linears and name in watch.written and f"{name}.weight" not in holds:
            holds |= _writer(name, module) if watch.written[name].shape[-1] == width else {}
    for name, norm in watch.norms.items():
        if not isinstance(norm, nn.Embedding):
            for leaf, how in (("weight", GAIN), ("bias", SHIFT)):
                if getattr(norm, leaf, None) is not None:
                    holds.setdefault(f"{name}.{leaf}", Hold(how))
    return holds


def one_of_each_shape(decoder: Decoder) -> dict[int, list[int]]:
    """The first block of each shape -> all that are like it."""
    alike: dict[tuple, list[int]] = {}
    for index, block in enumerate(decoder.blocks):
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        alike.setdefault((type(block), shapes), []).append(index)
    return {members[0]: members for members in alike.values()}


def _readers(watch: Watch, hidden: torch.Tensor) -> dict[str, Hold]:
    """The linears that read the stream, and the norms between."""
    holds: dict[str, Hold] = {}
    width = hidden.shape[-1]
    for name, module in watch.linears.items():
        if name not in watch.read or watch.read[name].shape[-1] != width:
            continue
        turned, norm = isinstance(module, Conv1D), watch.fed_by(name)
        if norm is None:
            if same(hidden, watch.read[name]):
                holds[f"{name}.weight"] = Hold(COLUMNS, turned)
            continue
        of_norm = watch.norms[norm]
        how = (norm, offset_of(of_norm), _is_centred(of_norm, width))
        holds[f"{name}.weight"] = Hold(COLUMNS, turned, *how)
        holds[f"{norm}.weight"] = Hold(GAIN, False, *how)
        if getattr(of_norm, "bias", None) is not None:
            holds[f"{norm}.bias"] = Hold(SHIFT, False, *how)
    return holds


def _writer(name: str, module: nn.Module) -> dict[str, Hold]:
    holds = {f"{name}.weight": Hold(ROWS, isinstance(module, Conv1D))}
    return holds if module.bias is None else holds | {f"{name}.bias": Hold(ROWS)}


def _writes(decoder: Decoder, index: int, hidden, of_linears, name: str) -> bool:
    """Whether what linear ``name`` gives is added to the stream as it is: with all other linears at
    zero, it is what the block adds."""
    value = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)

    def in_place_of(other):
        def hook(_, args, output):
            if other != name:
                return torch.zeros_like(output)
            return value.reshape(output.shape) if output.numel() == value.numel() else None

        return hook

    hooks = [m.register_forward_hook(in_place_of(n)) for n, m in of_linears.items()]
    try:
        added = decoder.forward(index, hidden) - hidden
    finally:
        for hook in hooks:
            hook.remove()
    return torch.allclose(added, value, rtol=1e-4, atol=1e-4)


def _is_centred(norm: nn.Module, width: int) -> bool:
    x = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0)).to(norm.weight)
    return torch.allclose(norm(x + 1), norm(x), rtol=1e-3, atol=1e-3)
