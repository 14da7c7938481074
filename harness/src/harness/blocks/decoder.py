"""Any causal LM of transformers as embedding -> blocks -> head, with one block in memory at a time.

The model is built without weights. Its list of blocks is replaced by stand-ins that record what the
model hands to each block (masks, rotary tables, ...), so no family needs a table here; embedding,
final norm and head run as the model's own code. A block's weights are read from the checkpoint
when it is its turn and dropped afterwards.

Legend: B windows in a batch, T tokens per window, D hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness import distributed, modules, precision
from harness.blocks.places import fill, finite, keep_float32, put
from harness.checkpoint import load, names, nonuniform
from harness.checkpoint.nonuniform import skeleton
from harness.checkpoint.weights import Weights
from harness.errors import UserError, one_line
from harness.modules import find_blocks

TOKENS_PER_BATCH = 4096
PROBE_TOKENS = 4
# (model name, stored tensor, reader of any other by its name) -> the tensor in its place.
Transform = Callable[[str, torch.Tensor, Callable[[str], torch.Tensor]], torch.Tensor]
MOST_RETURNED = 5  # items in the tuple that a block returns


class _Stop(Exception):
    pass


class _StandIn(nn.Module):
    """Takes a block's place; answers for its attributes (attention_type, ...)."""

    def __init__(self, block: nn.Module, act):
        super().__init__()
        self.__dict__["_block"] = block
        self.__dict__["_act"] = act

    def __getattr__(self, name):
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden, *args, **kwargs):
        return self.__dict__["_act"](hidden, args, kwargs)


def _no_grad(method):
    """torch.no_grad(), unless the decoder is told to be differentiable."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with torch.set_grad_enabled(self.differentiable):
            return method(self, *args, **kwargs)

    return wrapped


class Decoder:
    """A checkpoint opened for block-by-block work.

    Args:
        dtype: of the computation: a torch.dtype, or the value of --dtype, of which "auto" asks the
            device (:func:`harness.precision.choose`). name: the model as the user named it.
        sizes_only: no tensor will be asked for; families whose files transformers has to convert
            are then not read.
        transform: changes every tensor as it is read, so that what is computed, and what is written
            of it, is another model of the same family whose head is not tied to its embedding; a
            rotation (rotation.py).

    Attributes:
        dtype: of the computation. stored_dtype: of the checkpoint, and of what is made of it.
        differentiable: True lets autograd see what embed, forward and logits do (default False).
        blocks: the blocks, on the meta device except while loaded.
        prefix: their name in the model, "model.layers" for LLaMA.
        weights: the checkpoint's tensors (:class:`harness.checkpoint.weights.Weights`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | str = "auto",
        name: str | Path | None = None,
        sizes_only: bool = False,
        transform: Transform | None = None,
    ):
        from accelerate import init_empty_weights

        self.weights = Weights(folder)
        self.config = load.load_config(folder)
        vars(self.config).pop("quantization_config", None)
        self.transform, self._turned = transform, {}
        self.device = torch.device(device)
        self.stored_dtype = self.weights.dtype
        if sizes_only:
            dtype = self.stored_dtype
        elif isinstance(dtype, str):
            dtype = precision.choose(dtype, self.stored_dtype, self.device, name or folder)
        self.dtype = dtype
        # First without buffers: they are made for real below, of whatever size the config says.
        self.names = names.match(skeleton(self.config), self.weights)
        if transform is not None:
            plain, tied = self.names.plain, self.names.tied
            untied = plain | {name: plain[source] for name, source in tied.items()}
            self.names = replace(self.names, plain=untied, tied={})
            for config in (self.config, self.config.get_text_config()):
                config.tie_word_embeddings = False
        with init_empty_weights(include_buffers=False):
            model = nonuniform.build(self.config, self.dtype)
        self.differentiable = False
        self.model = model.eval()
        keep_float32(self.model, self.dtype)
        self.prefix, self.blocks = find_blocks(self.model)
        self._parent, _, self._attribute = self.prefix.rpartition(".")
        self._arguments: dict[tuple[int, int], list[tuple]] = {}
        self._returns: int | None = None  # items of the tuple that a block returns, 0: no tuple
        self._outer_loaded = False
        shared = [n for n in self.names.tied if n.startswith(self.prefix + ".")]
        if shared:
            raise UserError(
                f"{type(self.model).__name__} shares weights between its blocks ({shared[0]}), "
                "which block-by-block work does not support."
            )
        self._made: dict[str, torch.Tensor] = {}
        if self.names.converted and not sizes_only:
            self._made = self._load_converted()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def has_conv1d(self) -> bool:
        """Whether blocks hold GPT-2's Conv1D, whose weight is [in, out]."""
        return any(isinstance(module, Conv1D) for module in self.blocks.modules())

    def ignore(self, patterns: Sequence[str]) -> None:
        """Leave the linears that ``patterns`` mean dense, see :func:`harness.modules.ignore`."""
        if patterns:
            left = modules.ignore(self.prefix, self.blocks, patterns)
            distributed.say(f"left dense by --ignore: {len(left)} linears, {left[0]} among them")

    # -- names and tensors ------------------------------------------------------------------

    def _load_converted(self) -> dict[str, torch.Tensor]:
        """What transformers makes of several stored tensors (fused experts) or turns, which takes
        loading the whole model."""
        folder = self.weights.folder
        distributed.say_once(
            f"{folder} stores its tensors under other names than the model: loading it whole."
        )
        state = load.load_model(folder, dtype=self.stored_dtype).state_dict()
        return {n: t for n, t in state.items() if n not in self.names.plain}

    def block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Every tensor of block ``index`` by its full model name, bit for bit as it is stored."""
        return {n: self.stored(n) for n in self._inner(index)}

    def outer_tensors(self) -> dict[str, torch.Tensor]:
        """The same for everything outside the blocks, tied tensors once; with what the files hold
        beyond the model (the blocks of a multi-token predictor), by the names there."""
        extra = {n: self.weights.read(n) for n in self.names.extra}
        return extra | {n: self.stored(n) for n in self._outer()}

    def outer_size(self) -> int:
        """How many numbers those hold."""
        tensors = self.model.state_dict()
        return sum(tensors[name].numel() for name in self._outer())

    def _inner(self, index: int) -> list[str]:
        names = [f"{self.prefix}.{index}.{n}" for n in self.blocks[index].state_dict()]
        return [n for n in names if self.has(n)]

    def _outer(self) -> list[str]:
        outside = [n for n in self.model.state_dict() if not n.startswith(self.prefix + ".")]
        return [n for n in outside if n not in self.names.tied and self.has(n)]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of this model name."""
        return name in self.names.plain or name in self._made

    def stored(self, name: str) -> torch.Tensor:
        """A tensor by its model name, bit for bit as the checkpoint holds it, on the CPU; of a
        packed matrix the values, in the checkpoint's dtype. Of a decoder with a transform, what
        that makes of it.

        Raises:
            UserError: it holds NaN or infinite values.
        """
        tensor = self._stored(name)
        if self.transform is None or not tensor.is_floating_point():
            return tensor
        if name not in self._turned:
            self._turned[name] = self.transform(name, tensor, self._stored)
        return self._turned[name]

    def _stored(self, name: str) -> torch.Tensor:
        return finite(name, self._tensor(name, None))

    def _read(self, name: str) -> torch.Tensor:
        """The same in the dtype in which the model computes with it."""
        if self.transform is not None:
            return self.stored(name)
        return finite(name, self._tensor(name, self.dtype))

    def _tensor(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        if name in self._made:
            return self._made[name]
        stored = self.names.plain[name]
        # Plain tensors are cast where they are put: transformers keeps some in float32.
        return self.weights.read(stored, dtype if self.weights.is_packed(stored) else None)

    def load(self, index: int, tensors: dict[str, torch.Tensor] | None = None) -> nn.Module:
        """Block ``index`` with its weights (or ``tensors``, by full name) on the device."""
        block = self.blocks[index]
        if tensors is None:
            tensors = {n: self._read(n) for n in self._inner(index)}
        fill(block, tensors, self.device, f"{self.prefix}.{index}.")
        for buffer_name, buffer in list(block.named_buffers()):
            put(block, buffer_name, buffer.to(self.device), buffer=True)
        return block

    def release(self, index: int) -> None:
        """Drop the weights of block ``index``."""
        block = self.blocks[index]
        self._turned.clear()
        for name, parameter in list(block.named_parameters()):
            put(block, name, torch.empty_like(parameter, device="meta"))

    # -- running ----------------------------------------------------------------------------

    @_no_grad
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] that enter block 0, for token ids [B, T].

        Raises:
            UserError: this model's blocks cannot be run one by one.
        """
        self._load_outer()
        if self._returns is None:
            self._returns = self._prove(ids[:1, :PROBE_TOKENS])
        seen = []

        def act(index):
            def record(hidden, args, kwargs):
                seen.append((hidden, args, kwargs))
                if index == len(self) - 1:
                    raise _Stop
                return self._as_returned(seen[0][0])

            return record

        self._run_outer(ids, [act(i) for i in range(len(self))])
        arguments = [(args, kwargs) for _, args, kwargs in seen]
        held = self._arguments.setdefault(tuple(seen[0][0].shape[:2]), arguments)
        if not _same(held, arguments):
            raise UserError(
                f"the blocks of {type(self.model).__name__} take inputs that differ from window to "
                "window beside the hidden states; this family is not supported block by block."
            )
        return seen[0][0]

    def _as_returned(self, hidden: torch.Tensor, other=None):
        """``hidden`` in the shape in which the model takes what a block returns."""
        return (hidden, *[other] * (self._returns - 1)) if self._returns else hidden

    def _prove(self, ids: torch.Tensor) -> int:
        """Whether the model hands every block what the one before returned, each once and in order,
        and nothing else of it; how many items it takes from a block (0: no tuple).

        Raises:
            UserError: it does not: what block by block work would make of it is another model.
        """
        fault = "does not call its blocks one after another"
        for count in range(MOST_RETURNED):
            self._returns = count
            fault_here, reached = self._try_out(ids)
            if fault_here is None:
                return count
            fault = fault_here if reached or not count else fault
        self._returns = None
        raise UserError(
            f"{type(self.model).__name__} {fault}; this family is not supported block by block."
        )

    def _try_out(self, ids: torch.Tensor) -> tuple[str | None, bool]:
        """Run the model once with marks in place of what its blocks return."""
        marks, calls, other = [], [], object()
        wrong = []

        def act(index):
            def mark(hidden, args, kwargs):
                calls.append(index)
                handed = marks[-1] if marks else hidden
                if hidden is not handed and not _same(hidden, handed):
                    wrong.append("changes hidden states between its blocks")
                if any(value is other for value in (*args, *kwargs.values())):
                    wrong.append("hands on more than hidden states from block to block")
                marks.append(torch.full_like(hidden, 1 + len(marks) / 8))
                return self._as_returned(marks[-1], other)

            return mark

        try:
            self._run_outer(ids, [act(i) for i in range(len(self))])
        except (torch.OutOfMemoryError, MemoryError, UserError):
            raise
        except Exception as error:  # the family's own code, given what its blocks do not return
            return f"cannot be run on text alone ({one_line(error)})", False
        if calls != list(range(len(self))):
            wrong.append("does not call its blocks one after another")
        return (wrong[0] if wrong else None), True

    @_no_grad
    def forward(self, index: int, hidden: torch.Tensor, block: nn.Module | None = None):
        """Output [B, T, D] of the loaded block ``index``, or of ``block`` in its place; some [B, T]
        ids were embedded before."""
        args, kwargs = self._arguments[tuple(hidden.shape[:2])][index]
        output = (block or self.blocks[index])(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    @_no_grad
    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] from the last block's output, through the model's own norm and head."""
        last = len(self) - 1

        def act(index):
            def inject(_, args, kwargs):
                return self._as_returned(hidden if index == last else _)

            return inject

        return self._run_outer(ids, [act(i) for i in range(len(self))])

    def arguments(self, index: int) -> list[tuple[int, dict]]:
        """What block ``index`` is handed by name beside hidden states, with the number of windows,
        for every size of batch that was embedded."""
        return [(shape[0], known[index][1]) for shape, known in self._arguments.items()]

    def _run_outer(self, ids, acts):
        stand_ins = nn.ModuleList(_StandIn(b, a) for b, a in zip(self.blocks, acts, strict=True))
        parent = self.model.get_submodule(self._parent)
        setattr(parent, self._attribute, stand_ins)
        try:
            return self.model(ids.to(self.device), use_cache=False).logits
        except _Stop:
            return None
        finally:
            setattr(parent, self._attribute, self.blocks)

    def _load_outer(self) -> None:
        if self._outer_loaded:
            return
        outer = {n: self._read(n) for n in self._outer()}
        fill(self.model, outer, self.device)
        for name, buffer in list(self.model.named_buffers()):
            if not name.startswith(self.prefix + "."):
                put(self.model, name, buffer.to(self.device), buffer=True)
        for name, source in self.names.tied.items():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[leaf] = self.model.get_parameter(source)
        self._outer_loaded = True
        self._turned.clear()


def batches(windows: torch.Tensor, batch_size: int | None = None) -> list[torch.Tensor]:
    """Windows [N, T] cut into batches [B, T], by default of about TOKENS_PER_BATCH tokens."""
    size = batch_size or max(1, TOKENS_PER_BATCH // windows.shape[1])
    return list(windows.split(size))


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b)
