"""What a layer-wise pass leaves: a block's tensors as its file holds them, its rows of the log, and
at the end what lies outside the blocks, config, card and recipe."""

import json
from collections.abc import Iterator

import torch

from harness import paths
from harness.blocks.block import BlockInHand
from harness.checkpoint import card, layouts, side_files
from harness.checkpoint.runs import LOG
from harness.checkpoint.shards import Writer, config_for
from harness.modules import turn
from harness.quant.grid import QuantizedWeight


def tensors_of(hand: BlockInHand, layout: str) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The block's tensors, by full name, in ``layout``; and the bytes of each updated linear."""
    decoder = hand.decoder
    tensors, linear_bytes = {}, {}
    for name, value in hand.block.state_dict().items():
        linear, full = name.removesuffix(".weight"), f"{hand.prefix}.{name}"
        update = hand.updates.get(linear) if name.endswith(".weight") else None
        if name in hand.parameters:
            tensors[full] = hand.parameters[name]
        elif update is None:
            tensors[full] = decoder.stored(full) if decoder.has(full) else value
        else:
            weight, store = update.weight, layouts.of(layout).encode
            if not isinstance(weight, QuantizedWeight):
                weight = turn(hand.block.get_submodule(linear), weight)
                store = layouts.of("dense").encode if layouts.of(layout).HOLDS == "codes" else store
            parts = store(f"{hand.prefix}.{linear}", weight)
            linear_bytes[linear] = sum(t.nbytes for t in parts.values())
            tensors |= parts
    return tensors, linear_bytes


def rows_of(hand: BlockInHand, linear_bytes: dict[str, int]) -> list[dict]:
    """A row of the log for every updated linear."""
    return [
        {
            "block": hand.index,
            "name": f"{hand.prefix}.{name}",
            "weights": hand.block.get_submodule(name).weight.numel(),
            "bytes": linear_bytes[name],
            "error": update.error,
            **update.note,
            **hand.notes,
        }
        for name, update in hand.updates.items()
    ]


def side_of(hand: BlockInHand) -> dict[str, torch.Tensor]:
    """The tensors of all updates that are no part of the model, by full name."""
    return {
        f"{hand.prefix}.{name}.{key}": tensor
        for name, update in hand.updates.items()
        for key, tensor in update.side.items()
    }


def finish(decoder, method, shards: Writer, step: dict, rows, quantization, read_by: str) -> None:
    """Write what lies outside the blocks, config, recipe, card and log; then the final name.

    Args:
        method: :class:`harness.blocks.sequential.Method`. step: its entry in recipe.yaml.
        rows: the log's. quantization: quantization_config of the result, or None.
        read_by: what loads it.
    """
    source, conv1d = decoder.weights.folder, decoder.has_conv1d
    packed = {row["name"] for row in rows}
    layouts.of(method.layout).name_targets(
        quantization, method.scheme, packed, set(_with_matrices(decoder.model)) - packed, conv1d
    )
    config = config_for(source, decoder.stored_dtype, quantization, conv1d)
    if decoder.transform is not None:
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = False
    side_files.copy(source, shards.partial)
    outer = decoder.outer_tensors()
    written = sum(paths.tensor_bytes(shards.shard(1 + i)) for i in range(len(decoder)))
    weights = max(sum(row["weights"] for row in rows), 1)
    counted = ", scales and zero points counted" if method.scheme else ""
    sizes = {
        f"bits per weight of these linears{counted}": 8 * sum(r["bytes"] for r in rows) / weights,
        "MB on disk": (written + sum(t.nbytes for t in outer.values())) / 1e6,
    }
    if any("zeros" in row for row in rows):
        sizes["% of these linears that are zero"] = 100 * sum(r["zeros"] for r in rows) / weights
    texts = {
        "recipe.yaml": card.recipe(source, step),
        "README.md": card.model_card(step["base"], step, method.layout, sizes, read_by),
        LOG: json.dumps({**step, **shards.run.made_by, "layers": rows}, indent=1) + "\n",
    }
    side = (method.side_file, method.side_note) if method.side_file else None
    shards.finish(outer, config, texts, side)


def _with_matrices(model) -> Iterator[str]:
    """The modules that hold matrices of their own and look nothing up: linears, routers, experts.
    Readers take those that are not packed by name."""
    for name, module in model.named_modules():
        matrices = (p for p in module.parameters(recurse=False) if p.ndim > 1)
        if not isinstance(module, torch.nn.Embedding) and any(True for _ in matrices):
            yield name
