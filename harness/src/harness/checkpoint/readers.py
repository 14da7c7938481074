"""What loads a result: said on its card and by `harness info`, and only what was tried.

transformers is asked itself, for every model: it loads the result's tensors on the meta device,
where they have shapes and no values, and tells what it misses. vLLM is promised for the families
that the vLLM session serves.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness import paths
from harness.checkpoint import layouts, load, nonuniform, quantconfig, weight_files
from harness.errors import one_line
from harness.quant.scheme import Scheme

UNPACKS = (0, 20)  # the version of compressed-tensors that unpacks on the meta device
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def describe(layout: str, scheme: Scheme | None, config, fault: str | None) -> str:
    """What loads a checkpoint of a model with this transformers ``config`` in ``layout`` on
    ``scheme``; ``fault``: what :func:`fault_in_transformers` found.

    vLLM 0.32 runs 4 bits on CPUs that have AVX-512, which the vLLM session checks, and refuses 8
    there; its list of kernels for GPUs has both.
    """
    if getattr(config, nonuniform.KEY, None):
        return "the harness only (its blocks differ in size)"
    if layout == layouts.OTHER:
        return "transformers, with the library that made it"
    return layouts.of(layout).readers(scheme, config.model_type, fault)


def of_folder(folder: Path, config) -> str:
    """:func:`describe` of the checkpoint in ``folder``, whatever made it."""
    quantization = quantconfig.of(paths.read_json(folder / "config.json"), folder / "config.json")
    layout, fault = quantconfig.layout_of(quantization), None
    if layout != layouts.OTHER and layouts.of(layout).ASKED:
        shapes = _shapes(weight_files.read_headers(folder))
        fault = fault_in_transformers(load.load_config(folder), shapes) if shapes else None
    return describe(layout, quantconfig.scheme_of(quantization), config, fault)


def of_shards(config, files: list[Path], outer: dict[str, torch.Tensor]) -> str:
    """:func:`describe` of a dense result: its finished shards, and what else it will hold."""
    stored = {n: t for file in files for n, t in weight_files.header(file).items()}
    tensors = _shapes(stored)
    tensors |= {n: _empty(t.shape, t.dtype) for n, t in outer.items()}
    return describe("dense", None, config, fault_in_transformers(config, tensors))


def of_result(
    model: nn.Module,
    packed: set[str],
    layout: str,
    scheme: Scheme | None,
    quantization: dict | None,
) -> str:
    """:func:`describe` of a result before it is made: ``model``, of which the linears ``packed``,
    by full name, will be stored in ``layout``."""
    config = model.config
    kind = layouts.of(layout)
    if not kind.ASKED:
        return describe(layout, scheme, config, None)
    if kind.HOLDS == "codes" and any(isinstance(model.get_submodule(n), Conv1D) for n in packed):
        return describe(layout, scheme, config, "it has no packed form of GPT-2's Conv1D")
    dtype, tensors = config.dtype or torch.float32, {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in model.state_dict().items():
        linear = name.removesuffix(".weight")
        if quantization and name.endswith(".weight") and linear in packed:
            rows, columns = tensor.shape
            tensors |= {
                f"{linear}.{part}": _empty(shape, kind)
                for part, (shape, kind) in kind.parts(
                    scheme.of(linear), rows, columns, dtype
                ).items()
            }
        elif name not in tied:
            tensors[name] = _empty(tensor.shape, tensor.dtype)
    raw = config.to_dict() | ({"quantization_config": quantization} if quantization else {})
    fault = fault_in_transformers(type(config).from_dict(raw), tensors)
    return describe(layout, scheme, config, fault)


def fault_in_transformers(config, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Why transformers does not make the model of ``config`` from ``tensors``, which may be on the
    meta device; None where it does."""
    quantization = getattr(config, "quantization_config", None)
    if quantization and tuple(map(int, version("compressed-tensors").split(".")[:2])) < UNPACKS:
        return None  # the older library of vLLM's environment cannot be asked so
    # With one scale per row compressed-tensors guesses the columns on the meta device.
    guessed = bool(quantization) and any(
        grid.group_size == -1 for grid in quantconfig.scheme_of(quantization).grids
    )
    try:
        with _quiet():
            _, report = nonuniform.model_class(config).from_pretrained(
                None, config=config, state_dict=dict(tensors), device_map="meta",
                output_loading_info=True, ignore_mismatched_sizes=guessed,
            )  # fmt: skip
    except Exception as error:  # whatever its own code makes of these names and shapes
        return one_line(error)[:120]
    missing = sorted(report["missing_keys"])
    return f"it misses {len(missing)} tensors, {missing[0]} among them" if missing else None


@contextmanager
def _quiet():
    """Without what transformers and compressed-tensors say while they load."""
    import compressed_tensors  # noqa: F401  (which sets up its logger)
    import loguru
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loguru.logger.disable("compressed_tensors")
    try:
        yield
    finally:
        loguru.logger.enable("compressed_tensors")
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _shapes(stored: Mapping[str, weight_files.Stored]) -> dict[str, torch.Tensor]:
    """Tensors on the meta device as headers have them."""
    return {name: _empty(t.shape, DTYPES.get(t.dtype)) for name, t in stored.items()}


def _empty(shape, dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype or torch.float32, device="meta")
