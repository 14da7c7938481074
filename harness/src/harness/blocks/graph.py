"""The graph of a block: what makes each stage's input, so that a scale or a shift of it can be
folded in there and taken back in the stage's linears, which leaves the function as it is.

Found from tensors, whatever the family, by running the block on one token per window, where
attention hands its values on:

- a norm, where its output is the stage's input;
- else a linear, seen where every linear gives free numbers z (probe.py). Channel c of the input x
  is row r times what does not depend on it where the slope of the channels' sum is the channel
  itself, z_r d(Σ x)/d z_r = m x_c on every token (Euler: x_c is homogeneous in row r, of degree
  one; m channels hold the same, as the query heads of one key do). Values behind attention are such
  rows, what a ReLU passes, the plain half of a gated product; not what a GELU bends.

What is found is proved on windows of several tokens: with random scales folded the block's output
stays. A producer that something else reads too (a router beside experts) is refuted so.

Legend: I channels of a stage's input; R rows of its producer.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from harness.blocks.decoder import Decoder
from harness.blocks.probe import FreeRun, free_run
from harness.modules import get_matrix, is_linear, set_matrix

WINDOWS, TOKENS = 12, 16
EXACT = 1e-5  # of a channel's largest value: float32
PROVED = 1e-4  # of what the block adds


@dataclass(frozen=True)
class Producer:
    """What makes a stage's input.

    Attributes:
        kind: "norm" or "linear". name: its module within the block.
        rows: int64 [I], the row behind every channel, -1 behind those that were never seen to be
            other than zero; None for a norm.
        offset: the gain is offset + weight (1 for Gemma's norms).
        takes_shift: whether what is added to its bias arrives in the input as it is.
    """

    kind: str
    name: str
    rows: torch.Tensor | None = None
    offset: float = 0.0
    takes_shift: bool = False


class Watch:
    """What ``modules`` read and write in forwards, and which of them are norms of ``width``
    (of any, without)."""

    def __init__(self, modules: dict[str, nn.Module], width: int | None = None):
        self.linears = {n: m for n, m in modules.items() if is_linear(m)}
        self.norms = {
            name: module
            for name, module in modules.items()
            if name not in self.linears and not list(module.children())
            and getattr(module, "weight", None) is not None
            and module.weight.dim() == 1 and width in (None, len(module.weight))
        }  # fmt: skip
        self.read: dict[str, torch.Tensor] = {}
        self.written: dict[str, torch.Tensor] = {}
        self.hooks = [m.register_forward_hook(self._note(n)) for n, m in modules.items()]

    def _note(self, name: str):
        def hook(_, args, output):
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                self.read[name], self.written[name] = args[0], output

        return hook

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def fed_by(self, linear: str) -> str | None:
        """The norm whose output ``linear`` reads."""
        x = self.read[linear]
        return next((n for n in self.norms if same(self.written.get(n), x)), None)


def find(decoder: Decoder, index: int, stages: list[list[str]]) -> list[Producer | None]:
    """The proved producer of every stage of block ``index``, or None.

    Args:
        decoder: computing in float32, the block loaded; its tensors are afterwards as before.
        stages: names of linears by the tensor that feeds them, in the order of their calls.
    """
    decoder.embed(torch.zeros(WINDOWS, 1, dtype=torch.long))
    width = decoder.config.get_text_config().hidden_size
    hidden = _random(WINDOWS, 1, width).to(decoder.device)
    watch = Watch({n: m for n, m in decoder.blocks[index].named_modules() if n})
    try:
        run = free_run(decoder, index, hidden)
        graph = [_producer(run, watch, names) for names in stages]
    finally:
        watch.close()
    changes = prove(decoder, index, stages, graph)
    return [
        _with_shift(decoder, index, names, producer) if producer and change <= PROVED else None
        for names, producer, change in zip(stages, graph, changes, strict=True)
    ]


@torch.no_grad()
def fold(
    block: nn.Module,
    producer: Producer,
    names: list[str],
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make a stage's input x into (x - shift) / scale, in place: its producer gives that, and the
    linears ``names`` take it back. In float32, rounded once to each parameter's dtype.

    Args:
        scale: [I], positive. shift: [I]; where ``producer.takes_shift``.

    Returns:
        [I] float32, the scale really used: one for all channels of a row, their geometric mean.

    Raises:
        ValueError: a shift for a producer that takes none.
    """
    if shift is not None and not producer.takes_shift:
        raise ValueError(f"{producer.name} takes no shift: scales alone can be folded there")
    module = block.get_submodule(producer.name)
    bias = getattr(module, "bias", None)
    scale = scale.float().to(module.weight.device)
    shift = None if shift is None else shift.float().to(scale)
    if producer.kind == "norm":
        by_row, by_row_shift = scale, shift
        gain = (module.weight.float() + producer.offset) / scale
        module.weight.copy_(gain - producer.offset)
    else:
        rows = len(get_matrix(module))
        by_row = _per_row(scale.log(), producer.rows, rows).exp()
        by_row_shift = None if shift is None else _per_row(shift, producer.rows, rows)
        scale, shift = (
            None if value is None else torch.where(producer.rows < 0, blank, value[producer.rows])
            for value, blank in ((by_row, 1.0), (by_row_shift, 0.0))
        )
        set_matrix(module, get_matrix(module).float() / by_row[:, None])
    if bias is not None:
        moved = bias.float() if by_row_shift is None else bias.float() - by_row_shift
        bias.copy_(moved / by_row)
    for name in names:
        reader = block.get_submodule(name)
        matrix = get_matrix(reader).float()
        if shift is not None:
            reader.bias.copy_(reader.bias.float() + matrix @ shift)
        set_matrix(reader, matrix * scale)
    return scale


def prove(
    decoder: Decoder, index: int, stages: list[list[str]], graph: list[Producer | None]
) -> list[float]:
    """How much of what the block adds changes when random scales in [.5, 2] are folded into one
    producer after the other; 0 where there is none, nan where the block gives no numbers. Arguments
    as for :func:`find`."""
    return [
        0.0 if producer is None else _change(decoder, index, names, producer)
        for names, producer in zip(stages, graph, strict=True)
    ]


@torch.no_grad()
def _change(decoder: Decoder, index: int, names, producer: Producer, shifts=False) -> float:
    block = decoder.blocks[index]
    decoder.embed(torch.zeros(2, TOKENS, dtype=torch.long))
    hidden = _random(2, TOKENS, decoder.config.get_text_config().hidden_size).to(decoder.device)
    before = decoder.forward(index, hidden)
    saved = {name: p.data.clone() for name, p in block.named_parameters()}
    width = get_matrix(block.get_submodule(names[0])).shape[1]
    scale = 0.5 + 1.5 * _uniform(width)
    try:
        fold(block, producer, names, scale, _random(width) if shifts else None)
        after = decoder.forward(index, hidden)
    finally:
        for name, parameter in block.named_parameters():
            parameter.data.copy_(saved[name])
    # A block may add nothing (one put in as the identity).
    change = (after - before).norm()
    return (change / (before - hidden).norm()).item() if change else 0.0


def _with_shift(decoder: Decoder, index: int, names, producer: Producer) -> Producer:
    block = decoder.blocks[index]
    readers = [block.get_submodule(name) for name in names]
    biases = [getattr(m, "bias", None) for m in (block.get_submodule(producer.name), *readers)]
    shifted = replace(producer, takes_shift=True)
    takes = all(b is not None for b in biases)
    takes = takes and _change(decoder, index, names, shifted, shifts=True) < PROVED
    return shifted if takes else producer


def _producer(run: FreeRun, watch: Watch, names: list[str]) -> Producer | None:
    if norm := watch.fed_by(names[0]):
        return Producer("norm", norm, offset=offset_of(watch.norms[norm]))
    x = run.inputs[names[0]].reshape(-1, run.inputs[names[0]].shape[-1])
    for name in run.feeders(names[0]):
        free = run.outputs[name]
        (slopes,) = torch.autograd.grad(x.sum(), free, retain_graph=True)
        slopes = (slopes * free).reshape(-1, free.shape[-1]).detach()
        rows = _rows(x.detach(), slopes) if len(slopes) == len(x) == WINDOWS else None
        if rows is not None:
            return Producer("linear", name, rows)
    return None


def _rows(x: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor | None:
    """The row [I] behind every channel of x [N, I], from slopes [N, R]; None where one has none."""
    x, slopes = x.double(), slopes.double()
    distinct, which, count = torch.unique(x, dim=1, return_inverse=True, return_counts=True)
    wanted = distinct * count
    weights = torch.linspace(0.3, 1.7, len(x), dtype=x.dtype, device=x.device)
    keys, order = (weights @ slopes).sort()
    place = torch.searchsorted(keys, weights @ wanted).clamp(1, len(keys) - 1)
    rows = torch.full_like(place, -1)
    largest = wanted.abs().amax(0)
    for candidate in (place - 1, place):
        row = order[candidate]
        fits = (slopes[:, row] - wanted).abs().amax(0) <= EXACT * largest
        rows[fits & (largest > 0)] = row[fits & (largest > 0)]
    if ((rows < 0) & (largest > 0)).any() or not (largest > 0).any():
        return None
    return rows[which]


def _per_row(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of [I] values over the channels of each row, [R]; 0 for a row without any."""
    seen = rows >= 0
    sums = torch.zeros(count, device=values.device).index_add_(0, rows[seen], values[seen])
    return sums / torch.bincount(rows[seen], minlength=count).clamp(min=1)


@torch.no_grad()
def offset_of(norm: nn.Module) -> float:
    """a, where the norm multiplies by a + weight: 1 for Gemma's, 0 for others."""
    x = torch.linspace(-1, 2, len(norm.weight), device=norm.weight.device)[None, None]
    saved = {name: p.data.clone() for name, p in norm.named_parameters()}
    try:
        for parameter in norm.parameters():
            parameter.data.zero_()
        zero = norm(x).norm()
        norm.weight.data.fill_(1)
        one = norm(x).norm()
    finally:
        for name, parameter in norm.named_parameters():
            parameter.data.copy_(saved[name])
    return float(round((zero / (one - zero)).item()))


def same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes."""
    return a is not None and a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _uniform(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1))
