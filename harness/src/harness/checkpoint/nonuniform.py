"""Blocks of one model that differ in size: what structured pruning leaves behind.

config.json keeps the family's ordinary fields at the sizes before pruning, and one key more, a list
with one entry per block:

    "harness_sizes": [{"attention": "self_attn", "heads": 6, "kv_heads": 3, "channels": 512,
                       "linears": {"self_attn.q_proj": [384, 256], ...}, "kept_heads": [...]}, ...]

"linears" are the matrices [out, in] that were cut; "kept_heads" stands where the model gives every
head something of its own (ALiBi slopes). The model is built by its family's code from the ordinary
fields, then resized here. Plain transformers finds tensors of other shapes and refuses.

Where all blocks are alike, :func:`ordinary` writes the sizes into the family's own fields instead.
"""

import copy

from harness.errors import UserError, one_line

KEY = "harness_sizes"
CHANNEL_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def entry(config, index: int) -> dict:
    """Block ``index``'s entry in a transformers config; {} where all blocks have ordinary sizes."""
    entries = getattr(config, KEY, None)
    return entries[index] if entries else {}


def model_heads(config) -> int:
    """Attention heads by the config's ordinary fields; 0 for models without attention."""
    return getattr(config.get_text_config(), "num_attention_heads", 0)


def head_dim(config) -> int:
    """Numbers per attention head."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // max(model_heads(config), 1)


def heads(config, index: int) -> tuple[int, int]:
    """Attention heads and key/value heads of block ``index``."""
    own, text = entry(config, index), config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    count = model_heads(config)
    return own.get("heads", count), own.get("kv_heads", kv_heads or count)


def apply(model):
    """Resize the blocks of a model that was built from its config's ordinary fields; returns it."""
    if getattr(model.config, KEY, None):
        from harness.modules import find_blocks

        for index, block in enumerate(find_blocks(model)[1]):
            resize_block(block, entry(model.config, index), model.config)
    return model


def model_class(config):
    """The transformers class of ``config``'s model, which resizes its blocks where it has to:
    from_pretrained does the rest, quantization on load included.

    Of an image-text model it is the class that its config names, and the whole model; a causal LM
    else. None where transformers has neither for it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, modeling_outputs

    # transformers 5.24: Llama 4 with images reads this of its text part's output, which has none.
    if not hasattr(modeling_outputs.MoeCausalLMOutputWithPast, "image_outputs"):
        modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    classes = []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        mapped = auto._model_mapping.get(type(config), None) or ()
        classes += mapped if isinstance(mapped, tuple | list) else [mapped]
    if not classes:
        return None
    # Some configs of image-text models are in the causal mapping too, for their text part alone.
    classes = [mapped for mapped in classes if mapped.config_class is type(config)] or classes
    named = [mapped for mapped in classes if mapped.__name__ in (config.architectures or ())]
    base = (named or classes)[0]
    if not getattr(config, KEY, None):
        return base

    def init(self, *args, **kwargs):
        base.__init__(self, *args, **kwargs)
        apply(self)

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


def resize_block(block, own: dict, config) -> None:
    """Give ``block``'s linears the shapes of its entry (new weights are empty), and its attention
    the head counts."""
    for name, (rows, columns) in own.get("linears", {}).items():
        _resize_linear(block.get_submodule(name), rows, columns)
    if not own.get("attention"):
        return
    attention = block.get_submodule(own["attention"])
    _set_heads(attention, own, own["heads"] * head_dim(config))
    if "kept_heads" in own:
        if not hasattr(attention, "kept_heads"):
            hook = _hand_kept_heads(model_heads(config))
            attention.register_forward_pre_hook(hook, with_kwargs=True)
        attention.kept_heads = own["kept_heads"]


def build(config, dtype=None):
    """The model of ``config`` in ``dtype`` (None: the config's) with random weights, on the device
    that is set as default. No code of the checkpoint's own is run."""
    return model_class(config)._from_config(config, **({"dtype": dtype} if dtype else {}))


def _resize_linear(module, rows: int, columns: int) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    def empty(old, *shape):
        return torch.nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)

    if isinstance(module, Conv1D):
        module.nx, module.nf = columns, rows
        module.weight = empty(module.weight, columns, rows)
    else:
        module.in_features, module.out_features = columns, rows
        module.weight = empty(module.weight, rows, columns)
    if module.bias is not None:
        module.bias = empty(module.bias, rows)


def _set_heads(attention, own: dict, width: int) -> None:
    """What transformers' attention modules know of their size, under any of its names."""
    names = dict.fromkeys(("num_heads", "num_attention_heads", "n_head", "n_heads"), own["heads"])
    names |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), own["kv_heads"])
    names |= dict.fromkeys(("embed_dim", "split_size"), width)
    for name, value in names.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, value)
    if hasattr(attention, "config"):
        # Some read it at run time (Phi-3). Past the class's checks, which know no such heads.
        attention.config = copy.copy(attention.config)
        renamed = getattr(attention.config, "attribute_map", {})
        for name in ("num_attention_heads", "num_key_value_heads"):
            if hasattr(attention.config, name):
                vars(attention.config)[renamed.get(name, name)] = names[name]


def head_axis(name: str, value, batch: int, count: int) -> int | None:
    """The axis of an attention argument that counts ``count`` heads: 1 in [B, H, ...] masks and
    biases, 0 in ALiBi's [B * H, 1, S]; None where there is none."""
    if getattr(value, "ndim", 0) == 4 and value.shape[1] == count > 1:
        return 1
    if name == "alibi" and getattr(value, "ndim", 0) == 3 and value.shape[0] == batch * count:
        return 0
    return None


def _hand_kept_heads(count: int):
    """A hook that leaves of every argument with ``count`` heads those of the module's own."""

    def hook(module, args, kwargs):
        import torch

        hidden = args[0] if args else kwargs["hidden_states"]
        chosen = torch.tensor(module.kept_heads, device=hidden.device)

        def take(name, value):
            axis = head_axis(name, value, len(hidden), count)
            if axis is None:
                return value
            if axis == 0:
                split = value.view(len(hidden), count, *value.shape[1:])
                return split.index_select(1, chosen).flatten(0, 1)
            return value.index_select(1, chosen)

        first, rest = args[:1], args[1:]
        return (*first, *(take("", v) for v in rest)), {k: take(k, v) for k, v in kwargs.items()}

    return hook


def ordinary(raw: dict, shapes: dict[str, tuple[int, ...]], changes: dict) -> dict | None:
    """``raw`` (a config.json) with ordinary fields that describe a model of these ``shapes``, or
    None where its family cannot.

    LLaMA's config wants hidden_size to be a multiple of the heads; Mistral's, the same model
    without a sliding window, does not.

    Args:
        shapes: of tensors by model name.
        changes: of "heads", "kv_heads", "head_dim", "channels", "hidden_size", "layers" (with
            "layers_before"), "eps" those that are wanted.
    """
    candidates = [raw]
    if raw.get("model_type") == "llama" and not raw.get("attention_bias") | raw.get("mlp_bias"):
        dropped = ("attention_bias", "mlp_bias", "pretraining_tp", "transformers_version")
        twin = {k: v for k, v in raw.items() if k not in dropped}
        twin |= {"model_type": "mistral", "sliding_window": None}
        candidates.append(twin | {"architectures": ["MistralForCausalLM"]})
    for candidate in candidates:
        result = with_fields({k: v for k, v in candidate.items() if k != KEY}, changes)
        if _describes(result, shapes):
            return result
    return None


def with_fields(raw: dict, changes: dict) -> dict:
    """``raw``, a config.json, with ``changes`` (see :func:`ordinary`) under its family's names; of
    an image-text model in its text part."""
    from transformers import AutoConfig

    usual = AutoConfig.for_model(raw["model_type"])
    if isinstance(raw.get("text_config"), dict):
        text = {"model_type": usual.get_text_config().model_type} | raw["text_config"]
        return raw | {"text_config": with_fields(text, changes)}
    renamed = getattr(usual, "attribute_map", {})
    result = dict(raw)
    names = {
        "heads": [renamed.get("num_attention_heads", "num_attention_heads")],
        "kv_heads": [n for n in ("num_key_value_heads", "num_kv_heads") if hasattr(usual, n)],
        "head_dim": ["head_dim"],
        "channels": [n for n in CHANNEL_FIELDS if hasattr(usual, n)],
        "hidden_size": [renamed.get("hidden_size", "hidden_size")],
        "layers": [renamed.get("num_hidden_layers", "num_hidden_layers")],
        "eps": ["rms_norm_eps"],
        "layers_before": [],
    }
    for what, value in changes.items():
        result |= dict.fromkeys(names[what], value)
    if "layers" in changes:
        # Some families have no number of blocks, only a list of their kinds.
        before = raw.get(names["layers"][0]) or changes.get("layers_before")
        for name, value in raw.items():
            if isinstance(value, list) and len(value) == before:  # layer_types
                result[name] = value[: changes["layers"]]
    return result


def _describes(raw: dict, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether transformers builds a model with tensors of these shapes from ``raw``."""
    import torch

    try:
        with torch.device("meta"):
            model = build(config_of(raw))
    except Exception:  # the family's own checks of sizes it does not allow
        return False
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return all(built.get(name) == tuple(shape) for name, shape in shapes.items())


def config_of(raw: dict):
    """The transformers config of a config.json's contents."""
    from transformers import AutoConfig

    return type(AutoConfig.for_model(raw["model_type"])).from_dict(_numbers(raw))


def _numbers(value):
    """JSON's contents with the numbers that JSON lacks, as transformers writes them there."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    return [_numbers(inner) for inner in value] if isinstance(value, list) else value


def skeleton(config):
    """The transformers model of `config` on the meta device: every shape, no memory.

    Raises UserError where the config's values make no model.
    """
    import torch

    try:
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # the family's own code over the file's values
        raise UserError(
            f"config.json describes no model that transformers can build: {one_line(error)}"
        ) from error
