"""How a compressed matrix is laid out in a file, both ways: compressed-tensors, GPTQ, bitmask.

Legend: O out features, I in features, G groups per row.

| format | tensors of one linear X |
| --- | --- |
| compressed-tensors | X.weight_packed int32 [O, ceil(I * bits / 32)], X.weight_scale [O, G], |
|                    | X.weight_shape int64 [2]; asymmetric: X.weight_zero_point int32, along O |
| gptq               | X.qweight int32 [I * bits / 32, O], X.qzeros int32 [G, O * bits / 32], |
|                    | X.scales float16 [G, O], X.g_idx int32 [I] |
| bitmask            | a pruned matrix without its zeros: bitmask.py |

The words of both hold a plain little-endian bit stream, in which values of 3, 5, 6 and 7 bits
straddle words. Before its version 0.19 the compressed-tensors library packed 32 // bits values into
a word and left the rest of it zero, so that 3 bits took 3.2: such files are read, none are written.
GPTQ's version 1 stores zero - 1; an asymmetric zero of 0 does not fit there, so asymmetric results
are written as version 2, which stores the zero itself.
"""

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
import torch

from harness.checkpoint import bitmask, packed, quantconfig
from harness.errors import UserError
from harness.quant.grid import Grid, QuantizedWeight

PACKED = ("compressed-tensors", "gptq")
FORMATS = (*PACKED, "dense")
# Of a matrix's rounding error, what groups of too small a scale may add to it.
LOST = 0.1
PRUNED_FORMATS = ("dense", "bitmask")
GPTQ_BITS = (2, 3, 4, 8)


def scale_dtype(layout: str, stored: torch.dtype) -> torch.dtype:
    """The dtype in which ``layout`` stores scales of a checkpoint in ``stored``: GPTQ kernels read
    float16 only."""
    return torch.float16 if layout == "gptq" else stored


def check(layout: str, grid: Grid, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise :class:`UserError` when ``layout`` cannot hold these [O, I] matrices on this grid."""
    if layout != "gptq":
        return
    if grid.bits not in GPTQ_BITS:
        raise UserError(
            f"the gptq format holds 2, 3, 4 or 8 bits, not {grid.bits}; "
            "use --format compressed-tensors or dense."
        )
    for name, (rows, columns) in shapes.items():
        if rows * grid.bits % 32 or columns * grid.bits % 32:
            raise UserError(
                f"the gptq format needs sizes whose {grid.bits}-bit values fill 32-bit words; "
                f"{name} is {rows} x {columns}. Use --format compressed-tensors or dense."
            )


def split_names(names: Iterable[str], layout: str) -> tuple[set[str], set[str]]:
    """The linears packed in ``layout``, and the tensors that are no part of any of them."""
    names = set(names)
    linears = packed.linears_of(names, layout)
    plain = {n for n in names if n.rpartition(".")[0] not in linears or n.endswith(".bias")}
    return linears, plain


def check_scales(name: str, matrix: torch.Tensor, grid: Grid) -> None:
    """Raise :class:`UserError` where float16 does not hold the scales that linear ``name`` [O, I]
    needs: groups of very small weights would be erased, very large ones cut off.

    Groups below float16's smallest ordinary number may be erased as long as what they hold is small
    beside the rounding of the others: rows that are all but zero are nothing rare.
    """
    size = grid.columns_per_group(matrix.shape[1])
    groups = matrix.float().unflatten(1, (-1, size))
    scales = groups.abs().amax(dim=2) / (grid.max_code / (2 if grid.symmetric else 1))
    limits = torch.finfo(torch.float16)
    lost = groups[scales < limits.tiny].square().sum()
    if scales.max() > limits.max or lost > LOST * size * scales.square().sum() / 12:
        raise UserError(
            f"{name} needs scales from {scales.min():.2g} to {scales.max():.2g}, which are stored "
            f"as float16, {limits.tiny:.2g} to {limits.max:.0f}. Use --format compressed-tensors "
            "with a model in bfloat16 or float32, or leave this linear dense with --ignore."
        )


def encode(name: str, weight: QuantizedWeight, layout: str) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU and contiguous, that store linear ``name`` in ``layout``."""
    tensors = _encode_gptq(weight) if layout == "gptq" else _encode_compressed_tensors(weight)
    return {f"{name}.{key}": value.cpu().contiguous() for key, value in tensors.items()}


def parts(
    layout: str, grid: Grid, rows: int, columns: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that :func:`encode` makes of an O x I matrix of a checkpoint
    in ``dtype``."""
    groups = columns // grid.columns_per_group(columns)
    words, zeros = -(-columns * grid.bits // 32), -(-rows * grid.bits // 32)
    scale = scale_dtype(layout, dtype)
    if layout == "gptq":
        return {
            "qweight": ((words, rows), torch.int32),
            "qzeros": ((groups, zeros), torch.int32),
            "scales": ((groups, rows), scale),
            "g_idx": ((columns,), torch.int32),
        }
    made = {
        "weight_packed": ((rows, words), torch.int32),
        "weight_scale": ((rows, groups), scale),
        "weight_shape": ((2,), torch.int64),
    }
    if not grid.symmetric:
        made["weight_zero_point"] = ((zeros, groups), torch.int32)
    return made


def nbytes(layout: str, grid: Grid, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of what :func:`encode` makes of an O x I matrix of a checkpoint in ``dtype``."""
    made = parts(layout, grid, rows, columns, dtype)
    return sum(prod(shape) * kind.itemsize for shape, kind in made.values())


def decode(
    tensors: Mapping[str, torch.Tensor], name: str, layout: str, config: dict
) -> QuantizedWeight:
    """Inverse of :func:`encode`; ``tensors`` are the stored ones by name, ``config`` is the
    checkpoint's ``quantization_config``.

    Raises:
        UserError: they contradict each other.
    """
    if layout == "gptq":
        return _decode_gptq(tensors, name, config)
    return _decode_compressed_tensors(tensors, name, config)


def matrix(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    layout: str,
    config: dict,
    stored: torch.dtype,
    dtype: torch.dtype,
    conv1d: bool,
) -> torch.Tensor:
    """The matrix that linear ``name`` is stored for, as the model's state dict holds it, to compute
    with in ``dtype``.

    Codes times scales are rounded to the dtype ``stored`` of the checkpoint, as a dense one would
    hold them, and so one file gives one model whatever is computed in. transformers does so where
    ``config`` has "dequantize", as ours do; elsewhere it takes the scales to ``dtype`` first.

    ``conv1d``: the model holds [in, out] where packed layouts hold [out, in].
    """
    if layout == "bitmask":
        return bitmask.decode(tensors.__getitem__, name).to(dtype)
    weight = decode(tensors, name, layout, config)
    if layout == "compressed-tensors":
        if not config.get("dequantize"):
            weight.scale = weight.scale.to(dtype)
        stored = weight.scale.dtype
    dense = weight.dequantize(stored).to(dtype)
    return dense.T.contiguous() if conv1d else dense


def _encode_compressed_tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    bits = weight.grid.bits
    tensors = {
        "weight_packed": pack_bits(weight.codes, bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        tensors["weight_zero_point"] = pack_bits(weight.zero.T, bits).T
    return tensors


def _decode_compressed_tensors(tensors, name: str, config: dict) -> QuantizedWeight:
    grid = quantconfig.grid_of(config)
    words, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    groups = _groups(f"{name}.weight_scale", scale, rows, columns, grid)
    if rows != words.shape[0]:
        raise UserError(
            f"{name}.weight_shape says {rows} x {columns}, {name}.weight_packed has "
            f"{words.shape[0]} rows. The checkpoint is damaged, get another copy."
        )
    codes = _unpack(words, grid.bits, columns, f"{name}.weight_packed")
    middle = 2 ** (grid.bits - 1)
    if grid.symmetric:
        zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    else:
        stored = f"{name}.weight_zero_point"
        if tensors[stored].dtype == torch.int8:  # before its version 0.9 the library packed none
            zero = (tensors[stored].int() + middle).to(torch.uint8)
        else:
            zero = _unpack(tensors[stored].T, grid.bits, rows, stored).T
        if tuple(zero.shape) != (rows, groups) or zero.max() > grid.max_code:
            raise UserError(
                f"{stored} holds {list(zero.shape)} values up to {zero.max()}; expected "
                f"{[rows, groups]} of {grid.bits} bits. The checkpoint is damaged."
            )
    order = _order(tensors, f"{name}.weight_g_idx", columns, grid)
    return QuantizedWeight(codes, scale, zero, grid, order)


def _groups(name: str, scale: torch.Tensor, rows: int, columns: int, grid: Grid) -> int:
    """Groups per row, where scale [O, G] fits an O x I matrix on ``grid``."""
    size = max(grid.columns_per_group(columns), 1)
    if columns < 1 or columns % size or tuple(scale.shape) != (rows, columns // size):
        raise UserError(
            f"{name} has shape {list(scale.shape)}, which is not that of a {rows} x {columns} "
            f"matrix in groups of {grid.group_size}. Config and files do not belong together."
        )
    return columns // size


def _order(tensors, name: str, columns: int, grid: Grid) -> torch.Tensor | None:
    """The group of each column [I] where the file says one that is out of order."""
    if name not in tensors:
        return None
    found, size = tensors[name].long(), grid.columns_per_group(columns)
    if (found == -1).all() or torch.equal(found, torch.arange(columns) // size):
        return None
    if found.shape != (columns,) or found.min() < 0 or found.max() >= columns // size:
        raise UserError(
            f"{name} names groups {found.min()} to {found.max()} for {len(found)} columns; there "
            f"are {columns // size} for {columns}. The checkpoint is damaged, get another copy."
        )
    return found


def _unpack(words: torch.Tensor, bits: int, columns: int, name: str) -> torch.Tensor:
    """Codes uint8 [R, columns] from int32 [R, W], of either packing of compressed-tensors.

    The number of words tells them apart, but for a few narrow matrices: there those are of the new
    packing whose bits behind the last value are zero.
    """
    per_word = 32 // bits
    old, new = -(-columns // per_word), -(-columns * bits // 32)
    if words.shape[1] not in (old, new):
        raise UserError(
            f"{name} has {words.shape[1]} words a row; {columns} values of {bits} bits take {new} "
            f"(before compressed-tensors 0.19 {old}). The checkpoint is damaged, get another copy."
        )
    array = np.ascontiguousarray(words.numpy()).view(np.uint32)
    behind = columns * bits - 32 * (new - 1)
    if words.shape[1] == new and (old != new or behind == 32 or not (array[:, -1] >> behind).any()):
        return unpack_bits(words, bits)[:, :columns].contiguous()
    if bits * per_word < 32 and (array >> np.uint32(bits * per_word)).any():
        raise UserError(
            f"{name} holds values wider than the {bits} bits that quantization_config says. Config "
            "and files do not belong together."
        )
    steps = np.arange(0, bits * per_word, bits, dtype=np.uint32)
    codes = (array[..., None] >> steps & np.uint32(2**bits - 1)).astype(np.uint8)
    return torch.from_numpy(codes.reshape(len(array), -1)[:, :columns].copy())


def _encode_gptq(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """GPTQ's. Its caller has made sure that float16 holds the scales: :func:`check_scales`."""
    columns = weight.codes.shape[1]
    size = weight.grid.columns_per_group(columns)
    stored_zero = weight.zero - 1 if weight.grid.symmetric else weight.zero
    return {
        "qweight": pack_bits(weight.codes, weight.grid.bits).T,
        "qzeros": pack_bits(stored_zero.T, weight.grid.bits),
        "scales": weight.scale.T.half(),
        "g_idx": (torch.arange(columns) // size).int(),
    }


def _decode_gptq(tensors, name: str, config: dict) -> QuantizedWeight:
    grid = quantconfig.grid_of(config)
    codes = unpack_bits(tensors[f"{name}.qweight"].T, grid.bits)
    scale = tensors[f"{name}.scales"].T
    rows, columns = codes.shape
    groups = _groups(f"{name}.scales", scale, rows, columns, grid)
    zero = unpack_bits(tensors[f"{name}.qzeros"], grid.bits).T[:rows]
    if tuple(zero.shape) != (rows, groups):
        raise UserError(
            f"{name}.qzeros holds zero points for {list(zero.shape)}; expected {[rows, groups]}. "
            "Config and files do not belong together."
        )
    if config.get("checkpoint_format", "gptq") == "gptq":
        zero = (zero + 1) & grid.max_code
    if grid.symmetric and (zero != 2 ** (grid.bits - 1)).any():
        raise UserError(
            f"{name}.qzeros has other zero points than a symmetric grid of {grid.bits} bits: sym "
            "or checkpoint_format in quantization_config is wrong. Restore the config that belongs "
            "to these files."
        )
    order = _order(tensors, f"{name}.g_idx", columns, grid)
    return QuantizedWeight(codes, scale, zero, grid, order)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [R, C] -> int32 [R, ceil(C * bits / 32)], a little-endian bit stream along each
    row; the last word's free bits are zero."""
    array = np.ascontiguousarray(codes.cpu().numpy())
    rows, columns = array.shape
    stream = np.unpackbits(array[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(stream.reshape(rows, -1), axis=1, bitorder="little")
    words = np.zeros((rows, 4 * -(-columns * bits // 32)), np.uint8)
    words[:, : packed.shape[1]] = packed
    return torch.from_numpy(words.view(np.int32))


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_bits`: int32 [R, W] -> uint8 [R, 32 * W // bits], what the free bits
    hold with the rest."""
    array = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    stream = np.unpackbits(array, axis=1, bitorder="little")
    count = stream.shape[1] // bits
    codes = np.packbits(
        stream[:, : count * bits].reshape(len(array), count, bits), axis=-1, bitorder="little"
    )
    return torch.from_numpy(codes[..., 0].copy())
