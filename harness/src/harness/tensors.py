"""The tensors of a checkpoint folder, one at a time, from whatever layout they are stored in."""

import sys
from functools import cached_property
from pathlib import Path

from harness import files, formats
from harness.errors import UserError, one_line


class Weights:
    """The tensors of a checkpoint folder, read one at a time, packed matrices unpacked.

    Logical names: a packed linear X appears as ``X.weight``, whatever its layout.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = files.read_json(folder / "config.json")
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
                where = files.read_json(index).get("weight_map", {})
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
            self._files[file] = open_file(self.folder / file)
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
                return open_file(self.folder / file).get_tensor(name).clone()
            return self._open(file)[name].clone()
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own SafetensorError, or OSError
            raise _corrupt(self.folder / file, error) from error

    def read(self, name: str, dtype=None):
        """A tensor by logical name; floating tensors in ``dtype`` (None: as stored, of packed ones
        the values in the checkpoint's dtype)."""
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in self._split[0]:
            conv1d = self.config.get("harness_conv1d", False)
            return formats.matrix(
                self.stored, linear, self.layout, self.quantization, self.dtype,
                dtype or self.dtype, conv1d,
            )  # fmt: skip
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


def open_file(path: Path):
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
