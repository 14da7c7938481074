"""How a compressed matrix is laid out in a file, both ways: compressed-tensors, GPTQ, bitmask.

Legend: O out features, I in features, G groups per row.

| format | tensors of one linear X |
| --- | --- |
| compressed-tensors | X.weight_packed int32 [O, ceil(I / (32 // bits))], X.weight_scale [O, G], |
|                    | X.weight_shape int64 [2]; asymmetric: X.weight_zero_point int32, along O |
| gptq               | X.qweight int32 [I * bits / 32, O], X.qzeros int32 [G, O * bits / 32], |
|                    | X.scales float16 [G, O], X.g_idx int32 [I] |
| bitmask            | a pruned matrix without its zeros: bitmask.py |

The first is packed by the compressed-tensors library itself: 32 // bits values per word, so that 3
bits take 3.2. GPTQ's words hold a plain little-endian bit stream (3-bit values straddle words).
Version 1 stores zero - 1; an asymmetric zero of 0 does not fit there, so asymmetric results are
written as version 2, which stores the zero itself.
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


def scale_dtype(layout: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``layout`` stores scales: GPTQ kernels read float16 only."""
    return torch.float16 if layout == "gptq" else model_dtype


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


def decode(read, name: str, layout: str, config: dict) -> QuantizedWeight:
    """Inverse of :func:`encode`; ``read(tensor_name)`` returns a stored tensor.

    ``config`` is the checkpoint's ``quantization_config``.
    """
    if layout == "gptq":
        return _decode_gptq(read, name, config)
    return _decode_compressed_tensors(read, name, config)


def matrix(
    read, name: str, layout: str, config: dict, dtype: torch.dtype, conv1d: bool
) -> torch.Tensor:
    """The matrix that linear ``name`` is stored for, as the model's state dict holds it.

    ``conv1d``: the model holds [in, out] where packed layouts hold [out, in].
    """
    if layout == "bitmask":
        return bitmask.decode(read, name).to(dtype)
    dense = decode(read, name, layout, config).dequantize(dtype)
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
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, offset = weight.grid.bits, 2 ** (weight.grid.bits - 1)
    signed = (weight.codes.to(torch.int16) - offset).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(signed, bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.grid.symmetric:
        zero = (weight.zero.to(torch.int16) - offset).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    return tensors


def _decode_compressed_tensors(read, name: str, config: dict) -> QuantizedWeight:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    grid = grid_of(config)
    offset = 2 ** (grid.bits - 1)
    shape = torch.Size(read(f"{name}.weight_shape").tolist())
    scale = read(f"{name}.weight_scale")
    signed = unpack_from_int32(read(f"{name}.weight_packed"), grid.bits, shape)
    if grid.symmetric:
        zero = torch.full(scale.shape, offset, dtype=torch.uint8)
    else:
        packed = read(f"{name}.weight_zero_point")
        zero = unpack_from_int32(packed, grid.bits, scale.shape, packed_dim=0)
        zero = (zero.to(torch.int16) + offset).to(torch.uint8)
    codes = (signed.to(torch.int16) + offset).to(torch.uint8)
    return QuantizedWeight(codes, scale, zero, grid)


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
    """Codes uint8 [R, C] -> int32 [R, C * bits / 32], a little-endian bit stream along each row."""
    array = np.ascontiguousarray(codes.cpu().numpy())
    stream = np.unpackbits(array[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(stream.reshape(len(array), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32))


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_bits`: int32 [R, W] -> uint8 [R, W * 32 / bits]."""
    array = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    stream = np.unpackbits(array, axis=1, bitorder="little").reshape(len(array), -1, bits)
    codes = np.packbits(stream, axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0].copy())
