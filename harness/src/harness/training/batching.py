"""Examples of `example_sets` as micro-batches: whose turn it is, on which rank, padded how.

Legend: B examples in a micro-batch, T tokens of the longest of them.
"""

from functools import lru_cache
from itertools import pairwise

import torch

from harness import distributed
from harness.training import engine

IGNORED = -100


def collate(rows: list[tuple[torch.Tensor, int]], pad: int) -> dict:
    """A micro-batch, padded on the right to its longest example.

    Returns:
        input_ids, attention_mask and labels, int64 [B, T]; "tokens", how many labels there are, and
        "read", how many tokens. The label of a position is the token after it, or IGNORED.
    """
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (tokens, first) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, first - 1 : len(tokens) - 1] = tokens[first:]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "tokens": int((labels != IGNORED).sum()),
        "read": int(mask.sum()),
    }


@lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of ``count`` examples in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def batch_size(training: engine.Training) -> int:
    """Examples per optimizer step, over all ranks."""
    full = training.micro_batch * training.accumulate * distributed.world_size()
    return training.batch or full


def deal(lengths: list[int], step: int, training: engine.Training) -> list[list[int]]:
    """Indices of this rank's micro-batches of a step.

    Epochs follow each other without a gap: each shows every example once. Within a step examples of
    like length come together, for less padding; which rank gets them changes no loss.
    """
    count, batch = len(lengths), batch_size(training)
    places = (divmod(place, count) for place in range(step * batch, (step + 1) * batch))
    chosen = [order(count, training.seed, epoch)[index] for epoch, index in places]
    chosen.sort(key=lambda index: (-lengths[index], index))
    forwards = training.accumulate * distributed.world_size()
    edges = [batch * number // forwards for number in range(forwards + 1)]
    micro = [chosen[start:end] for start, end in pairwise(edges)]
    return micro[distributed.rank() :: distributed.world_size()]


def pad_id(tokenizer) -> int:
    """What fills places that are masked: the end token, not the pad token, which is often added to
    a tokenizer whose model has no embedding of it."""
    end = tokenizer.eos_token_id
    return 0 if end is None else end
