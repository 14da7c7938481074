"""compressed-tensors' pack-quantized: integers of 2 to 8 bits.

| tensors of a linear X | |
| --- | --- |
| X.weight_packed | int32 [O, ceil(I * bits / 32)] |
| X.weight_scale  | the model's dtype [O, G] |
| X.weight_shape  | int64 [2] |
| X.weight_zero_point | asymmetric: int32, packed along O |

The words hold a plain little-endian bit stream, in which values of 3, 5, 6 and 7 bits straddle
words. Before its version 0.19 the library packed 32 // bits values into a word and left the rest of
it zero, so that 3 bits took 3.2: such files are read, none are written.

Legend: O out features, I in features, G groups per row.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch

from harness.checkpoint.layouts.packing import (
    IN_VLLM,
    check_shape,
    describe_grids,
    field,
    groups,
    order,
    pack_bits,
    sizes,
    unpack_bits,
)
from harness.checkpoint.weight_files import small_int64s
from harness.errors import UserError
from harness.quant.grid import Grid, QuantizedWeight
from harness.quant.scheme import Scheme

HOLDS = "codes"
MARK, NEEDED = "weight_packed", {"weight_scale", "weight_shape"}
OPTIONAL = {"weight_zero_point", "weight_g_idx", "bias"}
ASKED = True
KNOWN = (
    "quant_method format quantization_status global_compression_ratio ignore version "
    "dequantize run_compressed config_groups"
)
MEANINGFUL = {
    "kv_cache_scheme": (None, {}),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None, {}),
    "sparsity_config": (None, {}),
}


def foreign(config: dict) -> str | None:
    if config.get("format") != "pack-quantized":
        return f"compressed-tensors in the format {config.get('format')!r:.40}"
    if config.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        return f"compressed-tensors of the status {config['quantization_status']!r:.40}"
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            continue  # grid_of says what is wrong
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                return f"compressed-tensors whose {name} quantizes {key} too"
        if group.get("format", "pack-quantized") not in (None, "pack-quantized"):
            return f"compressed-tensors whose {name} has the format {group['format']!r:.40}"
        weights = group.get("weights")
        if isinstance(weights, dict) and weights.get("type", "int") != "int":
            return f"compressed-tensors whose {name} holds numbers of type {weights['type']!r:.40}"
    return None


def config(scheme: Scheme, actorder: bool) -> dict:
    groups = (_group(grid, actorder) for grid in scheme.grids)
    told = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }
    # For transformers: unpack while loading, not at the first forward. That way alone it reads zero
    # points (5.24 with compressed-tensors 0.20), and rounds as matrix() says; but it takes the
    # first group's grid for all, without a word.
    return told | ({"dequantize": True} if len(scheme.grids) == 1 else {})


def _group(grid: Grid, actorder: bool) -> dict:
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
    return {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}


def scheme_of(config: dict) -> Scheme:
    """The grids that a ``quantization_config`` tells.

    Raises:
        UserError: a field is missing, or has a value that it cannot have.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError("expected one object or more in config_groups of quantization_config.")
    if len(groups) == 1:  # of whatever targets: what it does not mean is not packed
        return Scheme(_grid(*groups.values()))
    everything, patterns, names = None, [], {}
    for group in groups.values():
        grid, targets = _grid(group), group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise UserError("expected lists of names as targets in quantization_config.")
        for target in targets:
            try:
                re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
            except re.error as error:
                raise UserError(
                    f"quantization_config has the target {target!r:.40}, no regular expression "
                    f"({error})."
                ) from error
            if target == "Linear":
                everything = everything or grid
            elif target.startswith("re:"):
                patterns.append((target, grid))
            else:
                names.setdefault(target, grid)
    # The library asks names first, then patterns in their alphabetical order, then classes, and of
    # equal ones the first group's; a Scheme asks from its end.
    patterns.sort(key=lambda pair: pair[0])
    return Scheme(everything, (*reversed(patterns), *names.items()))


def _grid(group) -> Grid:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise UserError("expected an object under weights in config_groups of quantization_config.")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None and size is not None:
        strategy = "channel" if size == -1 else "group"
    if strategy not in ("channel", "group"):
        raise UserError(
            f"quantization_config has the strategy {strategy!r:.40}; expected channel or group."
        )
    size = -1 if strategy == "channel" else field(weights, "group_size", int)
    return Grid(field(weights, "num_bits", int), size, field(weights, "symmetric", bool))


def refuse(scheme: Scheme, shapes: dict[str, tuple[int, int]], some_left: bool) -> None:
    """Any grid fits."""


def name_targets(
    config: dict, scheme: Scheme, packed: set[str], dense: set[str], conv1d: bool
) -> None:
    """Name in ``config`` what is packed and what is not, by modules' full names."""
    config["ignore"] = sorted(dense)
    if not conv1d and len(scheme.grids) == 1:
        return
    # By name, not as "Linear": transformers, which has no packed Conv1D, then refuses
    # the checkpoint, where it would fill it with random weights and a warning.
    for group, grid in zip(config["config_groups"].values(), scheme.grids, strict=True):
        group["targets"] = sorted(name for name in packed if scheme.of(name) == grid)


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    return stored


def check(linear: str, part: Mapping, grid: Grid) -> None:
    words, scale = (sizes(linear, part, p) for p in ("weight_packed", "weight_scale"))
    check_shape(f"{linear}.weight_shape", part["weight_shape"], (2,), grid)
    if scale[0] != words[0]:
        check_shape(f"{linear}.weight_scale", scale, (words[0], scale[1]), grid)
    if grid.group_size == -1:
        check_shape(f"{linear}.weight_scale", scale, (words[0], 1), grid)
    if "weight_zero_point" in part:
        zeros = sizes(linear, part, "weight_zero_point")
        check_shape(f"{linear}.weight_zero_point", zeros, (zeros[0], scale[1]), grid)
    if grid.symmetric and "weight_zero_point" in part:
        raise UserError(
            f"{linear}.weight_zero_point is there, and quantization_config says symmetric: true. "
            "One of the two is wrong; restore the config that belongs to these files."
        )
    if not grid.symmetric and "weight_zero_point" not in part:
        raise UserError(
            f"{linear}.weight_zero_point is missing, and quantization_config says symmetric: "
            "false. One of the two is wrong; restore the config that belongs to these files."
        )


def parts(grid: Grid, rows: int, columns: int, dtype: torch.dtype):
    count = columns // grid.columns_per_group(columns)
    words, zeros = -(-columns * grid.bits // 32), -(-rows * grid.bits // 32)
    tensors = {
        "weight_packed": ((rows, words), torch.int32),
        "weight_scale": ((rows, count), dtype),
        "weight_shape": ((2,), torch.int64),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = ((zeros, count), torch.int32)
    return tensors


def encode(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    bits = weight.grid.bits
    tensors = {
        "weight_packed": pack_bits(weight.codes, bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        tensors["weight_zero_point"] = pack_bits(weight.zero.T, bits).T
    return {f"{name}.{key}": value.cpu().contiguous() for key, value in tensors.items()}


def decode(tensors, name: str, grid: Grid) -> QuantizedWeight:
    """Inverse of :func:`encode`.

    Raises:
        UserError: the tensors contradict each other or the grid.
    """
    words, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    count = groups(f"{name}.weight_scale", scale, rows, columns, grid)
    if rows != words.shape[0]:
        raise UserError(
            f"{name}.weight_shape says {rows} x {columns}, {name}.weight_packed has "
            f"{words.shape[0]} rows. The checkpoint is damaged, get another copy."
        )
    codes = _unpack(words, grid.bits, columns, f"{name}.weight_packed")
    middle = 2 ** (grid.bits - 1)
    if grid.symmetric:
        zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    else:
        stored = f"{name}.weight_zero_point"
        if tensors[stored].dtype == torch.int8:  # before its version 0.9 the library packed none
            zero = (tensors[stored].int() + middle).to(torch.uint8)
        else:
            zero = _unpack(tensors[stored].T, grid.bits, rows, stored).T
        if tuple(zero.shape) != (rows, count) or zero.max() > grid.max_code:
            raise UserError(
                f"{stored} holds {list(zero.shape)} values up to {zero.max()}; expected "
                f"{[rows, count]} of {grid.bits} bits. The checkpoint is damaged."
            )
    of_column = order(tensors, f"{name}.weight_g_idx", columns, grid)
    return QuantizedWeight(codes, scale, zero, grid, of_column)


def matrix(
    tensors, name: str, grid: Grid, config: dict, stored, dtype, turned: bool
) -> torch.Tensor:
    """Codes times scales, rounded to the dtype of the scales.

    transformers does so where ``config`` has "dequantize", as ours do; elsewhere it takes the
    scales to the dtype of the computation first.
    """
    weight = decode(tensors, name, grid)
    if not config.get("dequantize"):
        weight.scale = weight.scale.to(dtype)
    dense = weight.dequantize(weight.scale.dtype).to(dtype)
    return dense.T.contiguous() if turned else dense


def shape(tensors: Mapping, name: str, grid: Grid) -> tuple[int, int]:
    return small_int64s(tensors[f"{name}.weight_shape"])


def describe(scheme: Scheme) -> str:
    return f"compressed-tensors, {describe_grids(scheme.grids)}"


def readers(scheme: Scheme, family: str, fault: str | None) -> str:
    if len(scheme.grids) > 1 and not all(grid.symmetric for grid in scheme.grids):
        fault = "no zero points in mixed bits"
    if fault:
        return f"the harness only (transformers: {fault}); --format dense is read by all"
    served, grids = "", scheme.grids
    if family in IN_VLLM and all(grid.bits == 4 for grid in grids):
        served = "vLLM (on a GPU, or a CPU with AVX-512), "
    elif family in IN_VLLM and all(grid.bits == 8 and grid.symmetric for grid in grids):
        served = "vLLM on a GPU, "
    # Other widths were packed otherwise before, and older libraries load garbage from these files.
    oldest = "0.17" if all(32 % grid.bits == 0 for grid in grids) else "0.19"
    return f"{served}transformers with compressed-tensors {oldest} or newer, the harness"


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
    if bits * per_word < 32 and (array >> np.uint32(bits * per_word)).any():
        raise UserError(
            f"{name} holds values wider than the {bits} bits that quantization_config says. Config "
            "and files do not belong together."
        )
    steps = np.arange(0, bits * per_word, bits, dtype=np.uint32)
    codes = (array[..., None] >> steps & np.uint32(2**bits - 1)).astype(np.uint8)
    return torch.from_numpy(codes.reshape(len(array), -1)[:, :columns].copy())
