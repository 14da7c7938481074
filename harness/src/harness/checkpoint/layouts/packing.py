"""What the packed layouts share: bit streams in words of 32 bits, and the groups of columns."""

from collections.abc import Mapping

import numpy as np
import torch

from harness.errors import UserError
from harness.quant.grid import Grid

IN_VLLM = ("llama",)  # the families that the vLLM session serves packed
# Of a matrix's rounding error, what groups of too small a scale may add to it.
LOST = 0.1


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


def groups(name: str, scale: torch.Tensor, rows: int, columns: int, grid: Grid) -> int:
    """Groups per row, where scale [O, G] fits an O x I matrix on ``grid``."""
    size = max(grid.columns_per_group(columns), 1)
    if columns < 1 or columns % size or tuple(scale.shape) != (rows, columns // size):
        raise UserError(
            f"{name} has shape {list(scale.shape)}, which is not that of a {rows} x {columns} "
            f"matrix in groups of {grid.group_size}. Config and files do not belong together."
        )
    return columns // size


def order(tensors, name: str, columns: int, grid: Grid) -> torch.Tensor | None:
    """The group of each column [I] where the file says one that is out of order."""
    if name not in tensors:
        return None
    group, size = tensors[name].long(), grid.columns_per_group(columns)
    if (group == -1).all() or torch.equal(group, torch.arange(columns) // size):
        return None
    if group.shape != (columns,) or group.min() < 0 or group.max() >= columns // size:
        raise UserError(
            f"{name} names groups {group.min()} to {group.max()} for {len(group)} columns; there "
            f"are {columns // size} for {columns}. The checkpoint is damaged, get another copy."
        )
    return group


def sizes(linear: str, part: Mapping, name: str) -> tuple[int, int]:
    """The two sizes of tensor ``name`` of a linear, from ``part``, its shapes by name."""
    if len(part[name]) != 2:
        raise UserError(
            f"{linear}.{name} has shape {list(part[name])}; expected two dimensions. The "
            "checkpoint is damaged, get another copy."
        )
    return part[name]


def group_count(columns: int, grid: Grid) -> int:
    """Groups of a row, the last of which may lack columns."""
    return -(-columns // max(grid.columns_per_group(columns), 1))


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], grid: Grid) -> None:
    """Raise :class:`UserError` unless a tensor has the shape that its grid takes."""
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{name} has shape {list(found)}; {grid.bits} bits in groups of {grid.group_size}, as "
            f"quantization_config says, take {list(wanted)}. The two do not belong together."
        )


def field(config: dict, name: str, kind: type):
    """A field of a quantization_config, an int or a bool.

    Raises:
        UserError: it is missing, or something else.
    """
    value = config.get(name)
    if type(value) is not kind:
        fault = "lacks" if name not in config else f"has {value!r:.40} for"
        wanted = "a whole number" if kind is int else "true or false"
        raise UserError(f"quantization_config {fault} {name}; expected {wanted}.")
    return value


def check_scales_fit(name: str, matrix: torch.Tensor, grid: Grid) -> None:
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


def describe_grids(grids: list[Grid]) -> str:
    """Their bits and groups, for people."""
    told = []
    for grid in grids:
        group = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
        kind = "symmetric" if grid.symmetric else "asymmetric"
        told.append(f"{grid.bits} bits, {group}, {kind}")
    return "; ".join(told)
