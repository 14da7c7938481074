"""The dtype of the computation: the one a checkpoint is stored in where the device is fast in it,
else float32.

What is written keeps the checkpoint's own dtype, whatever was computed in: values are rounded to it
before they are evaluated.

On an x86 core with AVX2 alone, products ran at 25 to 34 GFLOP/s in float32 and at 1 to 5 in
bfloat16 and float16. The question is put to the processor's flags and not to a clock, so
that a resumed run gets the answer of the first.
"""

import os
import re
from contextlib import contextmanager

import torch

from harness import distributed
from harness.errors import UserError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Flags of x86 units that multiply in the dtype.
UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
# Values of oneDNN's environment variable that keep it from such units.
WITHOUT_BF16 = {
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
}  # fmt: skip
WITHOUT = {
    torch.bfloat16: WITHOUT_BF16,
    torch.float16: WITHOUT_BF16 | {"AVX512_CORE_BF16"},
}
# Compute capabilities of NVIDIA GPUs from which on products in the dtype are fast.
GPUS = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}
GPU_ONLY = "float16 trains on GPUs only; use --dtype bfloat16 or float32."


def parse(name: str) -> torch.dtype:
    """The dtype of one of the names that --dtype takes beside "auto".

    Raises:
        UserError: it is none.
    """
    if name not in DTYPES:
        raise UserError(f"dtype {name}: expected auto, {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def is_fast(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether ``device`` multiplies matrices in ``dtype`` at least about as fast as in float32."""
    device = torch.device(device)
    if dtype not in UNITS:
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= GPUS[dtype]
    return device.type != "cpu" or cpu_has_units(dtype)


def cpu_has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for bfloat16 or float16, and oneDNN may use them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if limit.upper() in WITHOUT[dtype]:
        return False
    flags = torch.cpu.get_capabilities()
    if flags.get("architecture", "").startswith("x86"):
        return any(flags.get(flag) for flag in UNITS[dtype])
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose(dtype: str, stored: torch.dtype, device: str | torch.device, model) -> torch.dtype:
    """What to compute in, from --dtype; where that is auto a line on stderr says which and why.

    Args:
        dtype: "auto", "float32", "bfloat16" or "float16".
        stored: the checkpoint's own dtype. model: its name, for the line.

    Raises:
        UserError: no such dtype.
    """
    if dtype != "auto":
        return parse(dtype)
    if is_fast(stored, device):
        chosen, why = stored, "the dtype it is stored in"
    else:
        chosen, why = torch.float32, _slow(stored, device)
    _say(model, chosen, stored, why)
    return chosen


def choose_for_training(
    dtype: str, stored: torch.dtype, device: str | torch.device, model
) -> torch.dtype:
    """The same for training: models stored in float16, whose gradients overflow, train in bfloat16
    where that is fast. float16 has to be asked for.

    Raises:
        UserError: no such dtype, or float16 without a GPU.
    """
    wanted = torch.bfloat16 if stored == torch.float16 else stored
    if dtype == "float16" and not torch.cuda.is_available():
        raise UserError(GPU_ONLY)
    if dtype != "auto":
        return parse(dtype)
    if not is_fast(wanted, device):
        chosen, why = torch.float32, _slow(wanted, device)
    elif wanted != stored:
        chosen, why = wanted, "as float16 overflows in training"
    else:
        chosen, why = wanted, "the dtype it is stored in"
    _say(model, chosen, stored, why)
    return chosen


def say_unused(dtype: str, stored: torch.dtype) -> None:
    """Where a command only stores a checkpoint another way, --dtype changes nothing: a line."""
    if dtype != "auto":
        distributed.say(f"--dtype {dtype}: nothing is computed; storage stays {name(stored)}")


def holds(computed: torch.dtype, stored: torch.dtype) -> bool:
    """Whether every value of ``stored`` is one of ``computed``."""
    return computed in (stored, torch.float32, torch.float64)


@contextmanager
def rounded(tensors: list[torch.Tensor], dtype: torch.dtype):
    """Inside, ``tensors`` have values that ``dtype`` holds; afterwards their own again."""
    finer = [tensor for tensor in tensors if not holds(dtype, tensor.dtype)]
    kept = [tensor.clone() for tensor in finer]
    for tensor in finer:
        tensor.copy_(tensor.to(dtype))
    try:
        yield
    finally:
        for tensor, values in zip(finer, kept, strict=True):
            tensor.copy_(values)


@torch.no_grad()
def cast(model, dtype: torch.dtype):
    """``model``, a transformers one, with its parameters in ``dtype``, but for those that
    transformers keeps in float32 then; not its buffers, whose frequencies of positions are float32
    in any model."""
    kept = kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept(name) else dtype)
    return model


def kept_in_float32(model, dtype: torch.dtype):
    """A function: whether transformers keeps the tensor of that name in float32, while it loads
    ``model`` in ``dtype``."""
    patterns = [re.compile(key.replace("*", ".*")) for key in model._get_dtype_plan(dtype)]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def record(computed: torch.dtype, stored: torch.dtype) -> dict[str, str]:
    """Both dtypes, as recipes, cards and results name them."""
    return {"computed": name(computed), "stored": name(stored)}


def _slow(dtype: torch.dtype, device) -> str:
    kind = "CPU" if torch.device(device).type == "cpu" else "GPU"
    return f"as this {kind} has no fast {name(dtype)} (--dtype {name(dtype)} takes it all the same)"


def _say(model, chosen: torch.dtype, stored: torch.dtype, why: str) -> None:
    kept = "" if chosen == stored else f"; storage stays {name(stored)}"
    distributed.say(f"{model}: computing in {name(chosen)}, {why}{kept}")
