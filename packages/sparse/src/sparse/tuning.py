"""What recovery trains, LoRA beside the linears of the blocks or all weights, and what is left of
it at the end: an ordinary model of the same sizes.

LoRA: Hu et al. 2021, arXiv 2106.09685; LLM-Pruner (arXiv 2305.11627, section 3.3) tunes so.
"""

import logging

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness import modules, precision
from harness.errors import UserError, nearest
from harness.modules import find_blocks


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> every linear of the model's blocks."""
    prefix, blocks = find_blocks(model)
    return {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in modules.linears(block).items()
    }


@torch.no_grad()
def zero_share(model: nn.Module) -> float:
    """The share of exact zeros among the weights of the blocks' linears."""
    weights = [module.weight for module in block_linears(model).values()]
    zeros = sum(w.numel() - int(torch.count_nonzero(w)) for w in weights)
    return zeros / sum(w.numel() for w in weights)


def choose_targets(names: list[str], wanted: list[str] | None) -> list[str]:
    """Those of the linears ``names`` that ``wanted`` means by their last parts, or all.

    Raises:
        UserError: one of ``wanted`` means none.
    """
    if wanted is None:
        return names
    for word in wanted:
        if not any(name == word or name.endswith(f".{word}") for name in names):
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f"--lora_target_modules {word}: no linear of the blocks is called so; expected "
                f"some of {', '.join(kinds)}.{nearest(word, kinds)}"
            )
    return [n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)]


def add_lora(
    model: nn.Module, targets: list[str], *, r: int, alpha: int, dropout: float, seed: int
) -> dict[str, nn.Parameter]:
    """Put LoRA beside the linears ``targets`` and freeze the rest; returns what is trained, in
    float32. A is drawn with ``seed``, B is zero: the model's function does not change yet."""
    # peft imports bitsandbytes where it is installed, which warns of a kernel nobody here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, inject_adapter_in_model

    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets,
        fan_in_fan_out=transposed,
    )  # fmt: skip
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model)
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
            trained[name] = parameter
    return trained


def train_all(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight is trained (the model is in float32); tied ones once."""
    return {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}


@torch.no_grad()
def kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> bool mask of what is not zero, for the blocks' linears. With the gradient
    zero elsewhere, and no weight decay, Adam leaves those zeros as they are."""
    return {f"{name}.weight": m.weight != 0 for name, m in block_linears(model).items()}


@torch.no_grad()
def finish(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its LoRA merged, in ``dtype``: sums in float32, rounded once."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            linear = module.get_base_layer()
            delta = module.get_delta_weight("default").float()
            linear.weight.data = (linear.weight.float() + delta).to(dtype)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return precision.cast(model, dtype).eval()
