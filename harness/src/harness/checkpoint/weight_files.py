"""Which file of a checkpoint folder holds which tensor, by transformers' rule, from headers alone.

transformers takes the first of model.safetensors, its index, pytorch_model.bin and its index that
is there, and of an index all that its files hold. A folder with both of the first two, as an
interrupted download or an older tool leaves it, holds two models unless they are the same.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from harness.errors import UserError, one_line
from harness.paths import read_json, regular

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # what the safetensors library reads


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: dtype as the format names it ("BF16"), bytes, place."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def locate(folder: Path, config: dict) -> tuple[list[Path], bool]:
    """The weight files of the checkpoint with this config.json, and whether they are safetensors.

    Raises:
        UserError: there are none, an index is damaged or names what is not there, or two different
            models lie side by side.
    """
    named = config.get("transformers_weights")  # the library's own field for another name
    if isinstance(named, str) and named.endswith(".safetensors"):
        return [regular(folder, named)], True
    if isinstance(named, str) and named.endswith(".safetensors.index.json"):
        return _of_index(folder, named), True
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if single:
        chosen = [regular(folder, SINGLE)]
        if index:
            _check_twins(folder, chosen)
        return chosen, True
    if index:
        return _of_index(folder, INDEX), True
    if (folder / OLD_SINGLE).exists():
        return [regular(folder, OLD_SINGLE)], False
    if (folder / OLD_INDEX).exists():
        return _of_index(folder, OLD_INDEX), False
    raise UserError(f"{folder} {_why_none(folder)}")


def _why_none(folder: Path) -> str:
    if list(folder.glob("gptq_model*.safetensors")) or (folder / "quantize_config.json").is_file():
        return (
            "is a folder of AutoGPTQ's first versions (gptq_model-*.safetensors): rename that file "
            "to model.safetensors, and put the contents of quantize_config.json, with "
            '"quant_method": "gptq", into config.json as quantization_config.'
        )
    if (folder / "adapter_config.json").is_file():
        return "is a LoRA adapter" + base_of_adapter(folder)
    if list(folder.glob("*.gguf")):
        return (
            "holds a .gguf file, which is not read yet; give the Hugging Face checkpoint that it "
            "was made from."
        )
    return "holds no model.safetensors (or its index); nothing to load."


def base_of_adapter(folder: Path) -> str:
    """The end of the message that refuses the LoRA adapter in ``folder``."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    named = f" of {base}" if isinstance(base, str) else ""
    return (
        f"{named}, no model: merge it into its base (peft's merge_and_unload), save that, and give "
        "the merged folder."
    )


def _of_index(folder: Path, name: str) -> list[Path]:
    where = read_json(folder / name).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(
            f"{folder / name} has no weight_map of tensors to files; it is damaged, get another "
            "copy."
        )
    ending = ".safetensors" if name.endswith(".safetensors.index.json") else ".bin"
    for file in where.values():
        if not isinstance(file, str) or not file.endswith(ending):
            raise UserError(
                f"{folder / name} names the file {file!r:.60}; expected names in {ending}."
            )
    missing = {file for file in where.values() if not (folder / file).exists()}
    if missing:
        raise UserError(f"{folder / name} names {min(missing)}, which is not there.")
    paths = [regular(folder, file) for file in sorted(set(where.values()))]
    if ending == ".safetensors":
        _check_index(folder / name, where, paths)
    return paths


def _check_index(index: Path, where: dict[str, str], paths: list[Path]) -> None:
    """Every tensor is where the index says, and in one file only."""
    held = {}
    for path in paths:
        for name in header(path):
            if name in held:
                raise UserError(
                    f"{name} is in {held[name]} and in {path.name}, which {index} both names; "
                    "the files do not belong together."
                )
            held[name] = path.name
    absent = {name for name, file in where.items() if held.get(name) != file}
    if absent:
        name = min(absent)
        raise UserError(
            f"{index} says that {where[name]} holds {name}, and it does not "
            f"({len(absent)} such tensors); index and files do not belong together."
        )


def _check_twins(folder: Path, single: list[Path]) -> None:
    """Refuse a single file beside the shards of an index where both are whole and differ."""
    try:
        shards = _of_index(folder, INDEX)
    except UserError:
        return  # the index is a torso, and transformers does not look at it either
    if shards == single:
        return
    ours = {name: stored for path in single for name, stored in header(path).items()}
    theirs = {name: stored for path in shards for name, stored in header(path).items()}
    differ = sorted(
        name for name in ours.keys() | theirs.keys() if not _equal(ours.get(name), theirs.get(name))
    )
    if differ:
        raise UserError(
            f"{folder} holds two models: {SINGLE} and the files of {INDEX} differ in "
            f"{len(differ)} tensors, {differ[0]} among them. Remove those that are not meant."
        )


def _equal(one: Stored | None, other: Stored | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        for begin in range(0, one.nbytes, 1 << 24):
            size = min(1 << 24, one.nbytes - begin)
            if left.read(size) != right.read(size):
                return False
    return True


def read_headers(folder: Path) -> dict[str, Stored]:
    """Name -> place of every tensor in a checkpoint's safetensors files; {} where its weights are
    old .bin files.

    Raises:
        UserError: see :func:`locate` and :func:`header`.
    """
    paths, safe = locate(folder, read_json(folder / "config.json"))
    return {n: stored for p in paths for n, stored in header(p).items()} if safe else {}


def header(path: Path) -> dict[str, Stored]:
    """Name -> place of every tensor in one safetensors file.

    Raises:
        UserError: the file is truncated, or its header is not that of such a file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {n: _stored(n, entry, path, 8 + length) for n, entry in entries.items()}
        end = 8 + length
        for stored in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            if stored.offset != end:
                raise ValueError("its tensors overlap or leave holes")
            end += stored.nbytes
        if end != size:
            raise ValueError(f"{size} bytes where the header promises {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is corrupt or truncated ({one_line(error)}); write or download it again."
        ) from None
    return tensors


def _stored(name: str, entry: dict, path: Path, start: int) -> Stored:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [begin, end, *shape]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name} has the shape {shape!r:.60} at {begin} to {end}")
    if dtype in BITS and 8 * (end - begin) != prod(shape) * BITS[dtype]:
        raise ValueError(f"{name} has {end - begin} bytes for {shape} of {dtype}")
    return Stored(str(dtype), tuple(shape), end - begin, path, start + begin)


def small_int64s(stored: Stored) -> tuple[int, ...]:
    """The numbers in a tensor of int64, read from its file."""
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        raw = file.read(stored.nbytes)
    return tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))
