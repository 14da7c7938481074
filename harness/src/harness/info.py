"""`harness info`: what a checkpoint is, how it was made, what reads it."""

from pathlib import Path

from harness import card, checkpoint, formats
from harness.footprint import Footprint, linear_shapes, stored_size
from harness.macs import macs_per_token, skeleton
from harness.perplexity import context_length, window_length


def info(model: str) -> str:
    """A two-column text about the checkpoint that `model` names; no weight is read."""
    folder = checkpoint.resolve(model)
    config = checkpoint.load_config(folder)
    text = config.get_text_config()
    size = stored_size(folder, config)
    length = window_length(config)
    macs = macs_per_token(skeleton(config), length, linear_shapes(folder))
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    shape = f"{text.num_hidden_layers} blocks of width {text.hidden_size}"
    lines = [
        ("folder", str(folder)),
        ("architecture", f"{config.model_type}, {shape}, vocabulary {text.vocab_size}"),
        ("context", f"{context_length(config) or 'unbounded'} tokens"),
        ("stored as", _stored_as(quantization)),
        ("parameters", f"{size.parameters / 1e6:,.2f} M"),
        ("bits", _bits(size)),
        ("weight files", f"{size.disk_bytes / 1e6:,.2f} MB"),
        ("arithmetic", f"{macs['total'] / 1e6:,.2f} MMAC per token, over {length} keys"),
        ("read by", _readers(quantization, config)),
        *_recipe(folder),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)


def _stored_as(quantization: dict | None) -> str:
    layout = formats.layout_of(quantization)
    if layout == "other":
        return f"{quantization.get('quant_method', 'unknown')} (another library's)"
    if layout == "dense":
        return "dense"
    grid = formats.grid_of(quantization)
    group = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    kind = "symmetric" if grid.symmetric else "asymmetric"
    return f"{layout}, {grid.bits} bits, {group}, {kind}"


def _bits(size: Footprint) -> str:
    whole = f"{size.bits_per_parameter:.3f} per parameter"
    if size.bits_per_weight is None:
        return whole
    return f"{size.bits_per_weight:.3f} per weight of the quantized linears, {whole} in all"


def _readers(quantization: dict | None, config) -> str:
    layout = formats.layout_of(quantization)
    if layout == "other":
        return "transformers, with the library that made it"
    grid = None if layout == "dense" else formats.grid_of(quantization)
    return card.readers(layout, grid, config)


def _recipe(folder: Path) -> list[tuple[str, str]]:
    path = folder / "recipe.yaml"
    if not path.is_file():
        return [("recipe", "none")]
    import yaml

    steps = yaml.safe_load(path.read_text(encoding="utf-8"))["steps"]
    return [
        (f"step {number}", str(step.get("command") or step.get("method")))
        for number, step in enumerate(steps, 1)
    ]
