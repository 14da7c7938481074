"""GPTQ's packing, as its kernels read it.

| tensors of a linear X | |
| --- | --- |
| X.qweight | int32 [I * bits / 32, O] |
| X.qzeros  | int32 [G, O * bits / 32] |
| X.scales  | float16 [G, O] |
| X.g_idx   | int32 [I], the group of every column |

The words hold a plain little-endian bit stream, in which values of 3 bits straddle words. Version 1
stores zero - 1; an asymmetric zero of 0 does not fit there, so asymmetric results are written as
version 2, which stores the zero itself.

Legend: O out features, I in features, G groups per row.
"""

from collections.abc import Mapping

import torch

from harness.checkpoint.layouts.packing import (
    IN_VLLM,
    check_shape,
    describe_grids,
    field,
    group_count,
    groups,
    order,
    pack_bits,
    sizes,
    unpack_bits,
)
from harness.errors import UserError
from harness.quant.grid import Grid, QuantizedWeight
from harness.quant.scheme import Scheme

HOLDS = "codes"
MARK, NEEDED, OPTIONAL = "qweight", {"qzeros", "scales"}, {"g_idx", "bias"}
ASKED = False  # transformers wants GPTQModel installed before it says anything
BITS = (2, 3, 4, 8)
KNOWN = (
    "quant_method bits group_size sym desc_act checkpoint_format lm_head damp_percent "
    "act_order static_groups true_sequential model_name_or_path model_file_base_name dataset "
    "tokenizer block_name_to_quantize module_name_preceding_first_block batch_size "
    "pad_token_id use_exllama max_input_length exllama_config cache_block_outputs "
    "disable_exllama backend modules_in_block_to_quantize modules_to_not_convert meta "
    "quantizer use_cuda_fp16 model_seqlen method format packer mse damp_auto_increment"
)
MEANINGFUL = {
    "dynamic": (None, {}, False),
    "is_marlin_format": (None, False),
    "pack_dtype": (None, "int32", "torch.int32"),
    "rotation": (None, "", False),
    "adapter": (None, {}),
}


def foreign(config: dict) -> str | None:
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        return f"GPTQ with checkpoint_format {version!r}; known are gptq and gptq_v2"
    return None


def config(scheme: Scheme, actorder: bool) -> dict:
    (grid,) = scheme.grids
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if grid.symmetric else "gptq_v2",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": False,
        "lm_head": False,
    }


def scheme_of(config: dict) -> Scheme:
    bits, size = field(config, "bits", int), field(config, "group_size", int)
    return Scheme(Grid(bits, size, field(config, "sym", bool)))


def refuse(scheme: Scheme, shapes: dict[str, tuple[int, int]], some_left: bool) -> None:
    if len(scheme.grids) > 1:
        raise UserError(
            "the gptq format holds all linears on one grid; use --format compressed-tensors for "
            "mixed bits."
        )
    (grid,) = scheme.grids
    if grid.bits not in BITS:
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
    if some_left:
        raise UserError(
            "the gptq format has no place for the names of linears that stay dense; use "
            "--format compressed-tensors with --ignore."
        )


def name_targets(config, scheme, packed: set[str], dense: set[str], conv1d: bool) -> None:
    """Its readers ask the tensors."""


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float16  # GPTQ kernels read no other


def check(linear: str, part: Mapping[str, tuple[int, ...]], grid: Grid) -> None:
    words, zeros, scales = (sizes(linear, part, p) for p in ("qweight", "qzeros", "scales"))
    columns, rows = words[0] * 32 // grid.bits, words[1]
    count = group_count(columns, grid)
    check_shape(f"{linear}.scales", scales, (count, rows), grid)
    check_shape(f"{linear}.qzeros", zeros, (count, -(-rows * grid.bits // 32)), grid)
    if "g_idx" in part:
        check_shape(f"{linear}.g_idx", part["g_idx"], (columns,), grid)


def parts(grid: Grid, rows: int, columns: int, dtype: torch.dtype):
    count = columns // grid.columns_per_group(columns)
    words, zeros = -(-columns * grid.bits // 32), -(-rows * grid.bits // 32)
    return {
        "qweight": ((words, rows), torch.int32),
        "qzeros": ((count, zeros), torch.int32),
        "scales": ((count, rows), torch.float16),
        "g_idx": ((columns,), torch.int32),
    }


def encode(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Its caller has made sure that float16 holds the scales: packing.check_scales_fit."""
    columns = weight.codes.shape[1]
    size = weight.grid.columns_per_group(columns)
    stored_zero = weight.zero - 1 if weight.grid.symmetric else weight.zero
    tensors = {
        "qweight": pack_bits(weight.codes, weight.grid.bits).T,
        "qzeros": pack_bits(stored_zero.T, weight.grid.bits),
        "scales": weight.scale.T.half(),
        "g_idx": (torch.arange(columns) // size).int(),
    }
    return {f"{name}.{key}": value.cpu().contiguous() for key, value in tensors.items()}


def decode(tensors, name: str, grid: Grid, config: dict) -> QuantizedWeight:
    """Inverse of :func:`encode`.

    Raises:
        UserError: the tensors contradict the config.
    """
    codes = unpack_bits(tensors[f"{name}.qweight"].T, grid.bits)
    scale = tensors[f"{name}.scales"].T
    rows, columns = codes.shape
    count = groups(f"{name}.scales", scale, rows, columns, grid)
    zero = unpack_bits(tensors[f"{name}.qzeros"], grid.bits).T[:rows]
    if tuple(zero.shape) != (rows, count):
        raise UserError(
            f"{name}.qzeros holds zero points for {list(zero.shape)}; expected {[rows, count]}. "
            "Config and files do not belong together."
        )
    if config.get("checkpoint_format", "gptq") == "gptq":
        zero = (zero + 1) & grid.max_code
    if grid.symmetric and (zero != 2 ** (grid.bits - 1)).any():
        raise UserError(
            f"{name}.qzeros has other zero points than a symmetric grid of {grid.bits} bits: sym "
            "or checkpoint_format in quantization_config is wrong. Restore the config that belongs "
            "to these files."
        )
    of_column = order(tensors, f"{name}.g_idx", columns, grid)
    return QuantizedWeight(codes, scale, zero, grid, of_column)


def matrix(
    tensors, name: str, grid: Grid, config: dict, stored, dtype, turned: bool
) -> torch.Tensor:
    """Codes times scales, rounded to the dtype ``stored`` of the checkpoint."""
    dense = decode(tensors, name, grid, config).dequantize(stored).to(dtype)
    return dense.T.contiguous() if turned else dense


def shape(tensors: Mapping, name: str, grid: Grid) -> tuple[int, int]:
    words, rows = tensors[f"{name}.qweight"].shape
    return rows, words * 32 // grid.bits


def describe(scheme: Scheme) -> str:
    return f"gptq, {describe_grids(scheme.grids)}"


def readers(scheme: Scheme, family: str, fault: str | None) -> str:
    (grid,) = scheme.grids
    served = {4: "vLLM (on a GPU, or a CPU with AVX-512), ", 8: "vLLM on a GPU, "}
    served = served.get(grid.bits, "") if family in IN_VLLM and grid.symmetric else ""
    others = "GPTQModel where its kernels know the width"
    return f"{served}the harness; made for {others} and this family"
