"""Which linears of a checkpoint are packed, and whether their tensors are what its config says.

From names and shapes alone, before anything is read: a file that contradicts its config is refused,
for it would load without complaint as other numbers.
"""

from collections.abc import Iterable, Mapping
from math import prod

import torch

from harness.checkpoint import layouts
from harness.errors import UserError
from harness.quant.grid import Grid
from harness.quant.scheme import Scheme


def linears_of(names: Iterable[str], layout: str) -> set[str]:
    """The linears that ``names``, of a checkpoint's tensors, hold packed in ``layout``."""
    mark = layouts.of(layout).MARK if layout in layouts.LAYOUTS else None
    return {n.removesuffix(f".{mark}") for n in names if mark and n.endswith(f".{mark}")}


def split_names(names: Iterable[str], layout: str) -> tuple[set[str], set[str]]:
    """The linears packed in ``layout``, and the tensors that are no part of any of them."""
    names = set(names)
    linears = linears_of(names, layout)
    plain = {n for n in names if n.rpartition(".")[0] not in linears or n.endswith(".bias")}
    return linears, plain


def tensors_of(linear: str, names: Iterable[str], layout: str) -> list[str]:
    """The tensors among ``names`` that store the matrix of a packed linear."""
    kind = layouts.of(layout)
    parts = {kind.MARK, *kind.NEEDED, *kind.OPTIONAL} - {"bias"}
    return [f"{linear}.{part}" for part in sorted(parts) if f"{linear}.{part}" in names]


def nbytes(layout: str, grid: Grid, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of an O x I matrix of a checkpoint in ``dtype`` in a layout that holds codes."""
    parts = layouts.of(layout).parts(grid, rows, columns, dtype)
    return sum(prod(shape) * kind.itemsize for shape, kind in parts.values())


def check(shapes: Mapping[str, tuple[int, ...]], layout: str, scheme: Scheme | None) -> None:
    """Raise :class:`UserError` unless every packed linear has the tensors of ``layout``, no others,
    and they have the sizes of its grid.

    ``shapes``: of all tensors of a checkpoint, by the names in its files.
    """
    kind = layouts.of(layout)
    beside: dict[str, set[str]] = {linear: set() for linear in linears_of(shapes, layout)}
    marks = layouts.marks()
    for name in shapes:
        linear, _, part = name.rpartition(".")
        if linear in beside:
            beside[linear].add(part)
        elif kind.MARK is None and part in marks:
            raise UserError(
                f"{name} is a packed tensor, and config.json has no quantization_config that tells "
                "how to read it; restore it, or get the dense checkpoint."
            )
    if kind.HOLDS == "codes" and not beside:
        raise UserError(
            f"config.json tells of {layout}, and no tensor ends in .{kind.MARK}; config and "
            "files do not belong together."
        )
    for linear, parts in sorted(beside.items()):
        missing = kind.NEEDED - parts
        strange = parts - kind.NEEDED - kind.OPTIONAL - {kind.MARK}
        if missing:
            raise UserError(f"{linear} lacks {min(missing)}; the checkpoint is incomplete.")
        if strange:
            raise UserError(
                f"{linear}.{min(strange)} stands beside a linear packed as {layout}, which has no "
                "such tensor; it cannot be read here, get the dense checkpoint."
            )
        grid = None if scheme is None else scheme.of(linear)
        if scheme is not None and grid is None:
            raise UserError(
                f"{linear} is packed, and quantization_config has no group that means it; restore "
                "the config that belongs to these files."
            )
        kind.check(linear, {p: shapes[f"{linear}.{p}"] for p in parts}, grid)
