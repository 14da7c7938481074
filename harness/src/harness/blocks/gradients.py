"""Gradients of the loss with one block in memory at a time.

    forward:  embedding -> block 0 -> block 1 ... -> head, keeping every block's input
    backward: the head's gradient, then the blocks from the last to the first: each is read from the
              checkpoint again, run again on the kept input, differentiated, and dropped

Memory: one block with its gradients in float32, and the inputs of all blocks, N x T x D numbers
each. The original keeps the model and as much again for its gradients.

Examples are run one by one, which squared gradients per example need, and are dealt to the ranks.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from harness import distributed, memory
from harness.blocks.decoder import Decoder
from harness.errors import UserError
from harness.progress import track

# Name -> (weight as it is stored, gradient of the mean loss, mean of squared gradients or None).
Found = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def backward(
    decoder: Decoder,
    windows: torch.Tensor,
    wanted: Callable[[int | None], list[str]],
    *,
    squares: bool = False,
    prepare: Callable[[int | None, nn.Module], None] = lambda index, module: None,
) -> Iterator[tuple[int | None, Found]]:
    """Yield (index, gradients by name in the block), from the last block to the first from which
    something is wanted; then, if that is, (None, gradients by name in the model) of what lies
    outside the blocks.

    The loss is the mean over windows of the mean next-token cross-entropy, in float32.

    Args:
        windows: token ids [N, T].
        wanted: a block's index, or None -> names of the parameters whose gradients are wanted.
        squares: also the mean over windows of squared gradients.
        prepare: called with every freshly loaded block and its index, and with the model and None
            once what lies outside is loaded; may change weights in place.

    Raises:
        UserError: activations or gradients are not finite.
    """
    share = windows[distributed.shares(len(windows))[distributed.rank()]]
    examples = [window[None] for window in share]
    model = decoder.model
    decoder.embed(windows[:1])  # loads what lies outside the blocks, and ties it
    prepare(None, model)
    outer = wanted(None)
    first = 0 if outer else next((i for i in range(len(decoder)) if wanted(i)), len(decoder))
    hidden = [decoder.embed(ids) for ids in examples]
    inputs = []
    for index in track(range(len(decoder)), "forward", len(decoder)):
        prepare(index, decoder.load(index))
        if index >= first:
            inputs.append([h.cpu() for h in hidden])
        hidden = [decoder.forward(index, h) for h in hidden]
        decoder.release(index)
        memory.give_back()
    decoder.differentiable = True
    try:
        gradients = [_head(decoder, ids, h) for ids, h in zip(examples, hidden, strict=True)]
        if not outer:
            hidden = None
        for index in track(range(len(decoder) - 1, first - 1, -1), "backward"):
            block = decoder.load(index)
            prepare(index, block)
            sums = _Sums(len(windows), squares)
            sums.watch(block, wanted(index))
            for i, kept in enumerate(inputs.pop()):
                x = kept.to(decoder.device).requires_grad_()
                decoder.forward(index, x).backward(gradients[i])
                gradients[i] = x.grad
                sums.collect()
            found = sums.finish(f"block {index}")
            decoder.release(index)
            yield index, found
            del found, sums, block
            memory.give_back()
        if outer:
            sums = _Sums(len(windows), squares)
            sums.watch(model, outer)
            for i, ids in enumerate(examples):
                # Head and embedding are often one matrix: one example's two gradients must be
                # added before they are squared, so the head runs again.
                _head(decoder, ids, hidden[i])
                decoder.embed(ids).backward(gradients[i])
                sums.collect()
            yield None, sums.finish("embedding and head")
    finally:
        decoder.differentiable = False


def _head(decoder: Decoder, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Gradient [1, T, D] of one example's loss at the last block's output."""
    hidden = hidden.detach().requires_grad_()
    logits = decoder.logits(ids, hidden)[0, :-1].float()
    loss = nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device))
    loss.backward()
    return hidden.grad


class _Sums:
    """Sums over examples of the gradients of some parameters, and of their squares, in float32."""

    def __init__(self, examples: int, squares: bool):
        self.examples, self.with_squares = examples, squares
        self.parameters: dict[str, nn.Parameter] = {}
        self.first, self.second = {}, {}

    def watch(self, module: nn.Module, names: list[str]) -> None:
        for name in names:
            parameter = module.get_parameter(name).requires_grad_()
            self.parameters[name] = parameter
            self.first[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if self.with_squares:
                self.second[name] = torch.zeros_like(parameter, dtype=torch.float32)

    def collect(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            self.first[name] += gradient
            if self.with_squares:
                self.second[name].addcmul_(gradient, gradient)
            parameter.grad = None

    def finish(self, where: str) -> Found:
        gradients = {}
        for name, parameter in self.parameters.items():
            parts = [
                distributed.sum_in_place(sums[name]).div_(self.examples)
                for sums in (self.first, self.second)[: 1 + self.with_squares]
            ]
            if not all(torch.isfinite(part).all() for part in parts):
                raise UserError(
                    f"the gradients of {where}, {name}, are NaN or infinite: activations overflow, "
                    "or the checkpoint is damaged. Try --dtype float32."
                )
            squares = parts[1] if self.with_squares else None
            gradients[name] = (parameter.detach(), parts[0], squares)
            parameter.requires_grad_(False)
        return gradients
