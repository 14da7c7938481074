"""The pass over all blocks that every layer-wise method rides.

    for each block: load -> every act of the method -> hidden states for the next block
                    -> write -> free

What an act sees and changes stands in block.py.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import distributed, memory, precision
from harness.blocks import preflight, result
from harness.blocks.block import Act, BlockInHand, Update, per_stage
from harness.blocks.decoder import Decoder, batches
from harness.blocks.streams import Streams
from harness.checkpoint import layouts, readers, runs
from harness.checkpoint.load import window_length
from harness.checkpoint.runs import LOG
from harness.checkpoint.shards import Writer, decode_block
from harness.data import corpora
from harness.modules import linears
from harness.progress import time_left, track
from harness.quant.scheme import Scheme

__all__ = ["LOG", "Act", "BlockInHand", "Method", "Update", "compress", "per_stage"]


@dataclass
class Method:
    """What a layer-wise method tells the pass.

    Attributes:
        name: for the card and the log.
        settings: recorded in recipe.yaml; a resumed run must agree with them.
        acts: what is done to every block, one after another.
        streams: the hidden states that acts look at, one of :data:`harness.blocks.streams.KINDS`.
        split: calibration windows [N, T] -> batches [B, T].
        layout: one of :data:`harness.checkpoint.layouts.LAYOUTS`.
        scheme: the grids of the packed result; None for dense and bitmask.
        actorder: whether packed groups were solved in act-order (recorded in the config).
        side_file: of the result, for the side tensors of all updates. side_note: its metadata, one
            entry.
    """

    name: str
    settings: dict
    acts: list[Act]
    streams: tuple[str, ...] = ("quantized",)
    split: Callable[[torch.Tensor], list[torch.Tensor]] = batches
    layout: str = "dense"
    scheme: Scheme | None = None
    actorder: bool = False
    side_file: str | None = None
    side_note: dict[str, str] | None = None


@torch.no_grad()
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
) -> list[dict]:
    """Run ``method`` over every block and write the checkpoint ``out``.

    Args:
        base: the model as the user named it.
        windows: calibration token ids [N, T], for methods that look at data.
        calibration: dataset, nsamples, seqlen and seed, for the card.

    Returns:
        One row per linear: block, name, error, and what the method noted.

    Raises:
        UserError: everything in the bad-input table of the tests.
    """
    preflight.check(decoder, method.scheme, method.layout, out)
    stays = preflight.what_stays(decoder)
    if stays:
        distributed.say(stays)
    if windows is not None:
        window_length(decoder.config, windows.shape[1])
        corpora.check_token(int(windows.max()), decoder.config)
    quantization = layouts.of(method.layout).config(method.scheme, method.actorder)
    identity = {
        "base": base,
        "method": method.name,
        "layout": method.layout,
        "dtype": precision.name(decoder.dtype),
        **method.settings,
        **(calibration or {}),
    }
    every = {
        f"{decoder.prefix}.{index}.{name}"
        for index, block in enumerate(decoder.blocks)
        for name in linears(block)
    }
    packed = {name for name in every if method.scheme and method.scheme.of(name)}
    read_by = readers.of_result(decoder.model, packed, method.layout, method.scheme, quantization)
    if "transformers:" in read_by:
        distributed.say(f"the result will be read by {read_by}")
    distributed.lead(lambda: preflight.check_scales(decoder, method.scheme, method.layout))
    shards = _open_shards(decoder, out, windows, identity, overwrite, resume)

    rows = _every_block(decoder, method, shards, windows, quantization)
    step = {
        "method": method.name,
        "base": base,
        "command": command,
        "settings": method.settings,
        "calibration": calibration,
        "dtype": precision.record(decoder.dtype, decoder.stored_dtype),
    }
    parts = (decoder, method, shards, step, rows, quantization, read_by)
    distributed.lead(lambda: result.finish(*parts))
    return rows


def _every_block(decoder, method: Method, shards: Writer, windows, quantization) -> list[dict]:
    """Work on every block that is not finished yet, and write it; the rows of all."""
    rows = []
    begun = time.perf_counter()
    with shards.run.nothing_left():
        streams = Streams(decoder, windows, method.streams, method.split)
        finished = distributed.broadcast_object(shards.finished)
        if finished:
            distributed.say(f"resuming: {finished} of {len(decoder)} blocks are done")
        for index in track(range(len(decoder)), method.name, len(decoder)):
            if index < finished:
                tensors, block_rows = shards.read_block(index)
                _replay(decoder, streams, index, tensors, method.layout, quantization)
                del tensors
            else:
                started = time.perf_counter()
                hand = work_on(decoder, index, streams, method)
                tensors, linear_bytes = result.tensors_of(hand, method.layout)
                block_rows = result.rows_of(hand, linear_bytes)
                block = (index, tensors, block_rows, result.side_of(hand))
                distributed.lead(lambda b=block: shards.write_block(*b))
                del block, tensors, hand
                _report(block_rows, index, len(decoder), started, begun, index + 1 - finished)
            decoder.release(index)
            memory.give_back()
            rows += block_rows
    return rows


def work_on(decoder: Decoder, index: int, streams: Streams, method: Method) -> BlockInHand:
    """Block ``index`` after every act of ``method``, its streams taken on behind it."""
    hand = BlockInHand(decoder, index, streams, packs=layouts.of(method.layout).HOLDS == "codes")
    for act in method.acts:
        act(hand)
    hand.advance()
    return hand


def _replay(decoder, streams: Streams, index: int, tensors, layout: str, quantization) -> None:
    """Take the streams on behind a finished block, whose stored tensors these are."""
    if not streams.inputs:
        return
    if streams.targets is not None:
        decoder.load(index)
        streams.look_ahead(index)
    dense = decode_block(tensors, layout, quantization, decoder.stored_dtype, decoder.has_conv1d)
    decoder.load(index, dense)
    streams.advance(index)


def _open_shards(decoder, out, windows, identity, overwrite, resume) -> Writer:
    """The output's shards: begun or resumed by rank 0, then opened for reading by the others."""
    shards = None

    def begin():
        nonlocal shards
        mark = runs.fingerprint(decoder.weights.folder, windows, identity)
        shards = Writer(out, len(decoder), mark, overwrite=overwrite, resume=resume)

    distributed.lead(begin)
    return shards or Writer(out, len(decoder), {}, lead=False)


def _report(rows, index: int, blocks: int, started: float, begun: float, done: int) -> None:
    if distributed.rank() or sys.stderr.isatty():
        return
    now = time.perf_counter()
    errors = [row["error"] for row in rows if row["error"] is not None]
    mean = f", mean relative error {sum(errors) / len(errors):.3g}" if errors else ""
    if errors and "before" in rows[0]:
        mean += f" ({rows[0]['before']:.3g} before training)"
    left = time_left(now - begun, done, done + blocks - index - 1)
    distributed.say(
        f"block {index + 1}/{blocks}: {now - started:.1f} s{mean}, peak {memory.peak()}, {left}"
    )
