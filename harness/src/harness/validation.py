"""Looks at the validation set while training: cross entropy, and Rouge-L of sampled responses.

Legend: B examples, T tokens of the longest, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness import distributed, engine, responses
from harness.divergence import CHUNK_ELEMENTS
from harness.example_sets import IGNORED, Examples, collate
from harness.rouge import rouge_l

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


@torch.no_grad()
def held_out_loss(model, examples: Examples, *, batch: int, pad: int) -> float:
    """Mean cross entropy of all labels, nats per token, over all ranks; ``model`` is an engine."""
    ranks, rank = distributed.world_size(), distributed.rank()
    total = 0.0
    # Every rank runs as many batches: at ZeRO 3 they fetch weights from each other.
    for start in range(0, len(examples), batch * ranks):
        mine = range(start + rank * batch, min(start + (rank + 1) * batch, len(examples)))
        some = collate([examples[i] for i in mine or [0]], pad)
        labels = some["labels"].to(model.device)
        logits = model(**inputs_of(some, model.device)).logits
        total += cross_entropy(logits, labels).item() if len(mine) else 0.0
    labels = sum(n - first for n, first in zip(examples.lengths, examples.firsts, strict=True))
    return distributed.sum_number(total) / labels


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
    with engine.whole_weights(running) as model:
        ask = responses.transformers_engine(model, tokenizer, sampling)
        for group, said in responses.respond(ask, prompts, seed, groups, "responses"):
            texts = tokenizer.batch_decode(said, skip_special_tokens=True)
            score += rouge_l(texts, [references[i] for i in group]) * len(group)
    return distributed.sum_number(score) / len(examples)


def select(by: str, values: dict[str, float]) -> dict[str, float]:
    """The looked-at values with the one that chooses the best checkpoint as "value"."""
    name = {"loss": "validation_loss", "rouge": "rouge_l"}[by]
    return {"value": values[name], **values}
