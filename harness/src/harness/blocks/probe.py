"""Who reads whom in a block, whatever the family: every linear is made to return free numbers, and
the block's own derivatives say which of these reach the input of which linear.

Two questions are asked of it: which rows a column is fed by, so that both can only go together
(LLM-Pruner's groups), and which row it is a multiple of, so that a scale can be folded (graph.py).

Legend: B windows, T tokens, R rows of a linear.
"""

from dataclasses import dataclass

import torch

from harness.blocks.decoder import Decoder
from harness.modules import get_matrix, linears


@dataclass
class FreeRun:
    """One forward of a block whose linears returned free numbers.

    Attributes:
        hidden: what entered it, [B, T, D].
        inputs: by linear, in the order of their calls, what it read. outputs: the numbers that it
            returned, [.., R], positive; derivatives with respect to them and ``hidden`` can be
            taken.
    """

    hidden: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def feeders(self, name: str) -> list[str]:
        """The linears whose numbers reach the input of ``name`` without passing another linear;
        none where the block's own input does, or where nothing does."""
        x, leaves = self.inputs[name], [self.hidden, *self.outputs.values()]
        if not x.requires_grad:
            return []
        slopes = torch.autograd.grad(x.sum(), leaves, retain_graph=True, allow_unused=True)
        if slopes[0] is not None:
            return []
        return [n for n, slope in zip(self.outputs, slopes[1:], strict=True) if slope is not None]


def free_run(decoder: Decoder, index: int, hidden: torch.Tensor) -> FreeRun:
    """Run the loaded block ``index`` on ``hidden`` [B, T, D] with every linear returning free
    numbers. They are positive, so that no ReLU hides a row, and drawn from a seed."""
    block = decoder.blocks[index]
    run = FreeRun(hidden.detach().requires_grad_(), {}, {})
    generator = torch.Generator(hidden.device).manual_seed(0)

    def replace(name, module):
        width = get_matrix(module).shape[0]

        def free(x):
            run.inputs[name] = x
            z = torch.rand(*x.shape[:-1], width, generator=generator, device=x.device)
            run.outputs[name] = (z + 0.5).to(x.dtype).requires_grad_()
            return run.outputs[name].clone()  # some blocks add to it in place

        module.forward = free

    for name, module in linears(block).items():
        replace(name, module)
    before, decoder.differentiable = decoder.differentiable, True
    try:
        decoder.forward(index, run.hidden)
    finally:
        decoder.differentiable = before
        for module in linears(block).values():
            vars(module).pop("forward", None)
    return run
