"""Any causal LM of transformers as embedding -> blocks -> head, with one block in memory at a time.

The model is built without weights. Its list of blocks is replaced by stand-ins that record what the
model hands to each block (masks, rotary tables, ...), so no family needs a table here; embedding,
final norm and head run as the model's own code. A block's weights are read from the checkpoint
when it is its turn and dropped afterwards.

Legend: B windows in a batch, T tokens per window, D hidden size, V vocabulary.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from harness import checkpoint, precision, sizes
from harness.errors import UserError, one_line
from harness.perplexity import window_length
from harness.stages import linears
from harness.tensors import Weights

TOKENS_PER_BATCH = 4096


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

    Attributes:
        dtype: of the computation. stored_dtype: of the checkpoint, and of what is made of it.
        differentiable: True lets autograd see what embed, forward and logits do (default False).
        blocks: the blocks, on the meta device except while loaded.
        prefix: their name in the model, "model.layers" for LLaMA.
        weights: the checkpoint's tensors (:class:`harness.tensors.Weights`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | str = "auto",
        name: str | Path | None = None,
        sizes_only: bool = False,
    ):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.weights = Weights(folder)
        self.config = checkpoint.load_config(folder)
        vars(self.config).pop("quantization_config", None)
        self.device = torch.device(device)
        self.stored_dtype = self.weights.dtype
        if sizes_only:
            dtype = self.stored_dtype
        elif isinstance(dtype, str):
            dtype = precision.choose(dtype, self.stored_dtype, self.device, name or folder)
        self.dtype = dtype
        try:
            with init_empty_weights(include_buffers=False):
                model = sizes.apply(AutoModelForCausalLM.from_config(self.config, dtype=self.dtype))
        except Exception as error:  # the family's own code over the file's values
            raise UserError(
                f"{folder}/config.json describes no model that transformers can build: "
                f"{one_line(error)}"
            ) from error
        self.differentiable = False
        self.model = model.eval()
        self.prefix, self.blocks = find_blocks(self.model)
        self._parent, _, self._attribute = self.prefix.rpartition(".")
        self._tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        self._arguments: dict[tuple[int, int], list[tuple]] = {}
        self._tuple_output = False
        self._outer_loaded = False
        self._stored = self._stored_names()
        self._converted = None if self._stored or sizes_only else self._load_converted()

    def __len__(self) -> int:
        return len(self.blocks)

    # -- names and tensors ------------------------------------------------------------------

    def _stored_names(self) -> dict[str, str]:
        """Model name -> the checkpoint's name (base-model prefixes may be there or not); empty
        where some parameter is not in the checkpoint under any of these."""
        base = f"{self.model.base_model_prefix}."
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        stored = {}
        for name, tensor in self.model.state_dict().items():
            spellings = (name, name.removeprefix(base), base + name)
            found = next((s for s in spellings if s in self.weights.names), None)
            if found:
                stored[name] = found
                _check_shape(name, self.weights.shape(found), tensor.shape)
            elif name in parameters and name not in self._tied:
                if self.weights.layout != "dense":
                    self.weights.stored(name)  # says that it is missing
                return {}
        return stored

    def _load_converted(self) -> dict[str, torch.Tensor]:
        """The whole model through transformers, for families whose files need its conversions
        (fused experts, renamed heads)."""
        folder = self.weights.folder
        print(
            f"{folder} stores its tensors under other names than the model: loading it whole.",
            file=sys.stderr,
        )
        return checkpoint.load_dense(folder, self.stored_dtype).state_dict()

    def block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Every tensor of block ``index`` by its full model name, bit for bit as it is stored."""
        return {n: self.stored(n) for n in self._inner(index)}

    def outer_tensors(self) -> dict[str, torch.Tensor]:
        """The same for everything outside the blocks, tied tensors once."""
        return {n: self.stored(n) for n in self._outer()}

    def outer_size(self) -> int:
        """How many numbers those hold."""
        tensors = self.model.state_dict()
        return sum(tensors[name].numel() for name in self._outer())

    def _inner(self, index: int) -> list[str]:
        names = [f"{self.prefix}.{index}.{n}" for n in self.blocks[index].state_dict()]
        return [n for n in names if self.has(n)]

    def _outer(self) -> list[str]:
        names = [n for n in self.model.state_dict() if not n.startswith(self.prefix + ".")]
        return [n for n in names if n not in self._tied and self.has(n)]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of this model name."""
        return name in (self._stored if self._converted is None else self._converted)

    def stored(self, name: str) -> torch.Tensor:
        """A tensor by its model name, bit for bit as the checkpoint holds it, on the CPU; of a
        packed matrix the values, in the checkpoint's dtype.

        Raises:
            UserError: it holds NaN or infinite values.
        """
        return _finite(name, self._tensor(name, None))

    def _read(self, name: str) -> torch.Tensor:
        """The same in the dtype of the computation."""
        return _finite(name, self._tensor(name, self.dtype))

    def _tensor(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        if self._converted is None:
            return self.weights.read(self._stored[name], dtype)
        tensor = self._converted[name]
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    def load(self, index: int, tensors: dict[str, torch.Tensor] | None = None) -> nn.Module:
        """Block ``index`` with its weights (or ``tensors``, by full name) on the device."""
        block = self.blocks[index]
        if tensors is None:
            tensors = {n: self._read(n) for n in self._inner(index)}
        _fill(block, tensors, self.device, self.dtype, f"{self.prefix}.{index}.")
        for buffer_name, buffer in list(block.named_buffers()):
            _put(block, buffer_name, buffer.to(self.device), buffer=True)
        return block

    def release(self, index: int) -> None:
        """Drop the weights of block ``index``."""
        block = self.blocks[index]
        for name, parameter in list(block.named_parameters()):
            _put(block, name, torch.empty_like(parameter, device="meta"))

    # -- running ----------------------------------------------------------------------------

    @_no_grad
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] that enter block 0, for token ids [B, T]."""
        self._load_outer()
        seen = []

        def act(index):
            def record(hidden, args, kwargs):
                seen.append((hidden, args, kwargs))
                if index == len(self) - 1:
                    raise _Stop
                # Never what this block was handed: some models take the first item of what a
                # block returns, of a bare tensor its first window, and so on to nothing.
                return seen[0][0]

            return record

        self._run_outer(ids, [act(i) for i in range(len(self))])
        if len(seen) != len(self):
            raise UserError(
                f"{type(self.model).__name__} does not call its blocks one after another."
            )
        arguments = [(args, kwargs) for _, args, kwargs in seen]
        known = self._arguments.setdefault(tuple(ids.shape), arguments)
        if not _same(known, arguments):
            raise UserError(
                f"the blocks of {type(self.model).__name__} take inputs that differ from window to "
                "window beside the hidden states; this family is not supported block by block."
            )
        return seen[0][0]

    @_no_grad
    def forward(self, index: int, hidden: torch.Tensor, block: nn.Module | None = None):
        """Output [B, T, D] of the loaded block ``index``, or of ``block`` in its place; some [B, T]
        ids were embedded before."""
        args, kwargs = self._arguments[tuple(hidden.shape[:2])][index]
        output = (block or self.blocks[index])(hidden, *args, **kwargs)
        self._tuple_output = isinstance(output, tuple)
        return output[0] if self._tuple_output else output

    @_no_grad
    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] from the last block's output, through the model's own norm and head."""
        last = len(self) - 1

        def act(index):
            def inject(_, args, kwargs):
                value = hidden if index == last else _
                return (value,) if self._tuple_output else value

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
        _fill(self.model, outer, self.device, self.dtype)
        for name, buffer in list(self.model.named_buffers()):
            if not name.startswith(self.prefix + "."):
                _put(self.model, name, buffer.to(self.device), buffer=True)
        self.model.tie_weights()
        self._outer_loaded = True


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost ModuleList whose members hold linears."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(linears(b) for b in module):
            return name, module
    raise UserError(f"{type(model).__name__} has no list of blocks with linear layers in them.")


def batches(windows: torch.Tensor, batch_size: int | None = None) -> list[torch.Tensor]:
    """Windows [N, T] cut into batches [B, T], by default of about TOKENS_PER_BATCH tokens."""
    size = batch_size or max(1, TOKENS_PER_BATCH // windows.shape[1])
    return list(windows.split(size))


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
    decoder = Decoder(checkpoint.resolve(model), device=device, dtype=dtype, name=model)
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


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b)


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(
            f"{name} holds NaN or infinite values; the checkpoint is damaged or was trained to "
            "divergence. Get another copy."
        )
    return tensor


def _fill(
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    device,
    dtype: torch.dtype,
    prefix: str = "",
) -> None:
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(prefix)
        is_buffer = name not in dict(module.named_parameters(remove_duplicate=False))
        current = module.get_buffer(name) if is_buffer else module.get_parameter(name)
        _check_shape(full_name, tensor.shape, current.shape)
        if current.is_floating_point() and not tensor.is_floating_point():
            raise UserError(
                f"{full_name} holds {tensor.dtype}, and config.json tells no quantization that it "
                "is of; get the dense checkpoint."
            )
        dtype_here = dtype if tensor.is_floating_point() else tensor.dtype
        _put(module, name, tensor.to(device, dtype_here), buffer=is_buffer)


def _check_shape(name: str, stored: tuple[int, ...] | None, wanted: torch.Size) -> None:
    if stored is not None and tuple(stored) != tuple(wanted):
        raise UserError(
            f"{name} has shape {list(stored)} in the checkpoint; config.json asks for "
            f"{list(wanted)}. The two do not belong together."
        )


def _put(module: nn.Module, name: str, tensor: torch.Tensor, buffer: bool = False) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if buffer:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
