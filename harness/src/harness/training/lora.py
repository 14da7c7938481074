"""LoRA on a causal language model while it is trained, and the plain model of its sizes afterwards.

Hu et al. 2021, arXiv 2106.09685; the adapters are peft's.
"""

import logging

import torch
from transformers.pytorch_utils import Conv1D

from harness import distributed, precision
from harness.errors import UserError, nearest
from harness.training import loop


def add(model, targets: list[str] | None = None, *, r: int, alpha: int, dropout: float, seed: int):
    """A peft model around ``model``: LoRA beside some linears, the rest frozen. A is drawn with
    ``seed``, B is zero: what the model computes does not change yet.

    Args:
        targets: the linears' full names (default: those that peft chooses for the family, query and
            value in most).
    """
    adapted = _adapted(model, targets, r, alpha, dropout, seed)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    distributed.say(f"LoRA: {trained / 1e6:.2f} M parameters are trained")
    return adapted


def merged(model, tensors: dict[str, torch.Tensor], dtype: torch.dtype, targets=None, **options):
    """The plain model of what :func:`add` (with ``targets`` and ``options``) had trained: ``model``
    (float32) with ``tensors``, by name, put in and merged; summed in float32, rounded to ``dtype``
    once."""
    adapted = loop.put_in(_adapted(model, targets, **options), tensors)
    return precision.cast(adapted.merge_and_unload(), dtype)


def _adapted(model, targets: list[str] | None, r: int, alpha: int, dropout: float, seed: int):
    # peft imports bitsandbytes where it is installed, which warns of a kernel nobody here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    usual = None if model.config.model_type in KNOWN else "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout,
        target_modules=targets or usual,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    torch.manual_seed(seed)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


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
