"""How a compressed matrix is laid out in a file, both ways: compressed-tensors, GPTQ, bitmask.

Legend: O out features, I in features, G groups per row.

| format | tensors of one linear X |
| --- | --- |
| compressed-tensors | X.weight_packed int32 [O, ceil(I * bits / 32)], X.weight_scale [O, G], |
|                    | X.weight_shape int64 [2]; asymmetric: X.weight_zero_point int32, along O |
| gptq               | X.qweight int32 [I * bits / 32, O], X.qzeros int32 [G, O * bits / 32], |
|                    | X.scales float16 [G, O], X.g_idx int32 [I] |
| bitmask            | a pruned matrix without its zeros: bitmask.py |

The words of both hold a plain little-endian bit stream, in which values of 3, 5, 6 and 7 bits
straddle words. Before its version 0.19 the compressed-tensors library packed 32 // bits values into
a word and left the rest of it zero, so that 3 bits took 3.2: such files are read, none are written.
GPTQ's version 1 stores zero - 1; an asymmetric zero of 0 does not fit there, so asymmetric results
are written as version 2, which stores the zero itself.
"""

from collections.abc import Iterable

import numpy as np
import torch

from harness import bitmask
from harness.errors import UserError
from harness.grid import Grid, QuantizedWeight

FORMATS = ("compressed-tensors", "gptq", "dense")
PRUNED_FORMATS = ("dense", "bitmask")
GPTQ_BITS = (2, 3, 4, 8)
SUFFIXES = {
    "compressed-tensors": ".weight_packed",
    "gptq": ".qweight",
    "bitmask": ".weight_bitmask",
}


def scale_dtype(layout: str, stored: torch.dtype) -> torch.dtype:
    """The dtype in which ``layout`` stores scales of a checkpoint in ``stored``: GPTQ kernels read
    float16 only."""
    return torch.float16 if layout == "gptq" else stored


def check(layout: str, grid: Grid, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise :class:`UserError` when ``layout`` cannot hold these [O, I] matrices on this grid."""
    if layout != "gptq":
        return
    if grid.bits not in GPTQ_BITS:
        raise UserError(
            f"the gptq format holds 2, 3, 4 or 8 bits, not {grid.bits}; "
            "use --format compressed-tensors or dense."
        )
    for name, (rows, columns) in shapes.items():
        if rows * grid.bits % 32 or columns * grid.bits % 32:
            raise UserError(
                f"the gptq format needs sizes whose {grid.bits}-bit values fill 32-bit words; "
                f"{name} is {rows} x {columns}. Use --format compressed-tensors or dense."
            )


def split_names(names: Iterable[str], layout: str) -> tuple[set[str], set[str]]:
    """The linears packed in ``layout``, and the tensors that are no part of any of them."""
    suffix = SUFFIXES.get(layout)
    if suffix is None:
        return set(), set(names)
    packed = {n.removesuffix(suffix) for n in names if n.endswith(suffix)}
    plain = {n for n in names if n.rpartition(".")[0] not in packed or n.endswith(".bias")}
    return packed, plain


def encode(name: str, weight: QuantizedWeight, layout: str) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU and contiguous, that store linear ``name`` in ``layout``."""
    tensors = _encode_gptq(weight) if layout == "gptq" else _encode_compressed_tensors(weight)
    return {f"{name}.{key}": value.cpu().contiguous() for key, value in tensors.items()}


def nbytes(layout: str, grid: Grid, rows: int, columns: int, item: int) -> int:
    """Bytes of what :func:`encode` makes of an O x I matrix, its scales ``item`` bytes each."""
    groups = columns // grid.columns_per_group(columns)
    words = rows * -(-columns * grid.bits // 32)
    zeros = groups * -(-rows * grid.bits // 32)
    if layout == "gptq":
        return 4 * (words + zeros + columns) + 2 * rows * groups
    return 4 * (words + (0 if grid.symmetric else zeros)) + item * rows * groups + 16


def decode(read, name: str, layout: str, config: dict) -> QuantizedWeight:
    """Inverse of :func:`encode`; ``read(tensor_name)`` returns a stored tensor.

    ``config`` is the checkpoint's ``quantization_config``.
    """
    if layout == "gptq":
        return _decode_gptq(read, name, config)
    return _decode_compressed_tensors(read, name, config)


def matrix(
    read,
    name: str,
    layout: str,
    config: dict,
    stored: torch.dtype,
    dtype: torch.dtype,
    conv1d: bool,
) -> torch.Tensor:
    """The matrix that linear ``name`` is stored for, as the model's state dict holds it, to compute
    with in ``dtype``.

    Codes times scales are rounded to the dtype ``stored`` of the checkpoint, as a dense one would
    hold them, and so one file gives one model whatever is computed in. transformers does so where
    ``config`` has "dequantize", as ours do; elsewhere it takes the scales to ``dtype`` first.

    ``conv1d``: the model holds [in, out] where packed layouts hold [out, in].
    """
    if layout == "bitmask":
        return bitmask.decode(read, name).to(dtype)
    weight = decode(read, name, layout, config)
    if layout == "compressed-tensors":
        if not config.get("dequantize"):
            weight.scale = weight.scale.to(dtype)
        stored = weight.scale.dtype
    dense = weight.dequantize(stored).to(dtype)
    return dense.T.contiguous() if conv1d else dense


def quantization_config(grid: Grid | None, layout: str, actorder: bool, ignore: list[str]) -> dict:
    """What goes into config.json so that transformers and vLLM recognise the checkpoint."""
    if layout == "bitmask":
        return dict(bitmask.CONFIG)
    if layout == "gptq":
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if grid.symmetric else "gptq_v2",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "lm_head": False,
        }
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
        "actorder": "static" if actorder else None,
    }
    # The format is said here too: left to guess, the library takes subclasses of nn.Linear
    # (Falcon's) for dense ones, and transformers fills them with random weights.
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": group},
        # For transformers: unpack while loading, not at the first forward. That way alone it reads
        # zero points (5.24 with compressed-tensors 0.20), and rounds as :func:`matrix` says.
        "dequantize": True,
    }


def grid_of(config: dict) -> Grid:
    """The grid that a ``quantization_config`` describes."""
    if config["quant_method"] == "gptq":
        return Grid(config["bits"], config["group_size"], config["sym"])
    groups = config["config_groups"]
    weights = next(iter(groups.values()))["weights"] if len(groups) == 1 else None
    if weights is None or weights["type"] != "int":
        raise UserError("expected one config group of integer weights in quantization_config.")
    size = -1 if weights["strategy"] == "channel" else weights["group_size"]
    return Grid(weights["num_bits"], size, weights["symmetric"])


def layout_of(config: dict | None) -> str:
    """One of the formats above, or "other" for what a third library must load."""
    if not config:
        return "dense"
    method = config.get("quant_method")
    if method == "compressed-tensors" and config.get("format") == "pack-quantized":
        return "compressed-tensors"
    if method == "gptq" and not config.get("desc_act"):
        return "gptq"
    return "bitmask" if method == "bitmask" else "other"


def _encode_compressed_tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    bits = weight.grid.bits
    tensors = {
        "weight_packed": pack_bits(weight.codes, bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        tensors["weight_zero_point"] = pack_bits(weight.zero.T, bits).T
    return tensors


def _decode_compressed_tensors(read, name: str, config: dict) -> QuantizedWeight:
    grid = grid_of(config)
    rows, columns = read(f"{name}.weight_shape").tolist()
    scale = read(f"{name}.weight_scale")
    codes = _unpack(read(f"{name}.weight_packed"), grid.bits, columns, f"{name}.weight_packed")
    if grid.symmetric:
        zero = torch.full(scale.shape, 2 ** (grid.bits - 1), dtype=torch.uint8)
    else:
        packed = f"{name}.weight_zero_point"
        zero = _unpack(read(packed).T, grid.bits, rows, packed).T
    return QuantizedWeight(codes, scale, zero, grid)


def _unpack(words: torch.Tensor, bits: int, columns: int, name: str) -> torch.Tensor:
    """Codes uint8 [R, columns] from int32 [R, W], of either packing of compressed-tensors.

    The number of words tells them apart, but for a few narrow matrices: there those are of the new
    packing whose bits behind the last value are zero.
    """
    per_word = 32 // bits
    old, new = -(-columns // per_word), -(-columns * bits // 32)
    if words.shape[1] not in (old, new):
        raise UserError(
            f"{name} has {words.shape[1]} words a row; {columns} values of {bits} bits take {new} "
            f"(before compressed-tensors 0.19 {old}). The checkpoint is damaged, get another copy."
        )
    array = np.ascontiguousarray(words.numpy()).view(np.uint32)
    behind = columns * bits - 32 * (new - 1)
    if words.shape[1] == new and (old != new or behind == 32 or not (array[:, -1] >> behind).any()):
        return unpack_bits(words, bits)[:, :columns].contiguous()
    steps = np.arange(0, bits * per_word, bits, dtype=np.uint32)
    codes = (array[..., None] >> steps & np.uint32(2**bits - 1)).astype(np.uint8)
    return torch.from_numpy(codes.reshape(len(array), -1)[:, :columns].copy())


def _encode_gptq(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    columns = weight.codes.shape[1]
    size = weight.grid.columns_per_group(columns)
    stored_zero = weight.zero - 1 if weight.grid.symmetric else weight.zero
    return {
        "qweight": pack_bits(weight.codes, weight.grid.bits).T,
        "qzeros": pack_bits(stored_zero.T, weight.grid.bits),
        "scales": weight.scale.T.half(),
        "g_idx": (torch.arange(columns) // size).int(),
    }


def _decode_gptq(read, name: str, config: dict) -> QuantizedWeight:
    grid = grid_of(config)
    codes = unpack_bits(read(f"{name}.qweight").T, grid.bits)
    zero = unpack_bits(read(f"{name}.qzeros"), grid.bits).T
    if config.get("checkpoint_format", "gptq") == "gptq":
        zero = (zero + 1) & grid.max_code
    columns = codes.shape[1]
    expected = torch.arange(columns, dtype=torch.int32) // grid.columns_per_group(columns)
    if not torch.equal(read(f"{name}.g_idx"), expected):
        raise UserError(f"{name}.g_idx is not in order: dynamic act-order files are not supported.")
    return QuantizedWeight(codes, read(f"{name}.scales").T, zero, grid)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [R, C] -> int32 [R, ceil(C * bits / 32)], a little-endian bit stream along each
    row; the last word's free bits are zero."""
    array = np.ascontiguousarray(codes.cpu().numpy())
    rows, columns = array.shape
    stream = np.unpackbits(array[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(stream.reshape(rows, -1), axis=1, bitorder="little")
    words = np.zeros((rows, 4 * -(-columns * bits // 32)), np.uint8)
    words[:, : packed.shape[1]] = packed
    return torch.from_numpy(words.view(np.int32))


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_bits`: int32 [R, W] -> uint8 [R, 32 * W // bits], what the free bits
    hold with the rest."""
    array = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    stream = np.unpackbits(array, axis=1, bitorder="little")
    count = stream.shape[1] // bits
    codes = np.packbits(
        stream[:, : count * bits].reshape(len(array), count, bits), axis=-1, bitorder="little"
    )
    return torch.from_numpy(codes[..., 0].copy())
