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

from harness.blocks import residual
from harness.blocks.decoder import Decoder
from harness.blocks.residual import GAIN, ROWS, SHIFT, Hold
from harness.errors import UserError
from harness.quant.orthogonal import orthogonal

TOKENS = 16
TOLERANCE = 1e-4  # of a block's output, in float32


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
        if hold.how == SHIFT and hold.norm:
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
    holds = residual.of_model(decoder)
    blocks = residual.one_of_each_shape(decoder)
    for index, alike in blocks.items():
        try:
            inside = residual.of_block(decoder, index)
        except UserError as error:
            raise UserError(_refusal(decoder, str(error))) from error
        for other in alike:
            start = f"{decoder.prefix}.{other}."
            holds |= {
                start + name: replace(hold, norm=hold.norm and start + hold.norm)
                for name, hold in inside.items()
            }
    _check_gains(decoder, holds)
    fixes_ones = any(hold.centred for hold in holds.values())
    rotation = Rotation(orthogonal(width, fixes_ones, generator, random), holds)
    _prove(decoder, rotation, ids, hidden, blocks)
    return rotation


def _check_gains(decoder: Decoder, holds: dict[str, Hold]) -> None:
    """A shift is carried through its norm divided by the gain."""
    for name, hold in holds.items():
        if hold.how != SHIFT or hold.norm is None:
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
