"""Logits at chosen positions of token sequences of unequal length: what question sets need.

Sequences are padded on the right, where causal attention never looks, so no mask is needed and the
result does not depend on the batch. The output head runs only at the positions asked for, and what
a group of sequences has in common at the start is run once, its keys and values shared.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from harness import distributed
from harness.data import corpora
from harness.progress import track

# Below this many tokens a shared start is not worth a forward of its own.
SHORTEST_SHARED = 16
# Model -> whether its cache can be shared.
_shares: WeakKeyDictionary = WeakKeyDictionary()


def encode(tokenizer, text: str, special: bool = True) -> list[int]:
    """Token ids of `text`; `special` adds what the tokenizer puts in front, never a final EOS."""
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def position_logits(
    model,
    sequences: Sequence[list[int]],
    positions: Sequence[Sequence[int]],
    batch_size: int = 8,
    label: str = "scoring",
    groups: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(index of the sequence, float32 logits [P, V] at its P positions), in no promised order.

    Args:
        sequences: non-empty lists of token ids, no longer than the model's context.
        positions: `positions[i]` index into sequence i, ascending.
        groups: indices of sequences that may start alike; every index in exactly one group.
            Changes the time taken, not the result. By default nothing is shared.

    Raises:
        UserError: a token is beyond the model's vocabulary.
    """
    corpora.check_token(max(map(max, sequences)), model.config)
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    if groups is None:
        groups = [range(len(sequences))]
        shared = [0]
    else:
        shared = [shared_start(sequences, positions, group) for group in groups]
    # Like lengths together: padding costs little, and what does not fit fails at once.
    batches = []
    for number, group in enumerate(groups):
        order = sorted(group, key=lambda i: -len(sequences[i]))
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        batches += [(number, part) for part in parts]
    current, cache = None, None
    for number, batch in track(batches, label):
        if number != current:
            current, start = number, shared[number]
            cache = None
            if start and _can_share(model, sequences, positions, batch[:2], start, keep):
                cache = _run_start(model, sequences[batch[0]][:start], keep)
        yield from _logits(model, sequences, positions, batch, start, cache, keep)


def _logits(model, sequences, positions, batch, start, cache, keep) -> Iterator[tuple[int, Tensor]]:
    """(index, logits) of one batch, its first ``start`` tokens from ``cache`` if that is given."""
    start = start if cache is not None else 0
    longest = max(len(sequences[index]) for index in batch)
    ids = torch.zeros(len(batch), longest - start, dtype=torch.long)
    for line, index in enumerate(batch):
        ids[line, : len(sequences[index]) - start] = torch.tensor(sequences[index][start:])
    wanted = sorted({p - start for index in batch for p in positions[index]})
    extra = {"logits_to_keep": torch.tensor(wanted, device=model.device)} if keep else {}
    if cache is not None:
        extra["past_key_values"] = copy.deepcopy(cache)
        extra["past_key_values"].batch_repeat_interleave(len(batch))
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device), use_cache=cache is not None, **extra).logits
    column = {p: i for i, p in enumerate(wanted)} if keep else {p: p for p in wanted}
    for line, index in enumerate(batch):
        yield index, logits[line, [column[p - start] for p in positions[index]]].float()


def _can_share(model, sequences, positions, batch, start: int, keep: bool) -> bool:
    """Whether two sequences get the same logits from a shared start as from their own: tried once
    per model. Caches that hold recurrent states (Mamba's, LFM2's) are not made to be repeated."""
    if model not in _shares:
        both = (model, sequences, positions, batch)
        try:
            cache = _run_start(model, sequences[batch[0]][:start], keep)
            alone = dict(_logits(*both, 0, None, keep))
            shared = dict(_logits(*both, start, cache, keep)) if cache is not None else {}
            near = (_near(alone[index], shared[index], model.dtype) for index in alone)
            _shares[model] = bool(shared) and all(near)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the family's own code, given a cache that was repeated
            _shares[model] = False
        if not _shares[model]:
            distributed.say(
                f"{type(model).__name__} cannot take up another's cache: every question is scored "
                "from its start (slower, same result)"
            )
    return _shares[model]


def _near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the order of sums in ``dtype``."""
    share = 1e-4 if dtype == torch.float32 else 0.02
    return bool((one - other).abs().max() <= share * one.abs().max().clamp_min(1e-6))


def shared_start(
    sequences: Sequence[list[int]], positions: Sequence[Sequence[int]], group: Sequence[int]
) -> int:
    """How many first tokens a group of sequences shares, before any position asked for.

    0 where that is not worth a forward of its own.
    """
    if len(group) < 2:
        return 0
    # Whatever the smallest and the largest share, all between them share.
    low, high = (pick(sequences[i] for i in group) for pick in (min, max))
    limit = min(positions[i][0] for i in group)
    same = 0
    while same < min(limit, len(low), len(high)) and low[same] == high[same]:
        same += 1
    return same if same >= SHORTEST_SHARED else 0


def _run_start(model, tokens: list[int], keep: bool):
    """Keys and values of a shared start; None where the model gives no cache that can be handed to
    several sequences."""
    with torch.no_grad():
        ids = torch.tensor([tokens], device=model.device)
        # The logits are not wanted: one position is the least that can be asked for.
        output = model(input_ids=ids, use_cache=True, **({"logits_to_keep": 1} if keep else {}))
    cache = getattr(output, "past_key_values", None)
    return cache if hasattr(cache, "batch_repeat_interleave") else None
