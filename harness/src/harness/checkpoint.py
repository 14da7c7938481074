"""Find and read checkpoints: dense, compressed-tensors, GPTQ; sharded or not; tensor by tensor.

Writing is in writer.py; the layouts of packed matrices in formats.py.
"""

import json
import re
import sys
from functools import cached_property
from pathlib import Path

from harness import formats, sizes
from harness.errors import UserError, nearest

EMBEDDED = ("tiny-llama", "tiny-llama-student")
ASSETS = Path(__file__).parent / "assets"
LOADS = ("nf4", "nf4-dq", "int8")


def resolve(model: str | Path) -> Path:
    """The local folder of ``model``: a folder, an embedded name, or a hub id (downloaded once).

    Raises:
        UserError: no such folder, no config.json in it, or the hub has no such model.
    """
    if str(model) in EMBEDDED:
        return ASSETS / str(model)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json; expected a Hugging Face checkpoint.")
        return path
    hint = nearest(str(model), EMBEDDED)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)) or path.is_file():
        raise UserError(f"model folder {model} not found; expected a folder or a hub id.{hint}")
    return _download(str(model), hint)


def _download(model: str, hint: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
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


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, broken, or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; it is damaged, get another copy.")
    return value


def load_config(folder: Path):
    """The model's transformers config.

    Raises:
        UserError: transformers cannot read it, or it is not of a decoder-only causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # the file's values run through the family's own checks
        raise UserError(f"{folder}/config.json cannot be read: {one_line(error)}") from error
    # BERT's relatives are in the mapping for the sake of their decoders; GPT-NeoX, a decoder,
    # has their is_decoder flag and leaves it off.
    names = config.architectures or ["ForCausalLM"]
    encoder = getattr(config, "is_decoder", None) is False and not any(
        "CausalLM" in name or "LMHead" in name for name in names
    )
    known = type(config) in AutoModelForCausalLM._model_mapping
    if encoder or config.is_encoder_decoder or not known:
        raise UserError(
            f"{folder} is a {config.model_type} model ({', '.join(names)}); expected a "
            "decoder-only causal language model."
        )
    return config


def load_tokenizer(model: str | Path):
    from transformers import AutoTokenizer

    folder = resolve(model)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the file's contents lead to
        if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
            raise UserError(
                f"{folder} holds no tokenizer (tokenizer.json); copy the model's own there."
            ) from error
        raise UserError(f"no usable tokenizer in {folder}: {one_line(error)}") from error


class Weights:
    """The tensors of a checkpoint folder, read one at a time, packed matrices unpacked.

    Logical names: a packed linear X appears as ``X.weight``, whatever its layout.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.quantization = self.config.get("quantization_config")
        self.layout = formats.layout_of(self.quantization)
        if self.layout == "other":
            raise UserError(
                f"{folder} is stored as {self.quantization.get('quant_method')}, which is read by "
                "transformers only; give the dense model it was made from."
            )
        self._files = {}
        self._where = self._index()

    def _index(self) -> dict[str, str]:
        for stem in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{stem}.index.json"
            if index.is_file():
                where = read_json(index).get("weight_map", {})
                missing = {f for f in where.values() if not (self.folder / f).is_file()}
                if missing:
                    raise UserError(f"{index} names {min(missing)}, which is not there.")
                return where
            if (self.folder / stem).is_file():
                return dict.fromkeys(self._open(stem).keys(), stem)
        raise UserError(
            f"{self.folder} holds no model.safetensors (or its index); nothing to load."
        )

    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted(set(self._where.values()))

    def _open(self, file: str):
        if file not in self._files:
            self._files[file] = _open_file(self.folder / file)
        return self._files[file]

    @cached_property
    def _split(self) -> tuple[set[str], set[str]]:
        return formats.split_names(self._where, self.layout)

    @cached_property
    def names(self) -> set[str]:
        """Logical tensor names."""
        packed, plain = self._split
        return plain | {f"{n}.weight" for n in packed}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor by logical name, from the file's header; None for packed ones."""
        if name not in self._where or name.removesuffix(".weight") in self._split[0]:
            return None
        opened = self._open(self._where[name])
        tensor = opened[name] if isinstance(opened, dict) else opened.get_slice(name)
        return tuple(tensor.shape if isinstance(opened, dict) else tensor.get_shape())

    def stored(self, name: str):
        """A tensor exactly as the file holds it (physical name), on the CPU."""
        if name not in self._where:
            raise UserError(f"{self.folder} lacks tensor {name}; the checkpoint is incomplete.")
        file = self._where[name]
        try:
            # A copy: the library's tensor is a window on the mapped file, shared by every reading
            # of it, so that a weight changed in place would be changed for the next reader too, and
            # stay in memory for as long as the file is open.
            if file.endswith(".safetensors"):
                return _open_file(self.folder / file).get_tensor(name).clone()
            return self._open(file)[name].clone()
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own SafetensorError, or OSError
            raise _corrupt(self.folder / file, error) from error

    def read(self, name: str, dtype=None):
        """A tensor by logical name; floating tensors in ``dtype`` (None: as stored)."""
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in self._split[0]:
            conv1d = self.config.get("harness_conv1d", False)
            return formats.matrix(
                self.stored, linear, self.layout, self.quantization, dtype or self.dtype, conv1d
            )
        tensor = self.stored(name)
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    @cached_property
    def dtype(self):
        """The model's dtype: config.json's, else that of the first floating tensor."""
        import torch

        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
            return getattr(torch, named)
        tensors = (self.stored(n) for n in sorted(self._where))
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _open_file(path: Path):
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        try:
            return safe_open(path, framework="pt")
        except Exception as error:
            raise _corrupt(path, error) from error
    import pickle

    import torch

    print(
        f"reading {path.name} (no safetensors there) with torch's weights-only loader",
        file=sys.stderr,
    )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise _corrupt(path, error) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is corrupt or truncated ({one_line(error)}); download or copy it again."
    )


def load_model(
    model: str | Path, *, device: str = "cpu", dtype: str = "auto", load: str | None = None
):
    """The whole model in memory, ready to evaluate, from any format this project writes.

    Packed weights are dequantized to ``dtype``: the numbers are those that a packed kernel's
    reference gives, bit for bit.

    Args:
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        load: "nf4", "nf4-dq" (double quantization) or "int8": quantize on load with bitsandbytes.
    """

    folder = resolve(model)
    config = load_config(folder)
    weights = Weights(folder)
    torch_dtype = weights.dtype if dtype == "auto" else parse_dtype(dtype)
    device = pick_device(device)
    if load:
        return _load_bitsandbytes(folder, load, torch_dtype, device, weights)
    if weights.layout == "dense":
        loaded = load_dense(folder, torch_dtype)
    else:
        loaded = _load_packed(weights, config, torch_dtype)
    return loaded.to(device).eval()


def _load_packed(weights: Weights, config, dtype):
    """A packed checkpoint with its linears dequantized."""
    vars(config).pop("quantization_config", None)
    state = {name: weights.read(name, dtype) for name in sorted(weights.names)}
    return _load_complete(weights.folder, None, config=config, state_dict=state, dtype=dtype)


def _load_complete(folder: Path, *where, config, **more):
    """transformers' from_pretrained; tensors that are missing or of another shape are an error in
    one line, and transformers' table of them is not shown."""
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = sizes.model_class(config).from_pretrained(
            *where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **more
        )
    finally:
        logging.set_verbosity(said)
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{name} has shape {list(stored)} in {folder}; config.json asks for {list(wanted)}. "
            "The two do not belong together."
        )
    missing = report["missing_keys"]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors that config.json asks for, {min(missing)} "
            "among them; the checkpoint is incomplete."
        )
    return model


def load_dense(folder: Path, dtype):
    """A dense checkpoint through transformers; missing tensors are an error, never random."""
    for file in set(Weights(folder).files()):
        _open_file(folder / file)
    try:
        return _load_complete(folder, folder, config=load_config(folder), dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # transformers over the user's files
        raise UserError(f"{folder} cannot be loaded: {one_line(error)}") from error


def _load_bitsandbytes(folder: Path, load: str, dtype, device: str, weights: Weights):
    if weights.layout == "bitmask":
        raise UserError(
            f"{folder} is stored as bitmask; --load needs a dense one: "
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
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=load == "nf4-dq",
            bnb_4bit_compute_dtype=dtype,
        )
    model = sizes.model_class(load_config(folder)).from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": device}
    )
    if load != "int8" and device == "cpu":
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit" and module.in_features % 64:
                raise UserError(
                    f"bitsandbytes' NF4 on the CPU needs input sizes that are multiples of 64; "
                    f"{name} has {module.in_features}. Use a GPU or --load int8."
                )
    return model.eval()


def check_token(largest: int, config) -> None:
    """Refuse a token that the model has no embedding of.

    Raises:
        UserError: ``largest`` is beyond the vocabulary.
    """
    known = config.get_text_config().vocab_size
    if largest >= known:
        raise UserError(
            f"the tokenizer gives token {largest}, the model knows {known}; tokenizer and model do "
            "not belong together."
        )


def parse_dtype(name: str):
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UserError(f"dtype {name}: expected auto, {', '.join(known)}.{nearest(name, known)}")
    return known[name]


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


def one_line(error: Exception) -> str:
    """An exception of another library as the end of a one-line message."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 240 else text[:240] + " ..."
