"""Scores of all groups of a cut: the rows and columns that belong to them, and one pass over the
model.

Legend: G groups, n members of a group in one matrix.
"""

import torch
from torch import nn

from harness.blocks.decoder import Decoder
from harness.blocks.gradients import backward
from harness.blocks.residual import COLUMNS
from harness.progress import track
from sparse.structured import groups, hidden_channels
from sparse.structured.importance import group_scores, line_scores, needs_squares
from sparse.structured.levels import HIDDEN, Cut, part

# (parameter, rows or columns, part, members [G, n])
Line = tuple[str, int, str, torch.Tensor]


def lines(cut: Cut, index: int | None) -> list[Line]:
    """What of block ``index`` (None: of what lies outside the blocks) belongs to groups."""
    result = []
    for some in cut.chosen.get(index, []):
        name = part(index, some)
        result += [(f"{feeder}.weight", 0, name, rows) for feeder, rows in some.rows.items()]
        result.append((f"{some.reader}.weight", 1, name, some.columns))
    holds = cut.holds.get(index, {})
    if holds:
        members = torch.arange(len(cut.alive[HIDDEN]))[:, None]
        for name, hold in holds.items():
            if not name.endswith(".bias"):
                result.append((name, int(hold.how == COLUMNS), HIDDEN, members))
    return result


# One pass, in its order.
def score(  # noqa: C901
    decoder: Decoder,
    cut: Cut,
    windows: torch.Tensor | None,
    pruner: str,
    taylor: str,
    strategy: str,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Scores [G] float32 of every part of ``cut``, with its dead groups at zero.

    Args:
        windows: token ids [N, T] for "taylor".
        pruner, taylor, strategy: see :mod:`sparse.structured.importance`.
        seed: of "random".
    """
    if pruner == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(len(m), generator=generator) for name, m in cut.alive.items()}
    by_part: dict[str, list] = {name: [] for name in cut.alive}

    def prepare(index: int | None, module: nn.Module) -> None:
        for some, alive in cut.masks(index):
            groups.zero(module, some, alive)
        if index in cut.holds:
            hidden_channels.zero(module, cut.holds[index], cut.alive[HIDDEN])

    def add(index: int | None, module: nn.Module, gradients: dict) -> None:
        for name, dim, where, members in lines(cut, index):
            parts = (_matrix(module, name, t) for t in gradients[name])
            weight, gradient, squares = parts
            scores = line_scores(weight, dim, pruner, taylor, gradient, squares)
            by_part[where].append((scores.cpu(), members))

    def names(index: int | None) -> list[str]:
        return [line[0] for line in lines(cut, index)]

    if pruner == "taylor":
        squares = needs_squares(taylor)
        for index, gradients in backward(decoder, windows, names, squares=squares, prepare=prepare):
            add(index, decoder.model if index is None else decoder.blocks[index], gradients)
    else:
        for index in track(range(len(decoder)), "scores", len(decoder)):
            if names(index):
                block = decoder.load(index)
                add(index, block, {n: (block.get_parameter(n), None, None) for n in names(index)})
                decoder.release(index)
        if names(None):
            outer = decoder.outer_tensors()
            add(None, decoder.model, {n: (outer[n], None, None) for n in names(None)})
    # As the original has it; the ranking within a part is the same.
    strategy = "mean" if strategy == "sum" and pruner in ("l1", "l2") else strategy
    return {name: group_scores(each, strategy) for name, each in by_part.items()}


def _matrix(module: nn.Module, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor``, a parameter of ``module`` or its gradient, as [out, in]."""
    if tensor is not None and groups.is_turned(module.get_submodule(name.rpartition(".")[0])):
        return tensor.T
    return tensor
