"""What a checkpoint's ``quantization_config`` says: read, checked, and written.

A field that changes what the stored numbers mean is understood here or refused; one that nobody
here knows is named in a line, so that nothing is passed over in silence. Whether the tensors agree
with it is packed.py's to tell.
"""

from pathlib import Path

from harness import distributed, paths
from harness.checkpoint import bitmask
from harness.errors import UserError
from harness.quant.grid import Grid

OTHERS = {
    "awq": "AWQ's own packing",
    "bitsandbytes": "bitsandbytes' formats",
    "fp8": "8-bit floating point",
    "mxfp4": "4-bit floating point",
    "fbgemm_fp8": "8-bit floating point",
}
# Fields that say how a file came about, or repeat what its tensors say.
HARMLESS = {
    "compressed-tensors": (
        "quant_method format quantization_status global_compression_ratio ignore version dequantize"
        " run_compressed config_groups"
    ),
    "gptq": (
        "quant_method bits group_size sym desc_act checkpoint_format lm_head damp_percent act_order"
        " static_groups true_sequential model_name_or_path model_file_base_name dataset tokenizer"
        " block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id"
        " use_exllama max_input_length exllama_config cache_block_outputs disable_exllama backend"
        " modules_in_block_to_quantize modules_to_not_convert meta quantizer use_cuda_fp16"
        " model_seqlen method format packer mse damp_auto_increment"
    ),
    "bitmask": "quant_method format",
}
# Fields that change the numbers, with the values that leave them as they are.
MEANINGFUL = {
    "compressed-tensors": {
        "kv_cache_scheme": (None, {}),
        "transform_config": (None, {}),
        "moe_sparsity_config": (None, {}),
        "sparsity_config": (None, {}),
    },
    "gptq": {
        "dynamic": (None, {}, False),
        "is_marlin_format": (None, False),
        "pack_dtype": (None, "int32", "torch.int32"),
        "rotation": (None, "", False),
        "adapter": (None, {}),
    },
}


def of(config: dict, where) -> dict | None:
    """The quantization_config in the contents of a config.json; None for a dense checkpoint.

    Raises:
        UserError: it is no object, or lacks what its method needs.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("quant_method"), str):
        raise UserError(
            f"{where}: quantization_config is {found!r:.60}; expected an object with quant_method."
        )
    layout = layout_of(found)
    if layout in ("compressed-tensors", "gptq"):
        try:
            grid_of(found)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    known = {*HARMLESS.get(layout, "").split(), *MEANINGFUL.get(layout, {})}
    strange = {key: found[key] for key in sorted(set(found) - known)} if layout in HARMLESS else {}
    if strange:
        fields = ", ".join(f"{key}: {value!r:.40}" for key, value in strange.items())
        distributed.say_once(f"{where}: quantization_config says {fields}, unknown here; ignored")
    return found


def is_packed(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` holds integers, of whatever library."""
    path = folder / "config.json"
    config = paths.read_json(path).get("quantization_config")
    return bool(config) and layout_of(of({"quantization_config": config}, path)) != "bitmask"


def layout_of(config: dict | None) -> str:
    """One of the layouts of harness.checkpoint.formats, or "other" for what is not read here: see
    :func:`foreign`."""
    if not config:
        return "dense"
    return "other" if foreign(config) else config["quant_method"]


def foreign(config: dict) -> str | None:
    """Why a checkpoint with this ``quantization_config`` is not read here; None where it is."""
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return _foreign_compressed_tensors(config) or _meaningful(config, method)
    if method == "gptq":
        version = config.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            return f"GPTQ with checkpoint_format {version!r}; known are gptq and gptq_v2"
        return _meaningful(config, method)
    if method == "bitmask":
        return None
    return f"{method} ({OTHERS[method]})" if method in OTHERS else f"{method!r:.40}"


def _meaningful(config: dict, method: str) -> str | None:
    for key, idle in MEANINGFUL[method].items():
        value = config.get(key)
        if value not in idle and not (key == "sparsity_config" and _is_dense(value)):
            return f"{method} with {key} {value!r:.60}"
    return None


def _is_dense(sparsity) -> bool:
    return isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"


def _foreign_compressed_tensors(config: dict) -> str | None:
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
    if isinstance(groups, dict) and len(groups) > 1:
        return f"compressed-tensors in {len(groups)} config groups"
    return None


def grid_of(config: dict) -> Grid:
    """The grid that the ``quantization_config`` of a gptq or compressed-tensors checkpoint tells.

    Raises:
        UserError: a field is missing, or has a value that it cannot have.
    """
    if config["quant_method"] == "gptq":
        return Grid(
            _field(config, "bits", int), _field(config, "group_size", int),
            _field(config, "sym", bool),
        )  # fmt: skip
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise UserError("expected one object in config_groups of quantization_config.")
    (group,) = groups.values()
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
    size = -1 if strategy == "channel" else _field(weights, "group_size", int)
    return Grid(_field(weights, "num_bits", int), size, _field(weights, "symmetric", bool))


def _field(config: dict, name: str, kind: type):
    value = config.get(name)
    if type(value) is not kind:
        found = "lacks" if name not in config else f"has {value!r:.40} for"
        wanted = "a whole number" if kind is int else "true or false"
        raise UserError(f"quantization_config {found} {name}; expected {wanted}.")
    return value


def describe(grid: Grid | None, layout: str, actorder: bool, ignore: list[str]) -> dict:
    """The quantization_config by which transformers and vLLM recognise a checkpoint of ours."""
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
        # zero points (5.24 with compressed-tensors 0.20), and rounds as formats.matrix says.
        "dequantize": True,
    }
