"""The smaller model: its blocks, its config.json, its sizes before and after."""

import json
from pathlib import Path

import torch

from harness import distributed, memory, paths
from harness.blocks import plan
from harness.blocks.decoder import Decoder
from harness.checkpoint import card, nonuniform, readers, side_files
from harness.checkpoint.nonuniform import skeleton
from harness.checkpoint.runs import LOG
from harness.checkpoint.shards import Writer, config_for
from harness.metrics.macs import macs_per_token
from harness.progress import track
from sparse.structured import groups, hidden_channels
from sparse.structured.levels import HIDDEN, Cut


def write(decoder: Decoder, cut: Cut, out: Path, step: dict, identity: dict, result: dict, **how):
    """Write the checkpoint ``out`` block by block, on rank 0.

    Args:
        step: for recipe.yaml and the card. result: of :func:`summary`.
        identity: what a resumed run must agree with.
        how: overwrite and resume, see :meth:`harness.checkpoint.runs.RunFolder.open`.
    """
    source = decoder.weights.folder
    shards = Writer(out, cut.layers, identity, **how)
    finished = shards.finished
    if finished:
        distributed.say(f"resuming: {finished} of {cut.layers} blocks are done")
    for index in track(range(cut.layers), "writing", cut.layers):
        if index >= finished:
            shards.write_block(index, _block(decoder, cut, index), [result["rows"][index]])
            memory.give_back()
    outer = decoder.outer_tensors()
    if None in cut.holds:
        outer = hidden_channels.cut(outer, cut.holds[None], cut.alive[HIDDEN])
    files = [shards.shard(1 + i) for i in range(cut.layers)]
    read_by = readers.of_shards(nonuniform.config_of(result["config"]), files, outer)
    written = sum(paths.tensor_bytes(shards.shard(1 + i)) for i in range(cut.layers))
    numbers = {
        "million parameters": result["parameters"][1] / 1e6,
        "million parameters before": result["parameters"][0] / 1e6,
        "MB on disk": (written + sum(t.nbytes for t in outer.values())) / 1e6,
    }
    side_files.copy(source, shards.partial)
    log = {key: value for key, value in result.items() if key != "config"}
    texts = {
        "recipe.yaml": card.recipe(source, step),
        "README.md": card.model_card(step["base"], step, "dense", numbers, read_by),
        LOG: json.dumps(step | shards.run.made_by | log, indent=1) + "\n",
    }
    shards.finish(outer, result["config"], texts)


def _block(decoder: Decoder, cut: Cut, index: int) -> dict[str, torch.Tensor]:
    """Block ``index``'s tensors by full name, as they are stored."""
    prefix = f"{decoder.prefix}.{index}."
    own = {n.removeprefix(prefix): t for n, t in decoder.block_tensors(index).items()}
    own = groups.cut(decoder.blocks[index], own, cut.masks(index))
    if index in cut.holds:
        own = hidden_channels.cut(own, cut.holds[index], cut.alive[HIDDEN])
    return {prefix + name: tensor for name, tensor in own.items()}


def summary(decoder: Decoder, cut: Cut, length: int) -> dict:
    """What :func:`sparse.structured.prune` returns; MACs are of a token among ``length``."""
    rows, entries = [], []
    for index in range(cut.layers):
        entry = groups.entry(decoder, index, cut.masks(index))
        heads, kv_heads = nonuniform.heads(decoder.config, index)
        row = {"block": index, "heads": [heads, entry["heads"]]}
        row["kv_heads"] = [kv_heads, entry["kv_heads"]]
        if cut.channels:
            gone = [int((~m).sum()) for g, m in cut.masks(index) if g.kind == "channels"]
            entry["channels"] = cut.channels[index] - sum(gone)
            row["channels"] = [cut.channels[index], entry["channels"]]
        rows.append(row)
        entries.append(entry)
    config = _config(decoder, cut, entries)
    width = decoder.config.get_text_config().hidden_size
    models = [skeleton(decoder.config), skeleton(nonuniform.config_of(config))]
    return {
        "rows": rows,
        "hidden": [width, int(cut.alive[HIDDEN].sum()) if cut.holds else width],
        "layers": [len(decoder), cut.layers],
        "parameters": [sum(p.numel() for p in m.parameters()) for m in models],
        "macs": [macs_per_token(m, length)["total"] for m in models],
        "ordinary": nonuniform.KEY not in config,
        "family": decoder.config.model_type,
        "config": config,
    }


def _config(decoder: Decoder, cut: Cut, entries: list[dict]) -> dict:
    """The result's config.json: ordinary fields where they can say it, else sizes per block."""
    raw = config_for(decoder.weights.folder, decoder.stored_dtype, None, False)
    if cut.layers < len(decoder):
        if nonuniform.KEY in raw:
            raw[nonuniform.KEY] = raw[nonuniform.KEY][: cut.layers]
        return nonuniform.with_fields(raw, {"layers": cut.layers, "layers_before": len(decoder)})
    head_dim = nonuniform.head_dim(decoder.config)
    if cut.holds:
        alive = cut.alive[HIDDEN]
        changes = {"hidden_size": int(alive.sum()), "head_dim": head_dim}
        epsilon = getattr(decoder.config.get_text_config(), "rms_norm_eps", None)
        if epsilon is not None:
            changes["eps"] = epsilon * len(alive) / int(alive.sum())
        return nonuniform.ordinary(raw, {}, changes)
    first = entries[0]
    if all(entry == first for entry in entries) and "kept_heads" not in first:
        changes = {"channels": first["channels"]} if first["channels"] else {}
        if first["heads"] != nonuniform.model_heads(decoder.config):
            changes |= {"heads": first["heads"], "kv_heads": first["kv_heads"]}
            changes["head_dim"] = head_dim
        shapes = {
            f"{decoder.prefix}.{index}.{name}.weight": _as_stored(decoder, index, name, shape)
            for index in range(cut.layers)
            for name, shape in first["linears"].items()
        }
        ordinary = nonuniform.ordinary(raw, shapes, changes)
        if ordinary:
            return ordinary
    return raw | {nonuniform.KEY: entries}


def _as_stored(decoder: Decoder, index: int, name: str, shape: list[int]) -> tuple[int, ...]:
    turned = groups.is_turned(decoder.blocks[index].get_submodule(name))
    return tuple(reversed(shape)) if turned else tuple(shape)


def print_needs(decoder: Decoder, windows: torch.Tensor | None, result: dict) -> None:
    """About what the run needs: memory, disk, and time by a product timed for a quarter second."""
    block = max(sum(p.numel() for p in b.parameters()) for b in decoder.blocks)
    blocks = sum(p.numel() for b in decoder.blocks for p in b.parameters())
    outer = result["parameters"][0] - blocks
    item, tokens = decoder.dtype.itemsize, 0 if windows is None else windows.numel()
    width = decoder.config.get_text_config().hidden_size
    kept = tokens * width * len(decoder) * item
    # Weights, their gradients and float32 sums; the check holds a block twice in float32.
    need = outer * item + kept + max(block * (2 * item + 4), block * 8)
    speed = plan.multiply_adds_per_second(decoder.device, decoder.dtype)
    seconds = 4 * tokens * result["parameters"][0] / speed + 3 * blocks / 1e8
    print(
        f"in all: at most about {need / 1e9:.2f} GB of memory, "
        f"{result['parameters'][1] * item / 1e6:.1f} MB of disk, {seconds / 60:.1f} minutes"
    )
