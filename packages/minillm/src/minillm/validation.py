"""Looks at the validation set while training: cross entropy, and Rouge-L of sampled responses.

Legend: B examples, T tokens of the longest, V vocabulary.
"""

import torch
from harness.divergence import CHUNK_ELEMENTS
from harness.progress import track
from harness.rouge import rouge_l
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness import distributed, engine
from minillm.data import IGNORED, Examples, collate

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


def rouge(model, training, step: int, tokenizer, examples: Examples, *, batch: int, new_tokens: int,
          sample: bool) -> float:  # fmt: skip
    """Rouge-L of responses to the examples' prompts, over all ranks; at temperature 1, or greedy.
    ``model`` is an engine."""
    mine = range(distributed.rank(), len(examples), distributed.world_size())
    # Prompts of like length together, for less padding.
    mine = sorted(mine, key=lambda i: examples.firsts[i])
    parts = [mine[start : start + batch] for start in range(0, len(mine), batch)]
    engine.seed(training, step)
    score = 0.0
    with engine.whole_weights(model) as whole:
        for part in track(parts, "responses") if distributed.rank() == 0 else parts:
            rows = [examples[i] for i in part]
            prompts = [ids[:first] for ids, first in rows]
            found = respond(whole, tokenizer, prompts, new_tokens=new_tokens, sample=sample)
            references = [
                tokenizer.decode(ids[first:], skip_special_tokens=True) for ids, first in rows
            ]
            score += rouge_l(found, references) * len(part)
    return distributed.sum_number(score) / len(examples)


@torch.no_grad()
def respond(model, tokenizer, prompts: list[Tensor], *, new_tokens: int, sample: bool) -> list[str]:
    """Responses to prompts (token ids), padded on the left: at temperature 1 from the whole
    distribution, or greedy."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, some in enumerate(prompts):
        ids[row, longest - len(some) :] = some
        mask[row, longest - len(some) :] = 1
    device = next(model.parameters()).device
    made = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=new_tokens,
        do_sample=sample,
        temperature=1.0 if sample else None,
        top_k=0 if sample else None,
        top_p=1.0 if sample else None,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)


def select(by: str, values: dict[str, float]) -> dict[str, float]:
    """The looked-at values with the one that chooses the best checkpoint as "value"."""
    name = {"loss": "validation_loss", "rouge": "rouge_l"}[by]
    return {"value": values[name], **values}
