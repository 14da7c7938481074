"""The hidden states of this rank's windows on their way through the blocks.

The *quantized* stream comes through blocks as they are in the result, the *dense* one through the
model's own. A method says which it looks at: ("quantized",); both, where a block is to give on the
first what it gave on the second; ("dense",), where nothing is run again behind a changed block; or
(), where no data is looked at.

Memory: N x T x D numbers for each stream, on the device where four times that is free there.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from harness import distributed, memory
from harness.blocks.decoder import Decoder, batches
from harness.blocks.graph import Producer, find
from harness.blocks.stages import find_stages
from harness.checkpoint import load
from harness.checkpoint.load import window_length
from harness.modules import get_matrix, linears

PROBE_TOKENS = 16
KINDS = (("quantized",), ("quantized", "dense"), ("dense",), ())


class Streams:
    """Args:
        windows: token ids int64 [N, T], dealt to the ranks in batches.
        kinds: one of KINDS.
        split: windows -> batches [B, T].

    Attributes:
        inputs: what enters the block at hand, [B, T, D] a batch. targets: what the dense block
            gives on the dense stream, where there is one, else None.
        seqlen: T.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: torch.Tensor | None,
        kinds: tuple[str, ...] = KINDS[0],
        split: Callable[[torch.Tensor], list[torch.Tensor]] = batches,
    ):
        assert kinds in KINDS, kinds
        self.decoder, self.kinds = decoder, kinds
        self.inputs: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] | None = None
        self._stages: dict[tuple, list[list[str]]] = {}
        self._graphs: dict[tuple, list[Producer | None]] = {}
        self._probe = None
        if windows is None or not kinds:
            return
        parts = split(windows)
        parts = parts[distributed.shares(len(parts))[distributed.rank()]]
        self.seqlen = windows.shape[1]
        width = decoder.config.get_text_config().hidden_size
        size = windows.numel() * width * decoder.dtype.itemsize
        fits = 4 * len(kinds) * size < memory.free(decoder.device)
        self.store = decoder.device if fits else torch.device("cpu")
        self._probe = decoder.embed(windows[:1, :PROBE_TOKENS])
        self.inputs = [decoder.embed(part).to(self.store) for part in parts]
        self.targets = list(self.inputs) if "dense" in kinds else None

    def forward(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the loaded block ``index`` gives for a batch [B, T, D], on the device."""
        return self.decoder.forward(index, hidden.to(self.decoder.device))

    def look_ahead(self, index: int) -> None:
        """Make the targets of block ``index``, which is loaded as it is in the model."""
        if self.targets is not None:
            for batch, hidden in enumerate(self.targets):
                self.targets[batch] = self.forward(index, hidden).to(self.store)

    def advance(self, index: int) -> None:
        """Go on behind block ``index``, which is loaded as it is in the result."""
        if self.kinds == ("dense",):
            self.inputs = list(self.targets)
            return
        for batch, hidden in enumerate(self.inputs):
            self.inputs[batch] = self.forward(index, hidden).to(self.store)

    def stages(self, index: int, block) -> list[list[str]]:
        """Names of the loaded block's linears by the tensor that feeds them, in the order of their
        calls; each alone where no data is looked at."""
        shapes = _shapes(block)
        if self._probe is None:
            return [[name] for name, *_ in shapes]
        if shapes not in self._stages:
            forward = lambda: self.decoder.forward(index, self._probe)  # noqa: E731
            self._stages[shapes] = find_stages(block, forward)
            missed = {n for n, *_ in shapes} - {n for s in self._stages[shapes] for n in s}
            if missed:
                distributed.say(
                    f"not compressed, their block never calls them: {', '.join(sorted(missed))}"
                )
        return self._stages[shapes]

    def graph(self, index: int, block) -> list[Producer | None]:
        """What makes the input of each of the loaded block's :meth:`stages` (graph.py): found, and
        proved in float32, once for all blocks of one shape."""
        shapes = _shapes(block)
        if shapes not in self._graphs:
            exact = self.decoder
            if exact.dtype != torch.float32:
                exact = Decoder(
                    exact.weights.folder, dtype=torch.float32, device=str(exact.device),
                    transform=exact.transform,
                )  # fmt: skip
                exact.load(index)
            self._graphs[shapes] = find(exact, index, self.stages(index, block))
        return self._graphs[shapes]


def _shapes(block) -> tuple:
    return tuple((name, *get_matrix(m).shape) for name, m in linears(block).items())


@torch.no_grad()
def stream_logits(
    model: str | Path,
    windows: torch.Tensor,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    batch_size: int | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first window, logits [B, T, V]) per batch, holding one block at a time.

    Memory: one block, the hidden states of all windows [N, T, D], one batch of logits.
    """
    decoder = Decoder(load.resolve(model), device=device, dtype=dtype, name=model)
    window_length(decoder.config, windows.shape[1])
    parts = batches(windows, batch_size)
    hidden = [decoder.embed(part) for part in parts]
    for index in range(len(decoder)):
        decoder.load(index)
        for i, value in enumerate(hidden):
            hidden[i] = decoder.forward(index, value)
        decoder.release(index)
    start = 0
    for i, part in enumerate(parts):
        yield start, decoder.logits(part, hidden[i])
        hidden[i] = None
        start += len(part)
