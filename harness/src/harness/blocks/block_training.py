"""A block trained to give, as it is now, what it gave dense (EfficientQAT's Block-AP, arXiv
2407.11062, section 3.2).

    minimise |block on the quantized stream - dense block on the dense stream|²

Nothing is drawn at random: batches come in their order, as in the original. The learning rates of
all groups follow one cosine. In memory: gradients and moments of what is trained, and one batch's
activations.
"""

import math

import torch
from torch import nn

from harness.blocks.block import BlockInHand
from harness.errors import UserError
from harness.progress import track

LOWEST_RATE = 1 / 20  # of the first one, at the end of the cosine


def train(
    hand: BlockInHand, groups: list[dict], *, epochs: int, held_out: int, rates: str
) -> tuple[float, float]:
    """Train parameters of the block in hand with AdamW, without weight decay.

    Args:
        hand: of a method with the streams ("quantized", "dense").
        groups: AdamW's, {"params": [...], "lr": the first rate}.
        held_out: how many of the last batches are measured on, not trained on.
        rates: what sets the rates, for an error: "--weight_lr and --quant_lr".

    Returns:
        :func:`relative_error` before and after.

    Raises:
        UserError: losses or outputs are not finite.
    """
    last = len(hand.streams.inputs) - held_out
    before = relative_error(hand, range(last, last + held_out))
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    first = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * last
    hand.decoder.differentiable = True
    try:
        with torch.enable_grad():
            for step in track(range(steps), str(hand)) if steps else ():
                cosine = (1 + math.cos(math.pi * step / steps)) / 2
                for group, rate in zip(optimizer.param_groups, first, strict=True):
                    group["lr"] = rate * (LOWEST_RATE + (1 - LOWEST_RATE) * cosine)
                loss = _step(hand, step % last, optimizer)
                if not math.isfinite(loss):
                    raise UserError(
                        f"{hand} gives NaN or infinite values in training; lower {rates}, or try "
                        "--dtype float32."
                    )
    finally:
        hand.decoder.differentiable = False
    after = relative_error(hand, range(last, last + held_out))
    if not math.isfinite(before + after):
        raise UserError(
            f"{hand} gives NaN or infinite activations in {hand.decoder.dtype}; try --dtype "
            "bfloat16 or float32."
        )
    return before, after


def relative_error(hand: BlockInHand, batches: range) -> float:
    """|Y' - Y|² / |Y|² over ``batches``, Y the targets."""
    error = norm = 0.0
    for batch in batches:
        y = hand.target(batch).float()
        error += (hand.forward(batch).float() - y).square().sum().item()
        norm += y.square().sum().item()
    return error / max(norm, 1e-30)


def _step(hand: BlockInHand, batch: int, optimizer) -> float:
    target = hand.target(batch).float()
    loss = nn.functional.mse_loss(hand.forward(batch).float(), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
