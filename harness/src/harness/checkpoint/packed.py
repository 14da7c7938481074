"""Whether the tensors of packed linears are what their quantization_config says they are.

From shapes alone, before anything is read: a file that contradicts its config is refused, for it
would load without complaint as other numbers.
"""

from collections.abc import Mapping

from harness.errors import UserError
from harness.quant.grid import Grid

# What marks a linear X as packed, and the tensors beside it: those it needs, those it may have (all
# names follow "X.").
MARKS = {
    "compressed-tensors": "weight_packed",
    "gptq": "qweight",
    "bitmask": "weight_bitmask",
}
NEEDED = {
    "compressed-tensors": {"weight_scale", "weight_shape"},
    "gptq": {"qzeros", "scales"},
    "bitmask": {"weight", "weight_shape"},
}
OPTIONAL = {
    "compressed-tensors": {"weight_zero_point", "weight_g_idx", "bias"},
    "gptq": {"g_idx", "bias"},
    "bitmask": {"bias"},
}


def linears_of(names, layout: str) -> set[str]:
    """The linears that ``names``, of a checkpoint's tensors, hold packed in ``layout``."""
    mark = MARKS.get(layout)
    return {n.removesuffix(f".{mark}") for n in names if mark and n.endswith(f".{mark}")}


def check(shapes: Mapping[str, tuple[int, ...]], layout: str, grid: Grid | None) -> None:
    """Raise :class:`UserError` unless every packed linear has the tensors of ``layout``, no others,
    and they have the sizes of ``grid``.

    ``shapes``: of all tensors of a checkpoint, by the names in its files.
    """
    packed = linears_of(shapes, layout)
    beside: dict[str, set[str]] = {linear: set() for linear in packed}
    for name in shapes:
        linear, _, part = name.rpartition(".")
        if linear in packed:
            beside[linear].add(part)
        elif layout == "dense" and part in ("weight_packed", "qweight", "weight_bitmask"):
            raise UserError(
                f"{name} is a packed tensor, and config.json has no quantization_config that tells "
                "how to read it; restore it, or get the dense checkpoint."
            )
    if layout != "dense" and not packed and layout != "bitmask":
        raise UserError(
            f"config.json tells of {layout}, and no tensor ends in .{MARKS[layout]}; config and "
            "files do not belong together."
        )
    for linear, parts in sorted(beside.items()):
        missing = NEEDED[layout] - parts
        strange = parts - NEEDED[layout] - OPTIONAL[layout] - {MARKS[layout]}
        if missing:
            raise UserError(f"{linear} lacks {min(missing)}; the checkpoint is incomplete.")
        if strange:
            raise UserError(
                f"{linear}.{min(strange)} stands beside a linear packed as {layout}, which has no "
                "such tensor; it cannot be read here, get the dense checkpoint."
            )
        part = {p: shapes[f"{linear}.{p}"] for p in parts}
        if layout == "gptq":
            _check_gptq(linear, part, grid)
        elif layout == "compressed-tensors":
            _check_compressed_tensors(linear, part, grid)


def _check_gptq(linear: str, part: Mapping[str, tuple[int, ...]], grid: Grid) -> None:
    words, zeros, scales = (_matrix(linear, part, p) for p in ("qweight", "qzeros", "scales"))
    columns, rows = words[0] * 32 // grid.bits, words[1]
    groups = _groups(columns, grid)
    _equal(f"{linear}.scales", scales, (groups, rows), grid)
    _equal(f"{linear}.qzeros", zeros, (groups, -(-rows * grid.bits // 32)), grid)
    if "g_idx" in part:
        _equal(f"{linear}.g_idx", part["g_idx"], (columns,), grid)


def _check_compressed_tensors(linear: str, part: Mapping, grid: Grid) -> None:
    words, scale = (_matrix(linear, part, p) for p in ("weight_packed", "weight_scale"))
    _equal(f"{linear}.weight_shape", part["weight_shape"], (2,), grid)
    if scale[0] != words[0]:
        _equal(f"{linear}.weight_scale", scale, (words[0], scale[1]), grid)
    if grid.group_size == -1:
        _equal(f"{linear}.weight_scale", scale, (words[0], 1), grid)
    if "weight_zero_point" in part:
        zeros = _matrix(linear, part, "weight_zero_point")
        _equal(f"{linear}.weight_zero_point", zeros, (zeros[0], scale[1]), grid)
    if grid.symmetric and "weight_zero_point" in part:
        raise UserError(
            f"{linear}.weight_zero_point is there, and quantization_config says symmetric: true. "
            "One of the two is wrong; restore the config that belongs to these files."
        )
    if not grid.symmetric and "weight_zero_point" not in part:
        raise UserError(
            f"{linear}.weight_zero_point is missing, and quantization_config says symmetric: "
            "false. One of the two is wrong; restore the config that belongs to these files."
        )


def _matrix(linear: str, part: Mapping, name: str) -> tuple[int, int]:
    if len(part[name]) != 2:
        raise UserError(
            f"{linear}.{name} has shape {list(part[name])}; expected two dimensions. The "
            "checkpoint is damaged, get another copy."
        )
    return part[name]


def _groups(columns: int, grid: Grid) -> int:
    return -(-columns // max(grid.columns_per_group(columns), 1))


def _equal(name: str, found: tuple[int, ...], wanted: tuple[int, ...], grid: Grid) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{name} has shape {list(found)}; {grid.bits} bits in groups of {grid.group_size}, as "
            f"quantization_config says, take {list(wanted)}. The two do not belong together."
        )
