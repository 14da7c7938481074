"""What a model weighs: parameters, bytes, bits per weight, multiply-accumulates per token.

Checkpoints are measured from the headers of their safetensors files; no weight is read. Packed
linears count as the dense matrices they stand for.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from harness.errors import UserError

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
# What marks a linear X as packed, and the other tensors that it needs (all names follow "X.").
PACKED = {
    "weight_packed": ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "qweight": ("qzeros", "scales", "g_idx"),
    "weight_bitmask": ("weight", "weight_shape"),
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: dtype as the format names it ("BF16"), bytes, place."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


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


def read_headers(folder: Path) -> dict[str, Stored]:
    """Name -> place of every tensor in a folder's safetensors files ({} where there are none).

    Raises UserError for a truncated or damaged file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / name for name in files]
    else:
        single = folder / "model.safetensors"
        paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    return {name: stored for path in paths for name, stored in _header(path).items()}


def _header(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = Stored(
                entry["dtype"], tuple(entry["shape"]), end - begin, path, 8 + length + begin
            )
        last = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
        if last != size:
            raise ValueError(f"{size} bytes where the header promises {last}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the index beside it names it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged or truncated ({error}); write or download it again"
        ) from None
    return tensors


def packed_linears(tensors: Mapping[str, Stored]) -> dict[str, tuple[tuple[int, int], int]]:
    """Linear name -> ((rows, columns) of the dense matrix it stands for, bytes of its tensors).

    Pruned linears without their zeros are among them.
    """
    found = {}
    for name, stored in tensors.items():
        linear, _, suffix = name.rpartition(".")
        if suffix not in PACKED:
            continue
        names = [name, *(f"{linear}.{s}" for s in PACKED[suffix])]
        nbytes = sum(tensors[n].nbytes for n in names if n in tensors)
        if suffix == "qweight":
            # 32 bits hold 32/bits rows of [in, out]; g_idx has one entry per input.
            shape = (stored.shape[1], tensors[f"{linear}.g_idx"].shape[0])
        else:
            shape = _small_int64s(tensors[f"{linear}.weight_shape"])
        found[linear] = (shape, nbytes)
    return found


def stored_size(folder: Path, config) -> Footprint:
    """`footprint` of a checkpoint with its transformers config, whatever its files.

    Old .bin files have no header: their parameters are counted from the config.
    """
    if any(folder.glob("*.safetensors")):
        tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
        return footprint(folder, bool(tied))
    from harness.macs import skeleton

    disk = sum(path.stat().st_size for path in folder.glob("*.bin"))
    if not disk:
        raise UserError(f"{folder} holds no weights (neither .safetensors nor .bin)")
    parameters = sum(p.numel() for p in skeleton(config).parameters())
    return Footprint(parameters, 0, disk, None, 8 * disk / parameters)


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every matrix in a checkpoint's files, by the name of its module."""
    tensors = read_headers(folder)
    plain = {
        name.removesuffix(".weight"): stored.shape
        for name, stored in tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    return {**plain, **{name: shape for name, (shape, _) in packed_linears(tensors).items()}}


def _small_int64s(stored: Stored) -> tuple[int, ...]:
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        raw = file.read(stored.nbytes)
    return tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))


def is_parameter(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored floating tensor is a weight: old files also hold masks and frequencies."""
    return 1 <= len(shape) <= 3 and not name.endswith("inv_freq")


def footprint(folder: Path, tied: bool = False) -> Footprint:
    """Sizes of the safetensors checkpoint in `folder`.

    `tied`: the config ties the output head to the embedding, so a stored copy of it is not counted
    as parameters. Raises UserError for a damaged file and where there is no weight.
    """
    tensors = read_headers(folder)
    packed = packed_linears(tensors)
    belongs = {f"{linear}.{s}" for linear in packed for k, v in PACKED.items() for s in (k, *v)}
    masked = {linear for linear in packed if f"{linear}.weight_bitmask" in tensors}
    quantized = sum(prod(shape) for linear, (shape, _) in packed.items() if linear not in masked)
    plain = sum(prod(packed[linear][0]) for linear in masked)
    for name, stored in tensors.items():
        if name in belongs or not is_parameter(name, stored.shape) or stored.dtype not in BYTES:
            continue
        if tied and name.endswith("lm_head.weight") and len(tensors) > 1:
            continue
        plain += prod(stored.shape)
    parameters = quantized + plain
    if not parameters:
        raise UserError(f"{folder} holds no weights")
    stored_bytes = sum(t.nbytes for t in tensors.values())
    packed_bytes = sum(nbytes for linear, (_, nbytes) in packed.items() if linear not in masked)
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
