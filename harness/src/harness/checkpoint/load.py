"""Find checkpoints; read their configs and tokenizers, and whole models from any format.

Tensor by tensor: weights.py. Writing is in shards.py; the layouts of packed matrices in layouts/.
"""

import re
from pathlib import Path

from harness import paths, precision
from harness.checkpoint import layouts, names, nonuniform, weight_files
from harness.checkpoint.weights import Weights
from harness.errors import UserError, nearest, one_line

EMBEDDED = ("tiny-llama", "tiny-llama-student")
ASSETS = Path(__file__).parents[1] / "assets"
NO_GGUF = "which is not read yet; give the Hugging Face checkpoint that it was made from."
# The largest plausible value of fields by which models are built.
MOST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1_000_000,
    "num_key_value_heads": 1_000_000,
    "head_dim": 1_000_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "vocab_size": 100_000_000,
    "num_local_experts": 1_000_000,
    "num_experts": 1_000_000,
    "n_routed_experts": 1_000_000,
}
NEEDED = ("num_hidden_layers", "hidden_size", "vocab_size")
LOADS = ("nf4", "nf4-dq", "int8")


def resolve(model: str | Path) -> Path:
    """The local folder of ``model``: a folder, an embedded name, or a hub id (downloaded once).

    Raises:
        UserError: no such folder, no config.json in it, or the hub has no such model.
    """
    if str(model) in EMBEDDED:
        return ASSETS / str(model)
    path = Path(model)
    try:
        kind = "folder" if path.is_dir() else "file" if path.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
        raise UserError(f"{str(model)[:80]} cannot be a folder: {one_line(error)}") from error
    if kind == "folder":
        _check_folder(path)
        return path
    if kind == "file":
        raise UserError(f"{model} {_what_file(path)}")
    hint = nearest(str(model), EMBEDDED)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise UserError(f"model folder {model} not found; expected a folder or a hub id.{hint}")
    return _download(str(model), hint)


def _check_folder(folder: Path) -> None:
    for path in folder.iterdir():  # libraries open what they please, and wait for a pipe for ever
        if not path.is_dir() and not path.name.startswith("."):
            paths.regular(folder, path.name)
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is a LoRA adapter{weight_files.base_of_adapter(folder)}")
    if list(folder.glob("*.gguf")):
        raise UserError(f"{folder} holds a .gguf file, {NO_GGUF}")
    raise UserError(f"{folder} holds no config.json; expected a Hugging Face checkpoint.")


def _what_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"is a .gguf file, {NO_GGUF}"
    return "is a file; expected the folder of a Hugging Face checkpoint, or a hub id."


def _download(model: str, hint: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
    wanted += ["LICEN*", "NOTICE*", "COPYING*", "*POLICY*"]
    try:
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))
        if not list(folder.glob("*.safetensors")):
            folder = Path(
                huggingface_hub.snapshot_download(model, allow_patterns=[*wanted, "*.bin"])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {model} is neither a folder, nor an embedded name ({', '.join(EMBEDDED)}), nor "
            f"could it be had from the hub ({reason}).{hint}"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"hub model {model} holds no config.json; expected a causal LM checkpoint.")
    return folder


def load_config(folder: Path):
    """The model's transformers config.

    Raises:
        UserError: transformers cannot read it, or not without code of the folder's own, or it is
            not of a decoder-only causal LM (alone, or as the text part of an image-text model).
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the file's values run through the family's own checks
        raise UserError(f"{folder}/config.json cannot be read: {one_line(error)}") from error
    # BERT's relatives are in the mapping for the sake of their decoders; GPT-NeoX, a decoder,
    # has their is_decoder flag and leaves it off.
    names = config.architectures or ["ForCausalLM"]
    encoder = getattr(config, "is_decoder", None) is False and not any(
        "CausalLM" in name or "LMHead" in name for name in names
    )
    readable = nonuniform.model_class(config) is not None
    if encoder or getattr(config, "is_encoder_decoder", False) or not readable:
        raise UserError(
            f"{folder} is a {config.model_type} model ({', '.join(names)}); expected a "
            "decoder-only causal language model."
        )
    _check_sizes(config, folder / "config.json")
    return config


def _check_sizes(config, path: Path) -> None:
    """Refuse numbers that no model has, before one is built of them: a billion blocks take days."""
    text = config.get_text_config()
    for name, most in MOST.items():
        value = getattr(text, name, None)
        if value is None or isinstance(value, list):  # some have a value per block
            continue
        least = 1 if name in NEEDED else 0
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{path} has {value!r:.40} for {name}; expected {least} to {most}.")
    entries = getattr(config, nonuniform.KEY, None)
    blocks = getattr(text, "num_hidden_layers", None)
    if entries is not None and (
        not isinstance(entries, list)
        or len(entries) != blocks
        or not all(isinstance(entry, dict) for entry in entries)
    ):
        raise UserError(
            f"{path} has a {nonuniform.KEY} that is no list of {blocks} objects, one a block."
        )


def load_tokenizer(model: str | Path):
    from transformers import AutoTokenizer

    folder = resolve(model)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the file's contents lead to
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder} has its tokenizer as tokenizer.model alone, which transformers converts "
                "with more packages: pip install sentencepiece protobuf tiktoken, or copy the "
                f"model's tokenizer.json there ({one_line(error)[:80]})"
            ) from error
        if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
            raise UserError(
                f"{folder} holds no tokenizer (tokenizer.json); copy the model's own there."
            ) from error
        raise UserError(f"no usable tokenizer in {folder}: {one_line(error)}") from error


def load_model(model: str | Path, *, device: str = "cpu", dtype="auto", load: str | None = None):
    """The whole model in memory, ready to evaluate, from any format this project writes.

    Packed weights are dequantized to ``dtype``: the numbers are those that a packed kernel's
    reference gives, bit for bit.

    Args:
        dtype: a torch.dtype, or the value of --dtype, of which "auto" asks the device
            (:func:`harness.precision.choose`).
        load: "nf4", "nf4-dq" (double quantization) or "int8": quantize on load with bitsandbytes.
    """

    folder = resolve(model)
    config = load_config(folder)
    weights = Weights(folder)
    device = pick_device(device)
    if isinstance(dtype, str):
        dtype = precision.choose(dtype, weights.dtype, device, model)
    if load:
        return _load_bitsandbytes(weights, config, load, dtype, device)
    if weights.layout == "dense":
        loaded = load_dense(weights, config, dtype)
    else:
        loaded = _load_packed(weights, config, dtype)
    for name, parameter in loaded.named_parameters():
        check_finite(name, parameter.detach())
    _check_ends(getattr(loaded, "generation_config", None), folder)
    return loaded.to(device).eval()


def _check_ends(generation, folder: Path) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation, name, None)
        ids = value if isinstance(value, list) else [value]
        if value is not None and any(type(token) is not int for token in ids):
            raise UserError(
                f"{folder}/generation_config.json has {value!r:.40} for {name}; expected a "
                "token's number."
            )


def check_finite(name: str, tensor) -> None:
    """Raise :class:`UserError` where a tensor holds NaN or infinite values."""
    import torch

    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(
            f"{name} holds NaN or infinite values; the checkpoint is damaged or was trained to "
            "divergence. Get another copy."
        )


def _load_packed(weights: Weights, config, dtype):
    """A packed checkpoint with its linears dequantized."""
    vars(config).pop("quantization_config", None)
    # What is not packed goes as it is stored: transformers knows what stays in float32.
    state = {
        name: weights.read(name, dtype if weights.is_packed(name) else None)
        for name in sorted(weights.names)
    }
    return _load_complete(weights, None, config=config, state_dict=state, dtype=dtype)


def _load_complete(weights: Weights, *where, config, **more):
    """transformers' from_pretrained; tensors that are missing or of another shape are an error in
    one line, those that the model has no place for are named in one, and transformers' table of
    them is not shown."""
    from transformers.utils import logging

    from harness.checkpoint.nonuniform import skeleton

    names.match(skeleton(config), weights)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = nonuniform.model_class(config).from_pretrained(
            *where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **more
        )
    finally:
        logging.set_verbosity(verbosity)
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        names.check_shape(name, stored, wanted)
    names.refuse_missing(report["missing_keys"], weights.folder)
    return model


def load_dense(weights: Weights, config, dtype):
    """A dense checkpoint through transformers; missing tensors are an error, never random."""
    vars(config).pop("quantization_config", None)  # an empty one, which transformers refuses
    try:
        return _load_complete(weights, weights.folder, config=config, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # transformers over the user's files
        raise UserError(f"{weights.folder} cannot be loaded: {one_line(error)}") from error


def _load_bitsandbytes(weights: Weights, config, load: str, dtype, device: str):
    folder = weights.folder
    if layouts.of(weights.layout).HOLDS == "zeros":
        raise UserError(
            f"{folder} is stored as {weights.layout}; --load needs a dense one: "
            f"harness convert {folder} --format dense --out DENSE"
        )
    if weights.layout != "dense":
        raise UserError(
            f"{folder} is already quantized ({weights.layout}); --load needs a dense one."
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--load {load} needs bitsandbytes: pip install 'llm-compression-harness[bitsandbytes]'"
        ) from error
    from transformers import BitsAndBytesConfig

    if load not in LOADS:
        raise UserError(f"--load {load}: expected one of {', '.join(LOADS)}.")
    if load == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=load == "nf4-dq",
            bnb_4bit_compute_dtype=dtype,
        )
    model = nonuniform.model_class(config).from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    if load != "int8" and device == "cpu":
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit" and module.in_features % 64:
                raise UserError(
                    f"bitsandbytes' NF4 on the CPU needs input sizes that are multiples of 64; "
                    f"{name} has {module.in_features}. Use a GPU or --load int8."
                )
    return model.eval()


def pick_device(device: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu"; anything else is checked and kept."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"device {device}: expected auto, cpu, cuda or cuda:N.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: no CUDA device here; use --device cpu.")
    return device


DEFAULT_SEQLEN = 2048


def context_length(config) -> int | None:
    """The longest window a transformers config admits, in tokens; None where it has no bound."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def example_length(flag: str, asked: int | None, usual: int, *contexts: int | None) -> int:
    """Tokens of an example at most: ``asked`` for by ``flag``, or by default ``usual`` or what the
    models' contexts (:func:`context_length`) leave of it.

    Raises:
        UserError: a model's context is shorter than what was asked for.
    """
    context = min((c for c in contexts if c), default=None)
    length = min(usual, context or usual) if asked is None else asked
    if length < 2 or (context and length > context):
        raise UserError(
            f"{flag} {length}: expected 2 to {context or 'any number of'} tokens, the model's "
            "context."
        )
    return length


def window_length(config, seqlen: int | None = None) -> int:
    """`seqlen`, or by default the smaller of 2,048 and the model's context, as GPTQ has it.

    Raises UserError when `seqlen` is below 2 or beyond the model's context.
    """
    context = context_length(config)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    if seqlen < 2:
        raise UserError(f"--seqlen {seqlen}: a window needs at least 2 tokens")
    if context is not None and seqlen > context:
        raise UserError(
            f"--seqlen {seqlen} is longer than the model's context of {context} tokens; "
            f"use --seqlen {context} or less"
        )
    return seqlen
