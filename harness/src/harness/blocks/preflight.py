"""What can be refused, or has to be said, before any work is done."""

from pathlib import Path

import torch

from harness.blocks.decoder import Decoder
from harness.checkpoint import layouts
from harness.checkpoint.layouts.packing import check_scales_fit
from harness.modules import IGNORED, get_matrix, linears, turn
from harness.quant.grid import check_group_size
from harness.quant.scheme import Scheme


def check(decoder: Decoder, scheme: Scheme | None, layout: str, out: Path) -> None:
    """Raise :class:`UserError` where the model's sizes do not fit ``scheme`` or ``layout``."""
    if scheme is None:
        return
    names, shapes, columns, left = [], {}, {grid: {} for grid in scheme.grids}, False
    for index, block in enumerate(decoder.blocks):
        for name, module in linears(block).items():
            full, shape = f"{decoder.prefix}.{index}.{name}", tuple(get_matrix(module).shape)
            grid = scheme.of(full)
            names.append(full)
            left |= grid is None
            if grid is not None:
                shapes[full] = shape
                columns[grid][name] = shape[1]
    scheme.check(names)
    for grid, of_linears in columns.items():
        check_group_size(of_linears, grid)
    some_left = any(hasattr(m, IGNORED) for m in decoder.blocks.modules()) or left
    layouts.of(layout).refuse(scheme, shapes, some_left)


def check_scales(decoder: Decoder, scheme: Scheme | None, layout: str) -> None:
    """Refuse weights whose scales float16 does not hold, where it stores them: in the gptq layout,
    and of a float16 model. Reads every block."""
    dtype = layouts.of(layout).scale_dtype(decoder.stored_dtype)
    if scheme is None or dtype != torch.float16:
        return
    for index, block in enumerate(decoder.blocks):
        for name, module in linears(block).items():
            full = f"{decoder.prefix}.{index}.{name}"
            grid = scheme.of(full)
            if grid is not None:
                check_scales_fit(full, turn(module, decoder.stored(f"{full}.weight")), grid)


def what_stays(decoder: Decoder) -> str:
    """The blocks' matrices that are no linear layers, which no layer-wise method changes: mixtures
    of experts keep most of their weights in such. "" where there are none."""
    counts, total = {}, 0
    for block in decoder.blocks:
        inside = {f"{n}.weight" for n, m in block.named_modules() if hasattr(m, IGNORED)}
        inside |= {f"{name}.weight" for name in linears(block)}
        for name, parameter in block.named_parameters():
            total += parameter.numel()
            if parameter.ndim > 1 and name not in inside:
                counts[name] = counts.get(name, 0) + parameter.numel()
    if not counts:
        return ""
    share = sum(counts.values()) / total
    return f"left as they are, no linear layers: {', '.join(counts)} ({share:.0%} of the blocks)"
