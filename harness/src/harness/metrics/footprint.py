"""What a model weighs: parameters, bytes, bits per weight, multiply-accumulates per token.

Checkpoints are measured from the headers of their safetensors files; no weight is read. Packed
linears count as the dense matrices they stand for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from harness.checkpoint import layouts, packed, quantconfig, weight_files
from harness.checkpoint.weight_files import Stored
from harness.errors import UserError
from harness.paths import read_json

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Footprint:
    """Sizes of a checkpoint.

    `bits_per_weight` covers the quantized linears with their scales and zeros (None where nothing
    is quantized), `bits_per_parameter` everything in the files.
    """

    parameters: int
    quantized_parameters: int
    disk_bytes: int
    bits_per_weight: float | None
    bits_per_parameter: float

    def as_dict(self) -> dict:
        return asdict(self)


def packed_linears(
    tensors: Mapping[str, Stored], quantization: dict | None
) -> dict[str, tuple[tuple[int, int], int]]:
    """Linear name -> ((rows, columns) of the dense matrix it stands for, bytes of its tensors).

    Pruned linears without their zeros are among them. `quantization` is the checkpoint's
    quantization_config.
    """
    layout = quantconfig.layout_of(quantization)
    scheme, linears = quantconfig.scheme_of(quantization), {}
    for linear in packed.linears_of(tensors, layout):
        held = sum(tensors[name].nbytes for name in packed.tensors_of(linear, tensors, layout))
        grid = scheme and scheme.of(linear)
        linears[linear] = (layouts.of(layout).shape(tensors, linear, grid), held)
    return linears


def stored_size(folder: Path, config) -> Footprint:
    """`footprint` of a checkpoint with its transformers config, whatever its files.

    Of old .bin files, which have no header, and of what is not read here (AWQ, FP8, ...) the
    parameters are counted from the config.
    """
    raw = read_json(folder / "config.json")
    paths, safe = weight_files.locate(folder, raw)
    if safe and quantconfig.layout_of(quantconfig.of(raw, folder / "config.json")) != layouts.OTHER:
        tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
        return footprint(folder, bool(tied))
    from harness.checkpoint.nonuniform import skeleton

    disk = sum(path.stat().st_size for path in paths)
    parameters = sum(p.numel() for p in skeleton(config).parameters())
    return Footprint(parameters, 0, disk, None, 8 * disk / parameters)


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every matrix in a checkpoint's files, by the name of its module."""
    tensors, quantization = _read(folder)
    plain = {
        name.removesuffix(".weight"): stored.shape
        for name, stored in tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    linears = packed_linears(tensors, quantization)
    return {**plain, **{name: shape for name, (shape, _) in linears.items()}}


def _read(folder: Path) -> tuple[dict[str, Stored], dict | None]:
    """The headers of a checkpoint, checked against its quantization_config, and that."""
    tensors = weight_files.read_headers(folder)
    path = folder / "config.json"
    quantization = quantconfig.of(read_json(path), path)
    layout = quantconfig.layout_of(quantization)
    if layout != layouts.OTHER:
        shapes = {name: stored.shape for name, stored in tensors.items()}
        packed.check(shapes, layout, quantconfig.scheme_of(quantization))
    return tensors, quantization


def is_parameter(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored floating tensor is a weight: old files also hold masks and frequencies."""
    mask = len(shape) == 4 and name.endswith((".bias", "_mask"))
    return len(shape) > 0 and not mask and not name.endswith("inv_freq")


def footprint(folder: Path, tied: bool = False) -> Footprint:
    """Sizes of the safetensors checkpoint in `folder`.

    `tied`: the config ties the output head to the embedding, so a stored copy of it is not counted
    as parameters. Raises UserError for a damaged file and where there is no weight.
    """
    tensors, quantization = _read(folder)
    linears = packed_linears(tensors, quantization)
    masked = quantconfig.scheme_of(quantization) is None
    whole = sum(prod(shape) for shape, _ in linears.values())
    quantized, plain = (0, whole) if masked else (whole, 0)
    for name, stored in tensors.items():
        linear, _, part = name.rpartition(".")
        if linear in linears and part != "bias":
            continue
        if stored.dtype not in FLOATS or not is_parameter(name, stored.shape):
            continue
        if tied and name.endswith("lm_head.weight") and len(tensors) > 1:
            continue
        plain += prod(stored.shape)
    parameters = quantized + plain
    if not parameters:
        raise UserError(f"{folder} holds no weights")
    stored_bytes = sum(t.nbytes for t in tensors.values())
    packed_bytes = 0 if masked else sum(nbytes for _, nbytes in linears.values())
    return Footprint(
        parameters=parameters,
        quantized_parameters=quantized,
        disk_bytes=sum(f.stat().st_size for f in {t.file for t in tensors.values()}),
        bits_per_weight=8 * packed_bytes / quantized if quantized else None,
        bits_per_parameter=8 * stored_bytes / parameters,
    )


def _tensors_in_memory(model) -> Iterable:
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from _bitsandbytes_extras(tensor)


def _bitsandbytes_extras(tensor) -> Iterable:
    """The scales that bitsandbytes hangs on a weight instead of registering them."""
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        # On a CPU the first forward repacks them, and some attributes are gone.
        parts = (getattr(state, name, None) for name in ("absmax", "code", "offset"))
        yield from (part for part in parts if part is not None)
        state = getattr(state, "state2", None)
    scale = getattr(tensor, "SCB", None)
    if scale is not None:
        yield scale


def memory_bytes(model) -> int:
    """Bytes of a loaded model's parameters and buffers; shared storage is counted once."""
    storages = {}
    for tensor in _tensors_in_memory(model):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def loaded_bits_per_weight(model) -> float | None:
    """Bits per weight of the linears that bitsandbytes quantized on load; None without any."""
    bits = weights = 0
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            held = [module.weight, *_bitsandbytes_extras(module.weight)]
            bits += 8 * sum(t.numel() * t.element_size() for t in held)
            weights += module.in_features * module.out_features
    return bits / weights if weights else None
