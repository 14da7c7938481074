"""Token perplexity by GPTQ's protocol (arXiv 2210.17323, section 4 and its repository).

The text is cut into non-overlapping windows, the tail dropped; each window is scored alone on its
seqlen - 1 next tokens; perplexity is the exponential of the mean over all of them.

Shapes: N windows, T tokens per window (seqlen), B windows per batch, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.losses.nll import Perplexity, perplexity_of_logits


def model_logits(model, windows: Tensor, batch_size: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(start, logits [B, T, V] in the model's dtype) for windows [N, T], B at a time.

    The same form as `streams.stream_logits`, for a model that is whole in memory.
    """
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(model.device)
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        yield start, logits


def perplexity(model, windows: Tensor, batch_size: int = 1) -> Perplexity:
    """Perplexity of a transformers causal LM on windows int64 [N, T], `batch_size` at a time.

    Raises UserError when the logits hold a NaN.
    """
    return perplexity_of_logits(model_logits(model, windows, batch_size), windows)
