"""The pass over all blocks that every layer-wise method rides.

    for each block: load -> for each stage: statistics of its input -> new weights
                    -> hidden states for the next block -> write -> free

What happens inside a block, and what a method is, stands in block_pass.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from harness import distributed, memory, paths, precision
from harness.blocks import preflight
from harness.blocks.block_pass import BlockPass, Method, Update, Where
from harness.blocks.decoder import Decoder
from harness.checkpoint import card, quantconfig, readers, runs, side_files
from harness.checkpoint.load import window_length
from harness.checkpoint.runs import LOG
from harness.checkpoint.shards import Writer, config_for
from harness.data import corpora
from harness.modules import linears
from harness.progress import track

__all__ = ["LOG", "Method", "Update", "Where", "compress"]


@torch.no_grad()  # here, because forwards that pause inside it would leave it switched off behind
def compress(
    decoder: Decoder,
    method: Method,
    out: Path,
    *,
    base: str,
    windows: torch.Tensor | None = None,
    calibration: dict | None = None,
    command: str = "",
    overwrite: bool = False,
    resume: bool = True,
    block_pass=BlockPass,
) -> list[dict]:
    """Run ``method`` over every block and write the checkpoint ``out``.

    Args:
        base: the model as the user named it.
        windows: calibration token ids [N, T]; required when the method takes statistics.
        calibration: dataset, nsamples, seqlen and seed, for the card.
        block_pass: what changes a block and knows its inputs, :class:`BlockPass` or its like (made
            of the same arguments, with the same ``compress`` and ``replay``).

    Returns:
        One row per linear: block, name, error, and what the method noted.

    Raises:
        UserError: everything in the bad-input table of the tests.
    """
    preflight.check(decoder, method.grid, method.layout, out)
    stays = preflight.what_stays(decoder)
    if stays:
        distributed.say(stays)
    if windows is not None:
        _check_windows(decoder, windows)
    conv1d = any(isinstance(m, Conv1D) for m in decoder.blocks.modules())
    quantization = None
    if method.layout != "dense":
        quantization = quantconfig.describe(method.grid, method.layout, method.actorder, [])
    identity = {
        "base": base,
        "method": method.name,
        "layout": method.layout,
        "dtype": precision.name(decoder.dtype),
        "true_sequential": method.true_sequential,
        **method.settings,
        **(calibration or {}),
    }
    everything = {
        f"{decoder.prefix}.{index}.{name}"
        for index, block in enumerate(decoder.blocks)
        for name in linears(block)
    }
    read_by = readers.of_result(decoder.model, everything, method.layout, method.grid, quantization)
    if "transformers:" in read_by:
        distributed.say(f"the result will be read by {read_by}")
    distributed.lead(lambda: preflight.check_scales(decoder, method.grid, method.layout))
    shards = _open_shards(decoder, out, windows, identity, overwrite, resume)

    rows = []
    with shards.run.nothing_left():
        blocks = block_pass(decoder, method, windows, conv1d, quantization)
        finished = distributed.broadcast_object(shards.finished)
        if finished:
            distributed.say(f"resuming: {finished} of {len(decoder)} blocks are done")
        for index in track(range(len(decoder)), method.name, len(decoder)):
            if index < finished:
                tensors, block_rows = shards.read_block(index)
                blocks.replay(index, tensors)
            else:
                tensors, block_rows, side = blocks.compress(index)
                block = (index, tensors, block_rows, side)
                distributed.lead(lambda b=block: shards.write_block(*b))
                del block, side
            decoder.release(index)
            del tensors
            memory.give_back()
            rows += block_rows

    step = {
        "method": method.name,
        "base": base,
        "command": command,
        "settings": method.settings,
        "calibration": calibration,
        "dtype": precision.record(decoder.dtype, decoder.stored_dtype),
    }
    finish = (decoder, method, shards, step, rows, conv1d, quantization, read_by)
    distributed.lead(lambda: _finish(*finish))
    return rows


def _check_windows(decoder: Decoder, windows: torch.Tensor) -> None:
    window_length(decoder.config, windows.shape[1])
    corpora.check_token(int(windows.max()), decoder.config)


def _open_shards(decoder, out, windows, identity, overwrite, resume) -> Writer:
    """The output's shards: begun or resumed by rank 0, then opened for reading by the others."""
    shards = None

    def begin():
        nonlocal shards
        mark = runs.fingerprint(decoder.weights.folder, windows, identity)
        shards = Writer(out, len(decoder), mark, overwrite=overwrite, resume=resume)

    distributed.lead(begin)
    return shards or Writer(out, len(decoder), {}, lead=False)


def _with_matrices(model) -> Iterator[str]:
    """The modules that hold matrices of their own and look nothing up: linears, routers, experts.
    Readers take those that are not packed by name."""
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if not isinstance(module, torch.nn.Embedding) and any(p.ndim > 1 for p in own):
            yield name


def _finish(decoder, method, shards, step, rows, conv1d, quantization, read_by) -> None:
    """What lies outside the blocks, config, recipe, card and log; then the final name."""
    source = decoder.weights.folder
    if quantization and method.layout == "compressed-tensors":
        done = {row["name"] for row in rows}
        quantization["ignore"] = sorted(set(_with_matrices(decoder.model)) - done)
        if conv1d:
            # By name, not as "Linear": transformers, which has no packed Conv1D, then refuses
            # the checkpoint, where it would fill it with random weights and a warning.
            quantization["config_groups"]["group_0"]["targets"] = sorted(done)
    config = config_for(source, decoder.stored_dtype, quantization, conv1d)
    side_files.copy(source, shards.partial)
    outer = decoder.outer_tensors()
    written = sum(paths.tensor_bytes(shards.shard(1 + i)) for i in range(len(decoder)))
    weights = max(sum(row["weights"] for row in rows), 1)
    counted = ", scales and zero points counted" if method.grid else ""
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
