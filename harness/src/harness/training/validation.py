"""Looks at the validation set while training: cross entropy, and Rouge-L of sampled responses.

Legend: B examples, T tokens of the longest, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness import distributed
from harness.data.example_sets import Examples
from harness.generation import responses
from harness.losses import nll as ppl
from harness.losses.divergence import CHUNK_ELEMENTS
from harness.metrics.rouge import rouge_l
from harness.training import engine
from harness.training.batching import IGNORED, collate

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def inputs_of(batch: dict, device) -> dict:
    """What of a batch the model is called with; nothing is cached."""
    return {k: batch[k].to(device) for k in MODEL_INPUTS if k in batch} | {"use_cache": False}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits [B, T, V])[labels [B, T]] in nats, IGNORED left out; float32 over
    a slice of rows at a time, whose softmax the backward pass makes again."""
    counted = labels.flatten() != IGNORED
    flat, wanted = logits.flatten(0, -2)[counted], labels.flatten()[counted]
    rows = max(1, CHUNK_ELEMENTS // flat.shape[-1])
    total = torch.zeros((), device=logits.device)
    for part, target in zip(flat.split(rows), wanted.split(rows), strict=True):
        total = total + checkpoint(_rows, part, target, use_reentrant=False)
    return total


def _rows(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def label_loss(running, batch: dict) -> tuple[Tensor, dict]:
    """:func:`cross_entropy` of a batch, as `harness.training.loop.train` calls a loss."""
    logits = running(**inputs_of(batch, running.device)).logits
    return cross_entropy(logits, batch["labels"].to(running.device)), {}


@torch.no_grad()
def held_out(
    running, count: int, collate: Callable[[list[int]], dict], loss_of: Callable, *, batch: int
) -> dict[str, float]:
    """Means of a loss and of what it reports, per token over all ranks.

    Args:
        running: an engine. count: examples in all, ``batch`` of them at a time.
        collate: indices -> a batch with its "tokens".
        loss_of: (engine, batch) -> (sum of losses, {name: another such sum}).

    Returns:
        "loss" and what was reported.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    sums: dict[str, float] = {}
    tokens = 0
    # Every rank runs as many batches: at ZeRO 3 they fetch weights from each other.
    for start in range(0, count, batch * ranks):
        mine = range(start + rank * batch, min(start + (rank + 1) * batch, count))
        part = collate(list(mine) or [0])
        loss, report = loss_of(running, part)
        for name, value in {"loss": loss, **report}.items():
            sums[name] = sums.get(name, 0.0) + (value.item() if len(mine) else 0.0)
        tokens += part["tokens"] if len(mine) else 0
    tokens = distributed.sum_number(tokens)
    return {name: distributed.sum_number(value) / tokens for name, value in sums.items()}


def held_out_loss(model, examples: Examples, *, batch: int, pad: int) -> float:
    """Mean cross entropy of all labels, nats per token, over all ranks; ``model`` is an engine."""

    def some(indices):
        return collate([examples[i] for i in indices], pad)

    return held_out(model, len(examples), some, label_loss, batch=batch)["loss"]


@torch.no_grad()
def perplexity(running, windows: Tensor) -> float:
    """Token perplexity of windows int64 [N, T] (perplexity.py's protocol), one at a time as in
    `harness eval`, shared among the ranks; ``running`` is an engine."""
    ranks, rank = distributed.world_size(), distributed.rank()
    total = 0.0
    for start in range(0, len(windows), ranks):
        # As above: no rank may stay away.
        window = windows[min(start + rank, len(windows) - 1)].to(running.device)
        logits = running(input_ids=window[None], use_cache=False).logits[0, :-1]
        total += ppl.nll_sum(logits, window[1:]) if start + rank < len(windows) else 0.0
    mean = distributed.sum_number(total) / windows[:, 1:].numel()
    return math.exp(mean) if mean < 700 else math.inf


def rouge(
    running, tokenizer, examples: Examples, *, sampling: responses.Sampling, batch: int, seed: int
) -> float:
    """Rouge-L of responses to the examples' prompts, over all ranks; the same random numbers at
    every look. ``running`` is an engine."""
    rows = [examples[i] for i in range(len(examples))]
    prompts = [ids[:first].tolist() for ids, first in rows]
    answers = [ids[first:] for ids, first in rows]
    references = tokenizer.batch_decode(answers, skip_special_tokens=True)
    groups = responses.batches(prompts, batch)
    score = 0.0
    with engine.whole_weights(running.module) as model:
        ask = responses.transformers_engine(model, tokenizer, sampling)
        for group, said in responses.respond(ask, prompts, seed, groups, "responses"):
            texts = tokenizer.batch_decode(said, skip_special_tokens=True)
            score += rouge_l(texts, [references[i] for i in group]) * len(group)
    return distributed.sum_number(score) / len(examples)


def select(by: str, values: dict[str, float]) -> dict[str, float]:
    """The looked-at values with the one that chooses the best checkpoint as "value"."""
    name = {"loss": "validation_loss", "rouge": "rouge_l"}[by]
    return {"value": values[name], **values}
