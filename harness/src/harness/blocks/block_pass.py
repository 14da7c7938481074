"""One block of the pass in sequential.py: its stages, in true-sequential or plain order.

A method is two functions: ``statistics(columns, device)`` makes an object with ``add(inputs)`` and
``reduce()`` (None for methods that look at no data), and ``update(weights, statistics, where)``
maps the stage's matrices [out, in] float32 to :class:`Update`; :class:`Where` names the block.

In true-sequential order a stage sees the effect of the earlier ones, and its block runs once
(stages.py). In the plain order all statistics come from the block's original weights, at the price
of a second forward; all stages' statistics are then in memory together.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import distributed, memory, precision
from harness.blocks.decoder import batches
from harness.blocks.stages import PausedForwards, find_stages
from harness.checkpoint import bitmask, formats, nonuniform, shards
from harness.errors import UserError
from harness.modules import get_matrix, linears, set_matrix, turn
from harness.progress import time_left
from harness.quant.grid import Grid, QuantizedWeight

SHARE_OF_FREE_MEMORY = 0.6
PROBE_TOKENS = 16


@dataclass
class Update:
    """A linear's new weight [out, in], its relative output error |(W - W')X|² / |WX|², and tensors
    that are no part of the model: ``side["low"]`` of linear X goes to the side file as X.low."""

    weight: torch.Tensor | QuantizedWeight
    error: float | None = None
    note: dict = field(default_factory=dict)
    side: dict[str, torch.Tensor] = field(default_factory=dict)


class Where(str):
    """ "block 3", for messages; its ``index`` 3; its ``prefix`` "model.layers.3"."""

    def __new__(cls, index: int, blocks: str):
        self = super().__new__(cls, f"block {index}")
        self.index, self.prefix = index, f"{blocks}.{index}"
        return self


@dataclass
class Method:
    """What a layer-wise method tells the pass.

    Attributes:
        name: for the card and the log.
        settings: recorded in recipe.yaml; a resumed run must agree with them.
        update: (stage's matrices by name, statistics or None, Where) -> Update by name.
        statistics: (columns, device) -> accumulator, or None.
        true_sequential: the order, see above.
        layout: one of :data:`harness.checkpoint.formats.FORMATS` or PRUNED_FORMATS.
        grid: of the packed result; None for dense and bitmask.
        actorder: whether packed groups were solved in act-order (recorded in the config).
        side_file: of the result, for the side tensors of all updates. side_note: its metadata, one
            entry.
    """

    name: str
    settings: dict
    update: Callable[[dict[str, torch.Tensor], Any, Where], dict[str, Update]]
    statistics: Callable[[int, torch.device], Any] | None = None
    true_sequential: bool = True
    layout: str = "dense"
    grid: Grid | None = None
    actorder: bool = False
    side_file: str | None = None
    side_note: dict[str, str] | None = None


class BlockPass:
    """The state between blocks: the hidden states of this rank's batches."""

    def __init__(self, decoder, method, windows, conv1d, quantization):
        self.decoder, self.method = decoder, method
        self.conv1d, self.quantization = conv1d, quantization
        self.begun, self.done = time.perf_counter(), 0
        self.hidden, self.store = [], torch.device("cpu")
        self.stages: dict[tuple, list[list[str]]] = {}
        if method.statistics is None:
            return
        parts = batches(windows)
        parts = parts[distributed.shares(len(parts))[distributed.rank()]]
        width = decoder.config.get_text_config().hidden_size
        size = windows.numel() * width * decoder.dtype.itemsize
        if 4 * size < memory.free(decoder.device):
            self.store = decoder.device
        self.seqlen = windows.shape[1]
        self.probe = decoder.embed(windows[:1, :PROBE_TOKENS])
        self.hidden = [decoder.embed(part).to(self.store) for part in parts]

    def compress(self, index: int) -> tuple[dict[str, torch.Tensor], list[dict], dict]:
        """Compress one block: its tensors as stored, its log rows, its side tensors."""
        started = time.perf_counter()
        decoder = self.decoder
        block = decoder.load(index)
        where = Where(index, decoder.prefix)
        if self.method.statistics is None:
            stages = [[name] for name in linears(block)]
            updates = {}
            for names in stages:
                updates |= self._update(block, names, None, where)
        else:
            stages = self._find_stages(index, block)
            order = self._true_sequential if self.method.true_sequential else self._plain
            updates = order(index, block, stages, where)
            if not all(torch.isfinite(h).all() for h in self.hidden):
                raise UserError(
                    f"{where} gives NaN or infinite activations in {decoder.dtype}; try "
                    "--dtype bfloat16 or float32."
                )
        tensors, linear_bytes = self._stored(index, block, updates)
        rows = self._rows(index, block, updates, linear_bytes)
        self._report(index, rows, time.perf_counter() - started)
        side = {
            f"{where.prefix}.{name}.{key}": tensor
            for name, update in updates.items()
            for key, tensor in update.side.items()
        }
        return tensors, rows, side

    def replay(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Run a finished block from disk, for the hidden states behind it."""
        if self.method.statistics is None:
            return
        dense = shards.decode_block(
            tensors, self.method.layout, self.quantization, self.decoder.stored_dtype, self.conv1d
        )
        self.decoder.load(index, dense)
        for i in range(len(self.hidden)):
            self.hidden[i] = self._forward(index, i)

    def _forward(self, index: int, batch: int) -> torch.Tensor:
        hidden = self.hidden[batch].to(self.decoder.device)
        return self.decoder.forward(index, hidden).to(self.store)

    def _find_stages(self, index: int, block) -> list[list[str]]:
        key = tuple((n, *get_matrix(m).shape) for n, m in linears(block).items())
        if key not in self.stages:
            forward = lambda: self.decoder.forward(index, self.probe)  # noqa: E731
            self.stages[key] = find_stages(block, forward)
            missed = set(linears(block)) - {n for stage in self.stages[key] for n in stage}
            if missed:
                distributed.say(
                    f"not compressed, their block never calls them: {', '.join(sorted(missed))}"
                )
        return self.stages[key]

    def _true_sequential(self, index, block, stages, where):
        forwards = [lambda b=b: self._forward(index, b) for b in range(len(self.hidden))]
        updates = {}
        paused = PausedForwards(block, stages, forwards, keep=self._fits(block))
        try:
            for number, names in enumerate(stages):
                statistics = self._new_statistics(block, names)
                for batch in range(len(forwards)):
                    statistics.add(paused.inputs(number, batch))
                statistics.reduce()
                updates |= self._update(block, names, statistics, where)
            for batch in range(len(forwards)):
                self.hidden[batch] = paused.finish(batch)
        finally:
            paused.close()
        return updates

    def _plain(self, index, block, stages, where):
        modules = dict(block.named_modules())
        everything = [self._new_statistics(block, names) for names in stages]
        hooks = [
            modules[names[0]].register_forward_pre_hook(lambda _, args, s=s: s.add(args[0]))
            for names, s in zip(stages, everything, strict=True)
        ]
        for batch in range(len(self.hidden)):
            self._forward(index, batch)
        for hook in hooks:
            hook.remove()
        updates = {}
        while everything:
            statistics = everything.pop(0)
            statistics.reduce()
            names = stages[len(stages) - len(everything) - 1]
            updates |= self._update(block, names, statistics, where)
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self._forward(index, batch)
        return updates

    def _new_statistics(self, block, names):
        columns = get_matrix(block.get_submodule(names[0])).shape[1]
        return self.method.statistics(columns, self.decoder.device)

    @torch.no_grad()
    def _update(self, block, names, statistics, where) -> dict[str, Update]:
        modules = {name: block.get_submodule(name) for name in names}
        matrices = {name: self._matrix(where, name, module) for name, module in modules.items()}
        updates = self.method.update(matrices, statistics, where)
        for name, update in updates.items():
            packed, stored = isinstance(update.weight, QuantizedWeight), self.decoder.stored_dtype
            values = update.weight.dequantize(stored) if packed else update.weight.to(stored)
            set_matrix(modules[name], values)
            if self.method.layout in formats.PRUNED_FORMATS:
                update.weight = values
        return updates

    def _matrix(self, where: Where, name: str, module) -> torch.Tensor:
        """A linear's weight [out, in], float32: with all its digits where the dtype of the
        computation has fewer."""
        decoder = self.decoder
        if precision.holds(decoder.dtype, decoder.stored_dtype):
            return get_matrix(module).float()
        stored = decoder.stored(f"{where.prefix}.{name}.weight").to(decoder.device)
        return turn(module, stored).float()

    def _stored(self, index, block, updates) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The block's tensors as its file will hold them, and the bytes of each updated linear."""
        decoder, prefix = self.decoder, f"{self.decoder.prefix}.{index}"
        tensors, linear_bytes = {}, {}
        for name, value in block.state_dict().items():
            linear, full = name.removesuffix(".weight"), f"{prefix}.{name}"
            update = updates.get(linear) if name.endswith(".weight") else None
            if update is None:
                tensors[full] = decoder.stored(full) if decoder.has(full) else value
                continue
            if isinstance(update.weight, QuantizedWeight):
                own = formats.encode(f"{prefix}.{linear}", update.weight, self.method.layout)
            else:
                own = {full: turn(block.get_submodule(linear), update.weight)}
                if self.method.layout == "bitmask":
                    own = bitmask.encode(f"{prefix}.{linear}", own[full])
            linear_bytes[linear] = sum(t.nbytes for t in own.values())
            tensors |= own
        return tensors, linear_bytes

    def _rows(self, index, block, updates, linear_bytes) -> list[dict]:
        return [
            {
                "block": index,
                "name": f"{self.decoder.prefix}.{index}.{name}",
                "weights": block.get_submodule(name).weight.numel(),
                "bytes": linear_bytes[name],
                "error": update.error,
                **update.note,
            }
            for name, update in updates.items()
        ]

    def _report(self, index, rows, seconds) -> None:
        self.done += 1
        if distributed.rank() or sys.stderr.isatty():
            return
        errors = [row["error"] for row in rows if row["error"] is not None]
        mean = f", mean relative error {sum(errors) / len(errors):.3g}" if errors else ""
        blocks = len(self.decoder)
        since = time.perf_counter() - self.begun
        left = time_left(since, self.done, self.done + blocks - index - 1)
        distributed.say(
            f"block {index + 1}/{blocks}: {seconds:.1f} s{mean}, peak {memory.peak()}, {left}"
        )

    def _fits(self, block) -> bool:
        """Whether all batches' activations inside a block may be held at once."""
        config = self.decoder.model.config
        per_token = 3 * config.get_text_config().hidden_size
        per_token += sum(sum(get_matrix(m).shape) for m in linears(block).values())
        if config._attn_implementation == "eager":  # its scores and probabilities live on too
            per_token += 4 * nonuniform.model_heads(config) * self.seqlen
        tokens = sum(h.shape[0] * h.shape[1] for h in self.hidden)
        need = per_token * tokens * self.decoder.dtype.itemsize
        free = memory.free(self.decoder.device)
        fits = need < SHARE_OF_FREE_MEMORY * free
        if not fits:
            distributed.say(
                f"activations of one block need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                "running each stage from the block's start (slower, same result)"
            )
        return fits
