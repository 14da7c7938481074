"""Logits at chosen positions of token sequences of unequal length: what question sets need.

Sequences are padded on the right, where causal attention never looks, so the result does not
depend on the batch; the output head runs only at the positions asked for.
"""

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from harness.progress import track


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
) -> Iterator[tuple[int, Tensor]]:
    """(index of the sequence, float32 logits [P, V] at its P positions), longest first.

    `sequences` are non-empty lists of token ids no longer than the model's context;
    `positions[i]` index into sequence i. V is the model's vocabulary. Batches hold sequences of
    like length, so padding costs little.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in track(batches, label):
        longest = len(sequences[batch[0]])
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            mask[row, : len(sequences[index])] = 1
        wanted = sorted({p for index in batch for p in positions[index]})
        extra = {"logits_to_keep": torch.tensor(wanted, device=model.device)} if keep else {}
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                **extra,
            ).logits
        column = {p: i for i, p in enumerate(wanted)} if keep else {p: p for p in wanted}
        for row, index in enumerate(batch):
            yield index, logits[row, [column[p] for p in positions[index]]].float()
