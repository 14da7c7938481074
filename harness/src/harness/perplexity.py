"""Token perplexity by GPTQ's protocol (arXiv 2210.17323, section 4 and its repository).

The text is cut into non-overlapping windows, the tail dropped; each window is scored alone on its
seqlen - 1 next tokens; perplexity is the exponential of the mean over all of them.

Shapes: N windows, T tokens per window (seqlen), B windows per batch, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import UserError
from harness.progress import track

DEFAULT_SEQLEN = 2048
# Elements of the float32 copy of a slice of logits: 32 MB, whatever the vocabulary.
CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`nll_sum` / `tokens`); `nll_sum` in nats over `tokens` scored tokens."""

    value: float
    nll_sum: float
    tokens: int
    windows: int


def context_length(config) -> int | None:
    """The longest window a transformers config admits, in tokens; None where it has no bound."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def window_length(config, seqlen: int | None = None) -> int:
    """`seqlen`, or by default the smaller of 2,048 and the model's context, as GPTQ has it.

    Raises UserError when `seqlen` is below 2 or beyond the model's context.
    """
    context = context_length(config)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    if seqlen < 2:
        raise UserError(f"--seqlen {seqlen}: a window needs at least 2 tokens")
    if context is not None and seqlen > context:
        raise UserError(
            f"--seqlen {seqlen} is longer than the model's context of {context} tokens; "
            f"use --seqlen {context} or less"
        )
    return seqlen


def model_logits(model, windows: Tensor, batch_size: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(start, logits [B, T, V] in the model's dtype) for windows [N, T], B at a time.

    The same form as `decoder.stream_logits`, for a model that is whole in memory.
    """
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(model.device)
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        yield start, logits


def nll_sum(logits: Tensor, targets: Tensor) -> float:
    """Sum over rows of -log softmax(logits)[target], in nats.

    logits [R, V] any float dtype, targets int64 [R]. The loss is float32, a slice of rows at a
    time, so that no float32 copy of all logits exists; the sum is float64.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        loss = torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        total += loss.sum(dtype=torch.float64)
    return total.item()


def perplexity_of_logits(
    logits: Iterable[tuple[int, Tensor]], windows: Tensor, label: str = "perplexity"
) -> Perplexity:
    """Perplexity of windows int64 [N, T] from an iterator of (start, logits [B, T, V]).

    Raises UserError when the logits hold a NaN, naming the window.
    """
    count, length = windows.shape
    if count == 0 or length < 2:
        raise UserError(f"perplexity needs at least one window of 2 tokens, got {count} x {length}")
    total, scored = 0.0, 0
    bar = track(range(count), label)
    for start, batch in logits:
        for offset, row in enumerate(batch):
            next(bar)
            target = windows[start + offset, 1:].to(row.device)
            nll = nll_sum(row[:-1], target)
            if math.isnan(nll):
                raise UserError(
                    f"the model's logits for window {start + offset} contain NaN: the weights are "
                    "damaged, or the dtype overflows (try --dtype bfloat16 or float32)"
                )
            total += nll
            scored += length - 1
    next(bar, None)
    mean = total / scored
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, total, scored, scored // (length - 1))


def perplexity(model, windows: Tensor, batch_size: int = 1) -> Perplexity:
    """Perplexity of a transformers causal LM on windows int64 [N, T], `batch_size` at a time.

    Raises UserError when the logits hold a NaN.
    """
    return perplexity_of_logits(model_logits(model, windows, batch_size), windows)
