"""The zeros of a pruned model: told from chance, and kept by whatever trains or rounds it on."""

import torch
from torch import Tensor, nn

from harness import distributed
from harness.errors import UserError

# A matrix is taken for a pruned one from this share of exact zeros on.
SPARSE_FROM = 0.05


def of_pruned(weight: Tensor) -> Tensor | None:
    """Where a matrix of any shape is zero, bool, if it was pruned; None if not. One that is zero
    everywhere is about to be trained from there, as LoRA's."""
    zeros = weight == 0
    return zeros if SPARSE_FROM <= zeros.float().mean() < 1 else None


@torch.no_grad()
def find(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> where it is zero, for the pruned matrices of ``model`` outside its
    embeddings, trained or not."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    masks = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and name.rpartition(".")[2] == "weight"
        if is_matrix and parameter.is_floating_point() and id(parameter) not in tables:
            zeros = of_pruned(parameter.detach())
            if zeros is not None:
                masks[name] = zeros
    return masks


def keep(model: nn.Module) -> None:
    """Have training leave the zeros of pruned matrices as they are: their gradients are zero from
    now on, and so are Adam's moments; weight decay leaves a zero a zero."""
    parameters = dict(model.named_parameters())
    masks = {n: m for n, m in find(model).items() if parameters[n].requires_grad}
    if not masks:
        return
    for name, zeros in masks.items():
        parameters[name].register_hook(lambda g, zeros=zeros: g.masked_fill(zeros.to(g.device), 0))
    distributed.say_once("this model was pruned: its zeros stay zeros in training")


def ask_before_merging(model: nn.Module, named: str, fill: bool, instead: str) -> None:
    """Before LoRA is added to ``model``, which merging it would fill.

    Raises:
        UserError: it is a pruned one, and ``fill`` does not say that it may. ``instead``: the
            flags that train all weights.
    """
    masks = find(model)
    if not masks:
        return
    if fill:
        distributed.say(f"{len(masks)} pruned matrices are filled by LoRA (--densify)")
        return
    raise UserError(
        f"{named} is sparse ({len(masks)} of its matrices are), and merging LoRA would fill the "
        f"zeros; {instead}: training all weights keeps them; or add --densify to fill them "
        "knowingly."
    )
