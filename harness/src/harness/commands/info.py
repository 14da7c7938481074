"""`harness info`: what a checkpoint is, how it was made, what reads it."""

from pathlib import Path

from harness import paths
from harness.checkpoint import layouts, load, names, quantconfig, readers, recipe
from harness.checkpoint.load import context_length, window_length
from harness.checkpoint.nonuniform import skeleton
from harness.checkpoint.weights import Weights
from harness.metrics import sparsity
from harness.metrics.footprint import Footprint, linear_shapes, stored_size
from harness.metrics.macs import macs_per_token


def info(model: str) -> str:
    """A two-column text about the checkpoint that `model` names.

    Of dense and bitmask checkpoints the zeros are counted, which reads every block once.
    """
    folder = load.resolve(model)
    config = load.load_config(folder)
    text = config.get_text_config()
    path = folder / "config.json"
    quantization = quantconfig.of(paths.read_json(path), path)
    model = skeleton(config)
    if quantconfig.layout_of(quantization) != "other":
        names.match(model, Weights(folder))
    size = stored_size(folder, config)
    length = window_length(config)
    macs = macs_per_token(model, length, linear_shapes(folder))
    steps = recipe.steps(folder)
    blocks, width = (getattr(text, n, "?") for n in ("num_hidden_layers", "hidden_size"))
    vocabulary = getattr(text, "vocab_size", "?")
    shape = f"{blocks} blocks of width {width}, vocabulary {vocabulary}"
    lines = [
        ("folder", str(folder)),
        ("architecture", f"{config.model_type}, {shape}"),
        ("context", f"{context_length(config) or 'unbounded'} tokens"),
        ("stored as", _stored_as(quantization)),
        ("parameters", f"{size.parameters / 1e6:,.2f} M"),
        ("bits", _bits(size)),
        ("weight files", f"{size.disk_bytes / 1e6:,.2f} MB"),
        *_zeros(folder, quantconfig.layout_of(quantization), size.disk_bytes),
        *_smaller(steps),
        ("arithmetic", f"{macs['total'] / 1e6:,.2f} MMAC per token, over {length} keys"),
        ("read by", readers.of_folder(folder, config)),
        *_recipe(steps),
    ]
    indent = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(indent)}  {value}" for name, value in lines)


def _stored_as(quantization: dict | None) -> str:
    layout = quantconfig.layout_of(quantization)
    if layout == layouts.OTHER:
        return f"{quantconfig.foreign(quantization)} (another library's, not read here)"
    return layouts.of(layout).describe(quantconfig.scheme_of(quantization))


def _bits(size: Footprint) -> str:
    whole = f"{size.bits_per_parameter:.3f} per parameter"
    if size.bits_per_weight is None:
        return whole
    return f"{size.bits_per_weight:.3f} per weight of the quantized linears, {whole} in all"


def _zeros(folder: Path, layout: str, disk: int) -> list[tuple[str, str]]:
    """Lines about zeros, where there are enough of them to matter."""
    if layout not in layouts.PRUNED:
        return []
    found = sparsity.of_checkpoint(folder)
    if found.share < sparsity.WORTH_SAYING:
        return []
    shares = [100 * zeros / weights for weights, zeros in found.blocks]
    spread = f"{min(shares):.1f} to {max(shares):.1f} % by block"
    other, size = sparsity.stored_otherwise(found, layout, disk)
    return [
        ("zeros", f"{100 * found.share:.2f} % of the blocks' linears, {spread}"),
        (f"as {other}", f"{size / 1e6:,.2f} MB (harness convert --format {other})"),
        ("faster?", sparsity.NO_KERNELS),
    ]


def _smaller(steps: list[dict]) -> list[tuple[str, str]]:
    structured = any("pruning_ratio" in step["settings"] for step in steps if "settings" in step)
    return [("faster?", sparsity.SMALLER)] if structured else []


def _recipe(steps: list[dict]) -> list[tuple[str, str]]:
    if not steps:
        return [("recipe", "none")]
    return [
        (f"step {number}", str(step.get("command") or step.get("method")))
        for number, step in enumerate(steps, 1)
    ]
