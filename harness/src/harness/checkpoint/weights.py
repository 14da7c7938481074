"""The tensors of a checkpoint folder, one at a time, from whatever layout they are stored in."""

import sys
from functools import cached_property
from pathlib import Path

import torch

from harness.checkpoint import layouts, packed, quantconfig, weight_files
from harness.errors import UserError, one_line
from harness.paths import read_json

FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Weights:
    """The tensors of a checkpoint folder, read one at a time, packed matrices unpacked.

    Logical names: a packed linear X appears as ``X.weight``, whatever its layout. As a mapping
    (``weights[name]``, ``name in weights``) it holds what the files hold, by the names there.

    Raises:
        UserError: the folder holds no weights that are read here, or config and files contradict
            each other.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.quantization = quantconfig.of(self.config, folder / "config.json")
        self.layout = quantconfig.layout_of(self.quantization)
        if self.layout == layouts.OTHER:
            raise UserError(
                f"{folder} is stored as {quantconfig.foreign(self.quantization)}, which is not "
                "read here; give the dense model it was made from."
            )
        paths, self._safe = weight_files.locate(folder, self.config)
        read = weight_files.header if self._safe else open_file
        self._held = {path: read(path) for path in paths}
        self._where = {name: path for path, held in self._held.items() for name in held}
        if not self._where:
            raise UserError(f"{folder} holds weight files without a tensor; nothing to load.")
        self.scheme = quantconfig.scheme_of(self.quantization)
        packed.check({n: self._shape(n) for n in self._where}, self.layout, self.scheme)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored(name)

    @cached_property
    def _split(self) -> tuple[set[str], set[str]]:
        return packed.split_names(self._where, self.layout)

    @cached_property
    def names(self) -> set[str]:
        """Logical tensor names."""
        linears, plain = self._split
        return plain | {f"{n}.weight" for n in linears}

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._held[self._where[name]][name].shape)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor, by logical name, is the matrix of a packed linear."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self._split[0]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor by logical name, from the file's header; None for packed ones."""
        return None if self.is_packed(name) else self._shape(name)

    def is_float(self, name: str) -> bool:
        """Whether a tensor, by logical name, holds floating values of 16 bits or more."""
        if self.is_packed(name):
            return True
        dtype = self._held[self._where[name]][name].dtype
        return dtype in ("F64", "F32", "F16", "BF16") if self._safe else dtype in FLOATS

    def stored(self, name: str) -> torch.Tensor:
        """A tensor exactly as the file holds it (physical name), on the CPU."""
        if name not in self._where:
            raise UserError(f"{self.folder} lacks tensor {name}; the checkpoint is incomplete.")
        path = self._where[name]
        try:
            # A copy: the library's tensor is a window on the mapped file, shared by every reading
            # of it, so that a weight changed in place would be changed for the next reader too, and
            # stay in memory for as long as the file is open.
            if self._safe:
                return open_file(path).get_tensor(name).clone()
            return self._held[path][name].clone()
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own SafetensorError, or OSError
            raise _corrupt(path, error) from error

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor by logical name; floating tensors in ``dtype`` (None: as stored, of packed ones
        the values in the checkpoint's dtype)."""
        if self.is_packed(name):
            linear, conv1d = name.removesuffix(".weight"), self.config.get("harness_conv1d", False)
            return layouts.of(self.layout).matrix(
                self, linear, self.scheme and self.scheme.of(linear), self.quantization,
                self.dtype, dtype or self.dtype, conv1d,
            )  # fmt: skip
        tensor = self.stored(name)
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's dtype: config.json's, else that of the first floating tensor."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            named = config.get("dtype") or config.get("torch_dtype")
            dtype = getattr(torch, named, None) if isinstance(named, str) else None
            if dtype in FLOATS:
                return dtype
            if named is not None:
                raise UserError(
                    f"{self.folder}/config.json has the dtype {named!r:.40}; expected bfloat16, "
                    "float16 or float32."
                )
        tensors = (self.stored(n) for n in sorted(self._where))
        return next((t.dtype for t in tensors if t.dtype in FLOATS), torch.float32)


def open_file(path: Path):
    """A safetensors file opened by its library, or the dict that an old .bin file holds.

    Raises:
        UserError: it is neither, or damaged.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        try:
            return safe_open(path, framework="pt")
        except Exception as error:
            raise _corrupt(path, error) from error
    print(
        f"reading {path.name} (no safetensors there) with torch's weights-only loader",
        file=sys.stderr,
    )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the format before torch 1.6 cannot be mapped
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever pickle and zip make of the bytes
            raise _corrupt(path, error) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in loaded.items()
    ):
        raise UserError(f"{path} holds no dict of tensors by name; get another copy.")
    return loaded


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is corrupt or truncated ({one_line(error)}); download or copy it again."
    )
