"""Which tensor of a checkpoint's files is which tensor of the model: transformers' own renaming.

Every reader here asks this one, so that the two ways of reading, transformers' and block by block,
take the same tensors, and what neither has a place for is named.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness import distributed
from harness.checkpoint.weights import Weights
from harness.errors import UserError

NEEDLESS = ("inv_freq", "original_inv_freq", "position_ids", "masked_bias", "causal_mask")


@dataclass(frozen=True)
class Names:
    """How a checkpoint's tensors, by logical name, meet a model's.

    Attributes:
        plain: model name -> the name in the files, for tensors that are stored as they are.
        converted: whether others are made of several stored ones (fused experts) or turned, which
            is transformers' to do.
        extra: names in the files that the model has no place for.
        tied: model names that share another's storage.
    """

    plain: dict[str, str]
    converted: bool
    extra: list[str]
    tied: dict[str, str]


def match(model: nn.Module, weights: Weights) -> Names:
    """The names of ``weights``, read as those of ``model``, a transformers model on any device;
    tensors that the model has no place for are named in one line.

    Raises:
        UserError: a tensor is missing, has another shape or no floating values, or is there twice.
    """
    state = model.state_dict()
    plain, converted, extra = _rename(model, state, weights)
    tied = _tied(model, plain, weights)
    if not converted:
        _check_missing(model, plain, tied, weights)
    for name, stored in plain.items():
        check_shape(name, weights.shape(stored), state[name].shape)
        if state[name].is_floating_point() and not weights.is_float(stored):
            raise UserError(
                f"{stored} in {weights.folder} holds no floating values of 16 or 32 bits, and "
                "config.json tells no quantization that it is of; get the dense checkpoint."
            )
    _say_extra(extra, weights.folder)
    return Names(plain, converted, extra, tied)


def _rename(model, state, weights: Weights) -> tuple[dict[str, str], bool, list[str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    base = model.base_model_prefix
    plain: dict[str, str] = {}
    converted, extra = False, []
    # In the library's order: some of its rules hold once another has been met.
    for stored in sorted(weights.names, key=dot_natural_key):
        name, converter = rename_source_key(stored, renamings, converters, base, state)
        if name not in state and stored in state:
            name, converter = rename_source_key(stored, [], [], base, state)
        if name not in state:
            extra += [] if _is_needless(stored, weights) else [stored]
        elif converter is not None:
            converted = True
        elif name in plain:
            raise UserError(
                f"{weights.folder} holds {name} twice, as {plain[name]} and as {stored}; remove "
                "the one that is not meant."
            )
        else:
            plain[name] = stored
    return plain, converted, extra


def _tied(model, plain: dict[str, str], weights: Weights) -> dict[str, str]:
    """Model names that share another's storage -> that one's name. As in transformers the one that
    is stored stands for both, and two that differ are not tied, whatever the config says."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, source in list(tied.items()):
        if name in plain and source not in plain:
            plain[source] = plain.pop(name)
        elif name in plain and not torch.equal(
            weights.read(plain[name]), weights.read(plain[source])
        ):
            del tied[name]
    return tied


def _check_missing(model, plain, tied, weights: Weights) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in plain
        and name not in tied
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    refuse_missing(missing, weights.folder)


def refuse_missing(missing: Collection[str], folder: Path) -> None:
    """Raise :class:`UserError` where there are any."""
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors that config.json asks for, {min(missing)} "
            "among them; the checkpoint is incomplete."
        )


def check_shape(name: str, stored: tuple[int, ...] | None, wanted: tuple[int, ...]) -> None:
    """Raise :class:`UserError` where a stored tensor (None: unknown) has another shape."""
    if stored is not None and tuple(stored) != tuple(wanted):
        raise UserError(
            f"{name} has shape {list(stored)} in the checkpoint; config.json asks for "
            f"{list(wanted)}. The two do not belong together."
        )


def _is_needless(name: str, weights: Weights) -> bool:
    """Whether the model makes this tensor itself: old files hold causal masks and the frequencies
    of rotary embeddings, which transformers passes over in silence too."""
    leaf = name.rpartition(".")[2]
    return leaf in NEEDLESS or (leaf == "bias" and len(weights.shape(name) or ()) == 4)


def _say_extra(extra: list[str], folder: Path) -> None:
    """One line about tensors that the model has no place for: their pattern and number."""
    patterns: dict[str, int] = {}
    for name in extra:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        patterns[pattern] = patterns.get(pattern, 0) + 1
    if patterns:
        shown = ", ".join(f"{number} x {pattern}" for pattern, number in list(patterns.items())[:4])
        more = f" and {len(patterns) - 4} other patterns" if len(patterns) > 4 else ""
        distributed.say_once(
            f"{folder}: {len(extra)} tensors have no place in the model that config.json describes "
            f"and take no part in it ({shown}{more})"
        )
