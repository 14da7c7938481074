"""The student: the dense model with its blocks' linears computing with quantized weights."""

from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitdistiller import result
from harness.errors import UserError, nearest
from harness.modules import block_linears, find_blocks, get_matrix
from harness.quant.fake_quant import FakeQuantLinear
from harness.quant.grid import Grid, QuantizedWeight, check_group_size

LEARN = ("weights", "scales", "all")

Ranges = dict[str, tuple[torch.Tensor, torch.Tensor]]


def build(
    model: nn.Module,
    grid: Grid,
    *,
    ranges: Ranges | None = None,
    learn: str = "weights",
    dtype: torch.dtype | None = None,
    start: Path | None = None,
) -> nn.Module:
    """Make ``model``, a dense causal LM, the student, in place, and return it.

    Every linear of the decoder blocks becomes a :class:`FakeQuantLinear`; ``requires_grad`` is set
    on what will be trained. Outside the linears that is norms and biases, with ``learn`` "weights"
    and "all"; embeddings, head and what else is no linear (fused experts) stay as they are.

    Args:
        ranges: full name of every linear -> (low, high), each [O, G], to which its weights are
            clamped first.
        learn: "weights": on the min-max grid of each group at every forward; "all": weights, scales
            and zero points; "scales": scales alone (the end-to-end stage of EfficientQAT, section
            3.3).
        dtype: of the quantized values and their scales (default: the model's).
        start: a result folder with grid.safetensors, made from this model, whose values, scales and
            zero points begin instead of the model's.

    Raises:
        UserError: the group size divides not all linears, ranges or start do not fit the model, or
            the choices exclude one another.
    """
    check(model, grid, ranges=ranges, learn=learn, start=start)
    begun = {} if start is None else _begin(model, Path(start))
    linears = block_linears(*find_blocks(model))
    put_in(model, linears, grid, ranges=ranges, learn=learn, dtype=dtype, begun=begun)
    _mark(model, learn)
    return model


def check(
    model: nn.Module,
    grid: Grid,
    *,
    ranges: Ranges | None = None,
    learn: str = "weights",
    start: Path | None = None,
) -> None:
    """Refuse what :func:`build` cannot make of ``model``, which may be on the meta device: only the
    shapes of its linears are looked at. Arguments and errors are those of :func:`build`."""
    _check_choices(grid, ranges, learn, start)
    linears = block_linears(*find_blocks(model))
    shapes = {name: tuple(get_matrix(module).shape) for name, module in linears.items()}
    check_group_size({name: columns for name, (_, columns) in shapes.items()}, grid)
    if ranges is not None:
        _check_ranges(shapes, ranges, grid)
    if start is not None:
        _check_start(shapes, grid, result.Grids(Path(start)))


def put_in(
    model: nn.Module,
    found: dict[str, nn.Module],
    grid: Grid,
    *,
    ranges: Ranges | None = None,
    learn: str = "weights",
    dtype: torch.dtype | None = None,
    begun: dict[str, QuantizedWeight] | None = None,
) -> dict[str, FakeQuantLinear]:
    """Put a :class:`FakeQuantLinear` in the place of each of the linears ``found`` in ``model``;
    they are returned by the same names. Arguments as for :func:`build`; what :func:`check` refuses
    must not come here."""
    if ranges is not None:
        _clamp(found, ranges, grid)
    placed = {}
    for name, module in found.items():
        placed[name] = FakeQuantLinear(
            module, grid, transposed=isinstance(module, Conv1D), learn=learn, dtype=dtype,
            start=(begun or {}).get(name),
        )  # fmt: skip
        model.set_submodule(name, placed[name])
    return placed


def beside_the_grids(student: nn.Module) -> list[str]:
    """What is trained and no quantized weight or grid of one: norms and biases, by name."""
    grids = {
        f"{name}.{part}"
        for name, module in student.named_modules()
        if isinstance(module, FakeQuantLinear)
        for part in ("weight", "scale", "zero")
    }
    return [n for n, p in student.named_parameters() if p.requires_grad and n not in grids]


def share(student: nn.Module, teacher: nn.Module) -> None:
    """Let the student's frozen parameters be the teacher's tensors, where the two are equal: what
    both hold (embeddings, head) is in memory once."""
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        other = theirs.get(name)
        if parameter.requires_grad or other is None or parameter.dtype != other.dtype:
            continue
        if torch.equal(parameter, other):
            parameter.data = other.data


def _check_choices(grid, ranges, learn: str, start) -> None:
    if learn not in LEARN:
        raise UserError(f"learn {learn}: expected {', '.join(LEARN)}.{nearest(learn, LEARN)}")
    if learn != "weights" and not isinstance(grid, Grid):
        raise UserError("normal-float grids have no scales to learn; train the weights alone.")
    if start is not None and ranges is not None:
        raise UserError("a result to start from has its grids; give it without clip ranges.")
    if start is not None and learn == "weights":
        raise UserError(
            "the grids of a result to start from would be lost, as weights alone find theirs "
            "afresh; learn scales or all."
        )


def _check_ranges(shapes: dict[str, tuple[int, int]], ranges: Ranges, grid) -> None:
    for name, (rows, columns) in shapes.items():
        if name not in ranges:
            raise UserError(f"the clip ranges lack {name}; they belong to another model.")
        low, high = ranges[name]
        wanted = (rows, columns // grid.columns_per_group(columns))
        if low.shape != wanted or high.shape != wanted:
            raise UserError(
                f"the clip ranges of {name} have shape {list(low.shape)}; {list(wanted)} is "
                "expected. They belong to another model or group size."
            )
        width = high.float() - low.float()
        if not (width.isfinite() & (width >= 0)).all():
            raise UserError(
                f"the clip ranges of {name} are damaged (not finite, or the low end above the "
                "high one); make them again with python -m bitdistiller.autoclip."
            )


def _check_start(shapes: dict[str, tuple[int, int]], grid, begun: result.Grids) -> None:
    begun.check_codes()
    before = begun.grid
    if before != grid:
        raise UserError(
            f"{begun.folder} has {before.bits} bits in groups of {before.group_size}; asked for "
            f"are {grid.bits} in groups of {grid.group_size}. Give those flags as it has them."
        )
    for name, (rows, columns) in shapes.items():
        scale, _ = begun.read(name)
        if scale.shape != (rows, columns // grid.columns_per_group(columns)):
            raise UserError(f"{begun.folder} was made from another model: {name} differs.")


@torch.no_grad()
def _begin(model: nn.Module, start: Path) -> dict[str, QuantizedWeight]:
    """Codes and grids of a result folder, whose parameters are put into ``model``."""
    other, begun = result.read(start)
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise UserError(f"{start} was made from another model: {name} differs.")
        parameter.copy_(theirs[name])
    return begun


@torch.no_grad()
def _clamp(found: dict[str, nn.Module], ranges: Ranges, grid) -> None:
    for name, module in found.items():
        matrix = get_matrix(module)
        width = grid.columns_per_group(matrix.shape[1])
        low, high = (t.to(matrix)[..., None] for t in ranges[name])
        matrix.copy_(matrix.unflatten(1, (-1, width)).clamp(low, high).flatten(1))


def _mark(model: nn.Module, learn: str) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            module.requires_grad_(learn != "scales")
            if module.scale is not None:
                module.scale.requires_grad_()
    if learn != "scales":
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad or parameter.dim() == 1)
