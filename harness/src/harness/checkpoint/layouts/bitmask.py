"""Pruned matrices without their zeros: one bit per weight says which are there, and then those.

| tensors of a linear X | |
| --- | --- |
| X.weight        | the model's dtype [nonzeros], row by row |
| X.weight_bitmask | uint8 [R, ceil(C / 8)], little-endian bits along each row, 0 in the padding |
| X.weight_shape  | int64 [2]: R, C |

R x C is the matrix as the model's state dict holds it: [out, in], for GPT-2's Conv1D [in, out].
At a share s of zeros it takes 1 - s + 1/16 of the dense bytes in 16 bits: a matrix with fewer zeros
than that gains stays dense. The values keep the name of the matrix on purpose: transformers leaves
names that it does not know aside and fills what it misses with random weights, but stops at a
tensor of the wrong shape.
"""

import numpy as np
import torch

from harness.checkpoint.weight_files import small_int64s
from harness.errors import UserError

HOLDS = "zeros"
MARK, NEEDED, OPTIONAL = "weight_bitmask", {"weight", "weight_shape"}, {"bias"}
KNOWN, MEANINGFUL = "quant_method format", {}
ASKED = False  # it is made so that transformers stops
CONFIG = {"quant_method": "bitmask", "format": "bitmask"}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPE_BYTES = 16


def foreign(config: dict) -> None:
    """No other tool writes it."""


def config(scheme, actorder: bool) -> dict:
    return dict(CONFIG)


def scheme_of(config) -> None:
    """It holds values."""


def refuse(scheme, shapes, some_left: bool) -> None:
    """Any matrix fits."""


def name_targets(config, scheme, packed: set[str], dense: set[str], conv1d: bool) -> None:
    """Its readers ask the tensors."""


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    return stored


def check(linear: str, part, grid) -> None:
    """What its tensors hold is checked as they are read."""


def matrix(tensors, name: str, grid, config, stored, dtype, turned: bool) -> torch.Tensor:
    return decode(tensors.__getitem__, name).to(dtype)


def shape(tensors, name: str, grid) -> tuple[int, int]:
    return small_int64s(tensors[f"{name}.weight_shape"])


def describe(scheme) -> str:
    return "bitmask: a bit per weight and the weights that are not zero"


def readers(scheme, family: str, fault: str | None) -> str:
    return "the harness only (harness convert --format dense makes it readable by all)"


def nbytes(rows: int, columns: int, nonzeros: int, item: int) -> int:
    """Bytes of a matrix in this layout, ``item`` bytes per value."""
    return rows * -(-columns // 8) + nonzeros * item + SHAPE_BYTES


def encode(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, that store the matrix ``weight`` of linear ``name``.

    Zeros of either sign are left out and read back as 0.0; everything else, NaN too, keeps its
    bits. A matrix that would not get smaller is returned as it is.
    """
    weight = weight.detach().cpu().contiguous()
    rows, columns = weight.shape
    bits = weight.view(INTEGERS[weight.itemsize]).numpy()
    present = bits << 1 != 0  # without the sign
    kept = np.flatnonzero(present)
    if nbytes(rows, columns, len(kept), weight.itemsize) >= weight.nbytes:
        return {f"{name}.weight": weight}
    return {
        f"{name}.weight": torch.from_numpy(bits.reshape(-1)[kept]).view(weight.dtype),
        f"{name}.weight_bitmask": torch.from_numpy(np.packbits(present, 1, bitorder="little")),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def decode(read, name: str) -> torch.Tensor:
    """Inverse of :func:`encode` for a matrix it made smaller; ``read(tensor_name)`` returns a
    stored tensor. The dtype is the stored one.

    Raises:
        UserError: the three tensors do not belong together.
    """
    values, mask = read(f"{name}.weight"), read(f"{name}.weight_bitmask")
    shape = read(f"{name}.weight_shape").tolist()
    if len(shape) != 2 or list(mask.shape) != [shape[0], -(-shape[1] // 8)]:
        raise UserError(
            f"{name}.weight_bitmask has shape {list(mask.shape)}, which is not that of a matrix "
            f"{shape}. The checkpoint is damaged, get another copy."
        )
    rows, columns = shape
    present = np.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little")
    kept = np.flatnonzero(present.view(bool))  # four times as fast as on bytes
    if len(kept) != len(values):
        raise UserError(
            f"{name}.weight holds {len(values)} values, its bitmask asks for {len(kept)}. "
            "The checkpoint is damaged, get another copy."
        )
    bits = values.view(INTEGERS[values.itemsize]).numpy()
    dense = np.zeros(rows * columns, bits.dtype)
    dense[kept] = bits
    return torch.from_numpy(dense.reshape(rows, columns)).view(values.dtype)
