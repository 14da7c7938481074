"""Sequence packing for supervised fine-tuning: several examples in a row of tokens, no padding
between them.

Where a model isolates them (positions that start again are read as another document, which
transformers does for most families), the loss of every token is that of its example alone.
"""

import random

import torch

from harness.training.batching import IGNORED


def pack(lengths: list[int], room: int, seed: int) -> list[list[int]]:
    """Examples of these lengths, each at most ``room``, in rows of at most ``room`` tokens: each
    goes, the longest first, into the fullest row that has room for it."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    left: list[list[list[int]]] = [[] for _ in range(room + 1)]  # rows by the room left in them
    rows = []
    for index in order:
        need = lengths[index]
        found = next((space for space in range(need, room + 1) if left[space]), None)
        if found is None:
            rows.append([])
            row, found = rows[-1], room
        else:
            row = left[found].pop()
        row.append(index)
        left[found - need].append(row)
    return rows


def collate(rows: list[list[tuple[torch.Tensor, int]]], pad: int) -> dict:
    """A micro-batch of packed rows: input_ids, labels and position_ids int64 [B, T], as
    `training.batching.collate` otherwise, but no attention mask: positions tell documents."""
    longest = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    labels, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    read = 0
    for number, row in enumerate(rows):
        start = 0
        for some, first in row:
            end = start + len(some)
            ids[number, start:end] = some
            labels[number, start + first - 1 : end - 1] = some[first:]
            positions[number, start:end] = torch.arange(len(some))
            start = end
        positions[number, start:] = torch.arange(longest - start)
        read += start
    tokens = int((labels != IGNORED).sum())
    return {
        "input_ids": ids, "labels": labels, "position_ids": positions, "tokens": tokens,
        "read": read,
    }  # fmt: skip


@torch.no_grad()
def isolates(model) -> bool:
    """Whether a packed example is read as if it were alone: tried on two short ones."""
    was = model.training
    model.eval()
    device = next(model.parameters()).device
    one, two = (torch.arange(a, a + 6, device=device)[None] for a in (1, 8))
    both = torch.cat([one, two], 1)
    positions = torch.arange(6, device=device).repeat(2)[None]
    try:
        packed = model(input_ids=both, position_ids=positions, use_cache=False).logits[:, 6:]
    except TypeError:  # no positions in this family's forward
        return False
    finally:
        model.train(was)
    alone = model(input_ids=two, use_cache=False).logits
    rounding = 1e-3 if alone.dtype == torch.float32 else 0.05
    return bool((packed - alone).float().abs().max() < rounding * alone.float().std())
