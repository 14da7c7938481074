"""Blocks trained one after another to give, quantized, what they gave dense (EfficientQAT's
Block-AP, arXiv 2407.11062, section 3.2): weights, scales and zero points together.

    two streams of hidden states, of the dense model and of the blocks quantized so far
    for each block: target = dense block on the dense stream
                    minimise |quantized block on the quantized stream - target|²
                    both streams go on through their own block

One block, its optimizer's state and the two streams, N x T x D numbers each, are in memory. Nothing
is drawn at random: windows come in their order, as in the original.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bitdistiller import clip_file, result, student
from bitdistiller.autoclip_run import open_decoder
from harness import locks, memory
from harness.blocks import calibration, preflight, sequential
from harness.blocks.decoder import Decoder
from harness.blocks.plan import activation_bytes, print_plan
from harness.checkpoint import hashes, load, runs
from harness.errors import UserError
from harness.modules import linears
from harness.progress import time_left, track
from harness.quant import masks
from harness.quant.fake_quant import FakeQuantLinear
from harness.quant.grid import Grid

LOWEST_RATE = 1 / 20  # of the first one, at the end of the cosine
STEP = 1.25  # time of a training step with fake quantization over that without, for --dry-run


@dataclass
class Plan:
    """How every block is trained.

    Attributes:
        ranges: clip ranges by name, or None: the grids begin at the weights' extremes.
        held_out: how many of the last windows are measured on, not trained on.
    """

    grid: Grid
    ranges: student.Ranges | None
    epochs: int
    batch_size: int
    quant_lr: float
    weight_lr: float
    held_out: int


@locks.releasing
def train_blocks(
    model: str,
    dataset: str = "pileval",
    *,
    out: str | Path,
    bits: int = 2,
    group_size: int = 128,
    clip: str | Path | None = None,
    nsamples: int = 4096,
    val_size: int = 64,
    seqlen: int | None = None,
    batch_size: int = 2,
    epochs: int = 2,
    quant_lr: float = 1e-4,
    weight_lr: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    ignore: Sequence[str] = (),
    bos: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "bitdistiller.train_blocks(...)",
) -> list[dict]:
    """Train every block of ``model`` and write the result folder ``out``: quantized values, dense,
    and grid.safetensors. Resumable block by block.

    Args:
        model, dataset: as everywhere in the house.
        clip: file or folder of clip ranges to begin from.
        nsamples, val_size: windows of ``seqlen`` tokens to train and to measure on.
        quant_lr, weight_lr: first learning rates of the grids and of the weights; 0 leaves them.

    Returns:
        One row per linear: its block's relative error before and after ("error").

    Raises:
        UserError: anything the user can mend, in one line.
    """
    grid = Grid(bits, group_size)
    weight_lr = (2e-5 if bits == 2 else 1e-5) if weight_lr is None else weight_lr
    counts = {"nsamples": nsamples, "val_size": val_size, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1.")
    for name, value in {"epochs": epochs, "quant_lr": quant_lr, "weight_lr": weight_lr}.items():
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} is {value}; expected 0 or more.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("blocks are trained by one process; start it without torchrun.")
    folder, out = load.resolve(model), Path(out)
    result.check_dense(folder)
    device = load.pick_device(device)
    decoder = open_decoder(model, folder, device, dtype)
    decoder.ignore(ignore)
    preflight.check(decoder, grid, "dense", out)
    ranges = None if clip is None else clip_file.read(clip, folder, grid)
    student.check(decoder.model, grid, ranges=ranges, learn="all")
    settings = {
        "bits": bits, "group_size": group_size, "clip": None if clip is None else _mark(clip),
        "val_size": val_size, "batch_size": batch_size, "epochs": epochs, "quant_lr": quant_lr,
        "weight_lr": weight_lr,
    }  # fmt: skip
    settings |= {"ignore": list(ignore)} if ignore else {}
    method = sequential.Method(
        "block-ap", settings, None, side_file=result.FILE,
        side_note={result.NOTE: result.note(grid)},
    )  # fmt: skip
    runs.claim(out, folder, overwrite, dry_run)
    windows, calibrated = calibration.draw(
        decoder, dataset, nsamples=nsamples + val_size, seqlen=seqlen, seed=seed,
        bos="none" if dry_run else bos, held_out=val_size,
    )  # fmt: skip
    seqlen = windows.shape[1]
    plan = Plan(grid, ranges, epochs, batch_size, quant_lr, weight_lr, val_size)
    if dry_run:

        def side(rows: int, columns: int) -> int:
            groups = columns // grid.columns_per_group(columns)
            return rows * groups * (decoder.stored_dtype.itemsize + 1)

        print_plan(decoder, method, out, windows.numel(), partial(_cost, plan, seqlen), side)
        return []
    return sequential.compress(
        decoder, method, out, base=model, windows=windows, calibration=calibrated,
        command=command, overwrite=overwrite, resume=resume,
        block_pass=partial(BlockTraining, plan),
    )  # fmt: skip


def _cost(plan: Plan, seqlen: int, shapes, tokens, hidden, item) -> tuple[float, float, float]:
    """As `blocks.plan.Cost`. A step is a forward and twice that backward; both streams go through
    the block once, and the windows held out two times more."""
    held_out = plan.held_out * seqlen
    passes = 3 * STEP * plan.epochs * (tokens - held_out) + 2 * tokens + 2 * held_out
    weights = sum(o * i for o, i in shapes.values())
    batch = activation_bytes(shapes, plan.batch_size * seqlen, item)
    return passes * weights, 0, 2 * hidden + 16 * weights + 2 * batch


def _mark(clip: str | Path) -> str:
    """The clip file as the user named it, and a hash, so that a resumed run has the same one."""
    return f"{clip} ({hashes.file_hash(clip_file.locate(clip))})"


class BlockTraining:
    """Takes :class:`harness.blocks.block_pass.BlockPass`'s place in the pass."""

    def __init__(self, plan: Plan, decoder: Decoder, method, windows, conv1d, quantization):
        self.plan, self.decoder = plan, decoder
        parts = windows[: len(windows) - plan.held_out].split(plan.batch_size)
        self.train = len(parts)
        parts += windows[len(windows) - plan.held_out :].split(plan.batch_size)
        width = decoder.config.get_text_config().hidden_size
        size = windows.numel() * width * decoder.dtype.itemsize
        fits = 8 * size < memory.free(decoder.device)
        self.store = decoder.device if fits else torch.device("cpu")
        self.dense = [decoder.embed(part).to(self.store) for part in parts]
        self.quantized = list(self.dense)

    def compress(self, index: int) -> tuple[dict[str, torch.Tensor], list[dict], dict]:
        """Train one block: its tensors as stored, its log rows, its grids."""
        started = time.perf_counter()
        decoder = self.decoder
        block = decoder.load(index)
        self._advance(index, self.dense)
        prefix = f"{decoder.prefix}.{index}"
        found = {f"{prefix}.{name}": module for name, module in linears(block).items()}
        placed = student.put_in(
            decoder.model, found, self.plan.grid, ranges=self.plan.ranges, learn="all",
            dtype=decoder.stored_dtype,
        )  # fmt: skip
        for module in placed.values():
            _widen(module)
            masks.keep(module)
        before = self._error(index)
        self._train(index, placed)
        after = self._error(index)
        if not math.isfinite(before + after):
            raise UserError(
                f"block {index} gives NaN or infinite activations in {decoder.dtype}; try --dtype "
                "bfloat16 or float32."
            )
        if after > before:
            print(
                f"block {index} got worse; lower --weight_lr and --quant_lr, or give more windows",
                file=sys.stderr,
            )
        side, rows, trained = {}, [], {}
        for name, module in placed.items():
            plain, quantized = module.unwrap()
            side |= result.grid_tensors(name, quantized)
            trained[f"{name}.weight"] = plain.weight.data
            plain.weight.data = plain.weight.data.to(decoder.dtype)
            decoder.model.set_submodule(name, plain)
            rows.append(
                {
                    "block": index, "name": name, "weights": plain.weight.numel(),
                    "bytes": trained[f"{name}.weight"].nbytes, "error": after, "before": before,
                }
            )  # fmt: skip
        self._advance(index, self.quantized)
        if not sys.stderr.isatty():
            seconds, blocks = time.perf_counter() - started, len(decoder)
            print(
                f"block {index + 1}/{blocks}: {seconds:.1f} s, relative error {before:.3g} -> "
                f"{after:.3g}, peak {memory.peak()}, {time_left(seconds, 1, blocks - index)}",
                file=sys.stderr,
            )
        return {**decoder.block_tensors(index), **trained}, rows, side

    def replay(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Run a finished block, dense and as it is on disk, for what lies behind it."""
        self.decoder.load(index)
        self._advance(index, self.dense)
        self.decoder.load(index, tensors)
        self._advance(index, self.quantized)

    def _advance(self, index: int, stream: list[torch.Tensor]) -> None:
        for i, hidden in enumerate(stream):
            stream[i] = self._forward(index, hidden).to(self.store)

    def _forward(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.forward(index, hidden.to(self.decoder.device))

    def _error(self, index: int) -> float:
        """|Y' - Y|² / |Y|² over the windows held out; the dense stream holds Y already."""
        error = norm = 0.0
        for x, y in zip(self.quantized[self.train :], self.dense[self.train :], strict=True):
            y = y.to(self.decoder.device).float()
            error += (self._forward(index, x).float() - y).square().sum().item()
            norm += y.square().sum().item()
        return error / max(norm, 1e-30)

    def _train(self, index: int, placed: dict[str, FakeQuantLinear]) -> None:
        plan = self.plan
        steps = plan.epochs * self.train
        if not steps:
            return
        optimizer = torch.optim.AdamW(_groups(placed, plan), weight_decay=0)
        rates = [group["lr"] for group in optimizer.param_groups]
        self.decoder.differentiable = True
        try:
            with torch.enable_grad():
                for step in track(range(steps), f"block {index}"):
                    cosine = (1 + math.cos(math.pi * step / steps)) / 2
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * (LOWEST_RATE + (1 - LOWEST_RATE) * cosine)
                    self._step(index, step % self.train, optimizer)
        finally:
            self.decoder.differentiable = False

    def _step(self, index: int, batch: int, optimizer) -> None:
        target = self.dense[batch].to(self.decoder.device).float()
        output = self._forward(index, self.quantized[batch]).float()
        loss = nn.functional.mse_loss(output, target)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"block {index} gives NaN or infinite values in training; lower --weight_lr and "
                "--quant_lr, or try --dtype float32."
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _widen(module: FakeQuantLinear) -> None:
    """Train in float32 what will be stored in the model's dtype."""
    for name in ("weight", "scale", "zero"):
        setattr(module, name, nn.Parameter(getattr(module, name).detach().float()))


def _groups(placed: dict[str, FakeQuantLinear], plan: Plan) -> list[dict]:
    """AdamW's two groups: grids, then weights. A rate of 0 leaves its group as it is."""
    modules = placed.values()
    return [
        {"params": [p for m in modules for p in (m.scale, m.zero)], "lr": plan.quant_lr},
        {"params": [m.weight for m in modules], "lr": plan.weight_lr},
    ]
