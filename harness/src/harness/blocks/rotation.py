"""A rotation Q of the residual stream, R1 of QuaRot (arXiv 2404.00456, section 4) and SpinQuant
(arXiv 2405.16406, section 3.1), as a view of a model: ``Decoder(folder, transform=rotation)``.

    embedding · Q        readers W · diag(gain of the norm before them) · Q
    norms: gain 1        writers Qᵀ · W, their biases · Q

The function stays the same, in the family's own architecture. RMS norms with gain 1 commute with
every Q. Layer norms subtract a mean, and commute where Q leaves the vector of ones alone, which is
asked of each norm itself: norm(x + c) = norm(x). What holds the stream, and how, is found by
running one block of each shape on one token, whatever the family; then each of them, the embedding
and the head are run rotated, and a family whose function would change is refused.

Tensors are turned in float64 and rounded once. Multiply-adds: D for every number of the model.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.blocks.decoder import Decoder
from harness.errors import UserError
from harness.modules import linears
from harness.quant.orthogonal import orthogonal

TOKENS = 16
TOLERANCE = 1e-4  # of a block's output, in float32
# How a parameter holds the stream: as columns, as rows, or as the gain or shift of a norm on it.
COLUMNS, ROWS, GAIN, SHIFT = "columns", "rows", "gain", "shift"


@dataclass(frozen=True)
class Hold:
    """How a parameter holds the stream. turned: it is stored [in, out]. norm: the module whose gain
    goes into it. offset: that norm multiplies by offset + gain."""

    how: str
    turned: bool = False
    norm: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Rotation:
    """A transform of a decoder: q [D, D] float64, orthogonal; holds: model name -> Hold."""

    q: torch.Tensor
    holds: dict[str, Hold]

    @torch.no_grad()
    def __call__(self, name: str, tensor: torch.Tensor, read) -> torch.Tensor:
        hold = self.holds.get(name)
        if hold is None:
            return tensor
        value = tensor.double()
        if hold.how == GAIN:
            return torch.full_like(tensor, 1 - hold.offset)
        if hold.how == SHIFT:
            gain = hold.offset + read(f"{hold.norm}.weight").double()
            return (torch.where(value == 0, 0, value / gain) @ self.q).to(tensor.dtype)
        if hold.turned:
            value = value.T
        if hold.how == ROWS:
            value = self.q.T @ value
        else:
            if hold.norm:
                value = value * (hold.offset + read(f"{hold.norm}.weight").double())
            value = value @ self.q
        return (value.T if hold.turned else value).to(tensor.dtype).contiguous()


@torch.no_grad()
def find(folder: Path, *, seed: int = 0, random: bool = False) -> Rotation:
    """A rotation of the checkpoint ``folder``, drawn with ``seed``, and proved.

    Args:
        random: any orthogonal matrix, in place of a Hadamard matrix with random signs, which is
            taken where there is one of this size.

    Raises:
        UserError: the family's function would not stay the same.
    """
    decoder = Decoder(folder, dtype=torch.float32)
    ids = torch.arange(TOKENS)[None] % decoder.config.get_text_config().vocab_size
    width = decoder.embed(ids).shape[-1]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, TOKENS, width, generator=generator)
    holds, subtracts_mean = _outside(decoder, ids, hidden)
    blocks = _one_of_each_shape(decoder)
    for index, alike in blocks.items():
        inside, subtracts = _inside(decoder, index, width)
        subtracts_mean |= subtracts
        for other in alike:
            start = f"{decoder.prefix}.{other}."
            holds |= {
                start + name: replace(hold, norm=hold.norm and start + hold.norm)
                for name, hold in inside.items()
            }
    _check_gains(decoder, holds)
    rotation = Rotation(orthogonal(width, subtracts_mean, generator, random), holds)
    _prove(decoder, rotation, ids, hidden, blocks)
    return rotation


def _one_of_each_shape(decoder: Decoder) -> dict[int, list[int]]:
    """The first block of each shape -> all that are like it."""
    alike: dict[tuple, list[int]] = {}
    for index, block in enumerate(decoder.blocks):
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        alike.setdefault((type(block), shapes), []).append(index)
    return {members[0]: members for members in alike.values()}


class _Watch:
    """What the norms and linears among ``modules`` are given and give, in one forward."""

    def __init__(self, modules: dict[str, nn.Module], width: int):
        self.linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
        self.norms = {
            name: module
            for name, module in modules.items()
            if name not in self.linears and not list(module.children())
            and getattr(module, "weight", None) is not None
            and module.weight.shape == (width,)
        }  # fmt: skip
        self.read, self.written = {}, {}
        self.hooks = [m.register_forward_hook(self._note(n)) for n, m in modules.items()]

    def _note(self, name: str):
        def hook(_, args, output):
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                self.read[name], self.written[name] = args[0], output

        return hook

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def fed_by(self, linear: str) -> str | None:
        """The norm whose output ``linear`` reads."""
        x = self.read[linear]
        return next((n for n in self.norms if _same(self.written.get(n), x)), None)


def _same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _inside(decoder: Decoder, index: int, width: int) -> tuple[dict[str, Hold], bool]:
    """Parameter name within block ``index`` -> Hold; and whether its norms subtract a mean."""
    decoder.embed(torch.zeros(1, 1, dtype=torch.long))
    block = decoder.load(index)
    hidden = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(index))
    watch = _Watch({n: m for n, m in block.named_modules() if n}, width)
    decoder.forward(index, hidden)
    watch.close()
    holds: dict[str, Hold] = {}
    subtracts = False
    of_linears = linears(block)
    for name, module in of_linears.items():
        turned = isinstance(module, Conv1D)
        if name not in watch.read:
            continue
        norm = watch.fed_by(name)
        if watch.read[name].shape[-1] == width and (norm or _same(hidden, watch.read[name])):
            holds |= _reader(name, turned, norm and watch.norms[norm], norm)
            subtracts |= norm is not None and _subtracts_mean(watch.norms[norm], width)
        elif _writes(decoder, index, hidden, of_linears, name):
            holds[f"{name}.weight"] = Hold(ROWS, turned)
            if module.bias is not None:
                holds[f"{name}.bias"] = Hold(COLUMNS)
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1 and name.removesuffix(".weight") not in of_linears:
            raise UserError(_refusal(decoder, f"{name} belongs to no linear layer"))
    decoder.release(index)
    return holds, subtracts


def _outside(decoder: Decoder, ids, hidden) -> tuple[dict[str, Hold], bool]:
    """The same for what lies outside the blocks."""
    start = f"{decoder.prefix}."
    modules = {n: m for n, m in decoder.model.named_modules() if n and not n.startswith(start)}
    width = hidden.shape[-1]
    watch = _Watch(modules, width)
    decoder.embed(ids)
    decoder.logits(ids, hidden)
    watch.close()
    holds: dict[str, Hold] = {}
    subtracts = False
    for name, module in modules.items():
        turned = isinstance(module, Conv1D)
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == width:
            holds[f"{name}.weight"] = Hold(COLUMNS)
        elif name in watch.linears and name in watch.read:
            norm = watch.fed_by(name)
            if norm or _same(hidden, watch.read[name]):
                holds |= _reader(name, turned, norm and watch.norms[norm], norm)
                subtracts |= norm is not None and _subtracts_mean(watch.norms[norm], width)
            elif watch.written[name].shape[-1] == width:
                holds[f"{name}.weight"] = Hold(ROWS, turned)
                if module.bias is not None:
                    holds[f"{name}.bias"] = Hold(COLUMNS)
    return holds, subtracts


def _reader(name: str, turned: bool, norm: nn.Module | None, norm_name: str | None) -> dict:
    if norm is None:
        return {f"{name}.weight": Hold(COLUMNS, turned)}
    offset = _offset(norm)
    holds = {
        f"{name}.weight": Hold(COLUMNS, turned, norm_name, offset),
        f"{norm_name}.weight": Hold(GAIN, False, norm_name, offset),
    }
    if getattr(norm, "bias", None) is not None:
        holds[f"{norm_name}.bias"] = Hold(SHIFT, False, norm_name, offset)
    return holds


def _writes(decoder: Decoder, index: int, hidden, of_linears, name: str) -> bool:
    """Whether what linear ``name`` gives is added to the stream as it is: with all other linears at
    zero, it is what the block adds."""
    value = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))

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


def _subtracts_mean(norm: nn.Module, width: int) -> bool:
    x = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0))
    x = x.to(norm.weight)
    return torch.allclose(norm(x + 1), norm(x), rtol=1e-3, atol=1e-3)


def _offset(norm: nn.Module) -> float:
    """a, where the norm multiplies by a + weight: 1 for Gemma's, 0 for others."""
    x = torch.linspace(-1, 2, len(norm.weight), device=norm.weight.device)[None, None]
    saved = {name: p.data.clone() for name, p in norm.named_parameters()}
    for parameter in norm.parameters():
        parameter.data.zero_()
    zero = norm(x).norm()
    norm.weight.data.fill_(1)
    one = norm(x).norm()
    for name, parameter in norm.named_parameters():
        parameter.data.copy_(saved[name])
    return float(round((zero / (one - zero)).item()))


def _check_gains(decoder: Decoder, holds: dict[str, Hold]) -> None:
    """A shift is carried through its norm divided by the gain."""
    for name, hold in holds.items():
        if hold.how != SHIFT:
            continue
        gain = hold.offset + decoder.stored(f"{hold.norm}.weight").double()
        if ((gain == 0) & (decoder.stored(name) != 0)).any():
            raise UserError(_refusal(decoder, f"{hold.norm}.weight is zero where it has a bias"))


def _prove(plain: Decoder, rotation: Rotation, ids, hidden, blocks) -> None:
    """Raise :class:`UserError` unless the rotated model computes the same; a model of 16 bits
    without its rounding."""

    def unrounded(name, tensor, read):
        return rotation(name, tensor.float(), read)

    rotated = Decoder(plain.weights.folder, dtype=torch.float32, transform=unrounded)
    q = rotation.q.float()

    def check(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        if not (got - wanted).norm() < TOLERANCE * wanted.norm():
            raise UserError(_refusal(plain, f"{what} would change"))

    check("what its embeddings give", rotated.embed(ids), plain.embed(ids) @ q)
    for index in blocks:
        plain.load(index)
        wanted = plain.forward(index, hidden) - hidden
        plain.release(index)
        rotated.load(index)
        got = rotated.forward(index, hidden @ q) - hidden @ q
        rotated.release(index)
        check(f"what block {index} adds", got, wanted @ q)
    check("its logits", rotated.logits(ids, hidden @ q), plain.logits(ids, hidden))


def _refusal(decoder: Decoder, why: str) -> str:
    return f"{type(decoder.model).__name__} cannot be rotated: {why}; leave the rotation out."
