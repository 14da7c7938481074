"""One block in hand: what the acts of a layer-wise method see of it, and change.

An *act* is a function of a :class:`BlockInHand`. It looks at the statistics of a stage's input, at
the calls of a submodule, at the block's output; it puts new weights, which later acts see, and
notes what the log is to say. A method is a list of acts (sequential.py): search, fold, train,
round. :func:`per_stage` makes the act of methods that change one stage's linears after another
from the statistics of their input, as GPTQ and SparseGPT do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import distributed, memory, precision
from harness.blocks.decoder import Decoder
from harness.blocks.stages import PausedForwards
from harness.blocks.streams import Streams
from harness.checkpoint import nonuniform
from harness.errors import UserError
from harness.modules import get_matrix, linears, set_matrix, turn
from harness.quant.grid import QuantizedWeight

SHARE_OF_FREE_MEMORY = 0.6


@dataclass
class Update:
    """A linear's new weight [out, in], its relative output error |(W - W')X|² / |WX|², what the log
    notes of it, and tensors that are no part of the model: ``side["low"]`` of linear X goes to the
    side file as X.low."""

    weight: torch.Tensor | QuantizedWeight
    error: float | None = None
    note: dict = field(default_factory=dict)
    side: dict[str, torch.Tensor] = field(default_factory=dict)


class BlockInHand:
    """Block ``index`` of ``decoder``, loaded; names are those within the block.

    Args:
        packs: the result holds integers; without, they are stored as the values they stand for.

    Attributes:
        prefix: its full name, "model.layers.3". block: the module, as the acts so far left it.
        stages: names of its linears by the tensor that feeds them, in the order of their calls.
        updates: the linears that were given weights. parameters: the other tensors that were.
        notes: of the block, for every row of its log.
    """

    def __init__(self, decoder: Decoder, index: int, streams: Streams, packs: bool = False):
        self.decoder, self.index, self.streams, self.packs = decoder, index, streams, packs
        self.prefix = f"{decoder.prefix}.{index}"
        self.block = decoder.load(index)
        self.updates: dict[str, Update] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.notes: dict = {}
        self._paused: PausedForwards | None = None
        streams.look_ahead(index)
        self.stages = streams.stages(index, self.block)

    def __str__(self) -> str:
        return f"block {self.index}"

    # -- what an act looks at ---------------------------------------------------------------

    def statistics(
        self, make: Callable[[int, torch.device], Any], true_sequential: bool = True
    ) -> Iterator[tuple[list[str], Any]]:
        """(names, statistics) stage by stage, summed over all ranks.

        In true-sequential order a stage sees the effect of what was put for the earlier ones, and
        the block runs once for all (stages.py). In the plain order all statistics come from one
        forward of the block as it is now, and are in memory together.

        Args:
            make: (columns, device) -> an object with ``add(inputs [B, T, I])`` and ``reduce()``.
        """
        order = self._true_sequential if true_sequential else self._plain
        for names, gathered in order(make):
            gathered.reduce()
            yield names, gathered

    def _true_sequential(self, make):
        self._drop_paused()
        forwards = [lambda b=b: self.forward(b) for b in range(len(self.streams.inputs))]
        paused = PausedForwards(self.block, self.stages, forwards, keep=self._fits())
        try:
            for number, names in enumerate(self.stages):
                gathered = self._new(make, names)
                for batch in range(len(forwards)):
                    gathered.add(paused.inputs(number, batch))
                yield names, gathered
        except BaseException:
            paused.close()
            raise
        # Behind the last stage, which no later act may change: see advance().
        self._paused = paused

    def _plain(self, make):
        self._drop_paused()
        gathered = [self._new(make, names) for names in self.stages]
        hooks = [
            self.block.get_submodule(names[0]).register_forward_pre_hook(
                lambda _, args, part=part: part.add(args[0])
            )
            for names, part in zip(self.stages, gathered, strict=True)
        ]
        for batch in range(len(self.streams.inputs)):
            self.forward(batch)
        for hook in hooks:
            hook.remove()
        for names in self.stages:
            yield names, gathered.pop(0)

    def _new(self, make, names):
        columns = get_matrix(self.block.get_submodule(names[0])).shape[1]
        return make(columns, self.decoder.device)

    def calls(self, module: str) -> list[tuple[tuple, dict]]:
        """(args, kwargs) of every batch's call of the submodule ``module``, from one forward of the
        block as it is now. Hidden states among them are views of what the block computed."""
        seen: list[tuple[tuple, dict]] = []
        hook = self.block.get_submodule(module).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            for batch in range(len(self.streams.inputs)):
                self.forward(batch)
        finally:
            hook.remove()
        return seen

    def forward(self, batch: int) -> torch.Tensor:
        """The output [B, T, D] of the block as it is now, for a batch of the stream it is in."""
        return self.streams.forward(self.index, self.streams.inputs[batch])

    def target(self, batch: int) -> torch.Tensor:
        """What the dense block gives on the dense stream, [B, T, D], on the device."""
        return self.streams.targets[batch].to(self.decoder.device)

    def matrices(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Weights [out, in] of linears, float32: with all the digits of the checkpoint where the
        dtype of the computation has fewer."""
        return {name: self._matrix(name) for name in names}

    def _matrix(self, name: str) -> torch.Tensor:
        module, decoder = self.block.get_submodule(name), self.decoder
        if precision.holds(decoder.dtype, decoder.stored_dtype):
            return get_matrix(module).float()
        if name in self.updates:
            weight = self.updates[name].weight
            return (
                weight.float()
                if isinstance(weight, torch.Tensor)
                else weight.dequantize(torch.float32)
            )
        stored = decoder.stored(f"{self.prefix}.{name}.weight").to(decoder.device)
        return turn(module, stored).float()

    # -- what an act changes ----------------------------------------------------------------

    @torch.no_grad()
    def put(self, updates: dict[str, Update | torch.Tensor]) -> None:
        """New weights: by a linear's name an :class:`Update`, by a parameter's (a norm's gain, a
        bias) its tensor. Both are rounded to the checkpoint's dtype before they are run on."""
        if self._paused is not None:
            self._drop_paused()
        stored = self.decoder.stored_dtype
        for name, update in updates.items():
            if isinstance(update, torch.Tensor):
                self.parameters[name] = update.to(stored)
                self.block.get_parameter(name).data.copy_(self.parameters[name])
                continue
            quantized = isinstance(update.weight, QuantizedWeight)
            values = update.weight.dequantize(stored) if quantized else update.weight.to(stored)
            set_matrix(self.block.get_submodule(name), values)
            if not (quantized and self.packs):
                update.weight = values
            self.updates[name] = update

    def note(self, key: str, value) -> None:
        """What the log's rows of this block say beside each linear's own."""
        self.notes[key] = value

    # -- behind it --------------------------------------------------------------------------

    def advance(self) -> None:
        """Take the streams on behind the block as it is now.

        Raises:
            UserError: it gives NaN or infinite values.
        """
        streams = self.streams
        if self._paused is not None:
            for batch in range(len(streams.inputs)):
                streams.inputs[batch] = self._paused.finish(batch).to(streams.store)
            self._drop_paused()
        else:
            streams.advance(self.index)
        if not all(torch.isfinite(hidden).all() for hidden in streams.inputs):
            raise UserError(
                f"{self} gives NaN or infinite activations in {self.decoder.dtype}; try "
                "--dtype bfloat16 or float32."
            )

    def _drop_paused(self) -> None:
        if self._paused is not None:
            self._paused.close()
            self._paused = None

    def _fits(self) -> bool:
        """Whether all batches' activations inside the block may be held at once."""
        config = self.decoder.model.config
        per_token = 3 * config.get_text_config().hidden_size
        per_token += sum(sum(get_matrix(m).shape) for m in linears(self.block).values())
        if config._attn_implementation == "eager":  # its scores and probabilities live on too
            per_token += 4 * nonuniform.model_heads(config) * self.streams.seqlen
        tokens = sum(h.shape[0] * h.shape[1] for h in self.streams.inputs)
        need = per_token * tokens * self.decoder.dtype.itemsize
        free = memory.free(self.decoder.device)
        fits = need < SHARE_OF_FREE_MEMORY * free
        if not fits:
            distributed.say(
                f"activations of one block need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                "running each stage from the block's start (slower, same result)"
            )
        return fits


Act = Callable[[BlockInHand], None]


def per_stage(update: Callable, statistics: Callable | None = None, true_sequential=True) -> Act:
    """The act of a method that changes the linears of one stage after another.

    Args:
        update: (matrices [out, in] float32 by name, statistics or None, block in hand) -> Update
            by name; a linear that it leaves out stays as it is.
        statistics: see :meth:`BlockInHand.statistics`; None for what looks at no data.
    """

    def act(hand: BlockInHand) -> None:
        if statistics is None:
            for names in hand.stages:
                hand.put(update(hand.matrices(names), None, hand))
            return
        for names, gathered in hand.statistics(statistics, true_sequential):
            hand.put(update(hand.matrices(names), gathered, hand))

    return act
