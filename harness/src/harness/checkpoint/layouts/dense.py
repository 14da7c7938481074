"""Ordinary safetensors: the matrices as they are."""

import torch

HOLDS = "values"
MARK, NEEDED, OPTIONAL = None, set(), {"bias"}
ASKED = True
IN_VLLM = ("llama", "mistral")


def config(scheme, actorder: bool) -> None:
    """A dense checkpoint has no quantization_config."""


def scheme_of(config) -> None:
    """Nor a grid."""


def refuse(scheme, shapes, some_left: bool) -> None:
    """Any matrix fits."""


def name_targets(config, scheme, packed: set[str], dense: set[str], conv1d: bool) -> None:
    """Its readers ask the tensors."""


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    return stored


def encode(name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": matrix}


def nbytes(rows: int, columns: int, nonzeros: float, item: int) -> int:
    return rows * columns * item


def describe(scheme) -> str:
    return "dense"


def readers(scheme, family: str, fault: str | None) -> str:
    if fault:
        return f"the harness only (transformers: {fault})"
    if family in IN_VLLM:
        return "transformers, vLLM, and everything else that reads Hugging Face checkpoints"
    return f"transformers, the harness (vLLM was not tried with {family})"
