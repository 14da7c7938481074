"""Asymmetric clipping on the harness's pass: a checkpoint rounded to nearest inside clipped ranges.

Every stage's ranges are searched on the inputs that the already clipped and rounded part of the
model gives it. Projections that make queries and keys keep their full range, as in the paper's
code: their errors meet in a product, and the output of the linear alone tells too little of it.
"""

import filecmp
import re
import shutil
from functools import partial
from pathlib import Path

import torch

from bitdistiller import clip_file, result
from harness import distributed, locks, paths, precision
from harness.blocks.decoder import Decoder
from harness.blocks.job import Job, claim, draw, open_decoder, run_job
from harness.blocks.plan import OF_WEIGHTS, paused_bytes
from harness.blocks.sequential import Method, Update, per_stage
from harness.checkpoint import layouts, load
from harness.checkpoint.load import window_length
from harness.errors import Finished, UserError
from harness.quant.clip_search import clamp, full_range, output_energy, search, work
from harness.quant.grid import Grid, nearest
from harness.quant.hessian import GroupMoments
from harness.quant.normal_float import NormalFloat
from harness.quant.normal_float import nearest as nearest_level
from harness.quant.scheme import Scheme

UNCLIPPED = re.compile(r"\b[qk]_|query|key|qkv|c_attn")
SEQLEN = 1024
KINDS = {"int": None, "nf3": 3, "nf4": 4}


@locks.releasing
def run(settings, command: str) -> list[dict]:
    """Search the ranges of all linears of the blocks and write the checkpoint folder
    ``settings.out``: the weights clamped and rounded to nearest, and clip.safetensors.

    Args:
        settings: :class:`bitdistiller.autoclip.Settings`. command: for the card.

    Returns:
        One row per linear: block, name, error and error_unclipped (see :func:`_update`),
        range_kept (mean over the groups).

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    s = settings
    grid = make_grid(s.w_bit, s.q_group_size, s.quant_type)
    layout, text = _layout(s.format, s.quant_type), s.text
    job = Job.of(settings, command)
    dump_clip = _check_dump(s.dump_clip, Path(job.out), s.overwrite)
    result.check_dense(load.resolve(s.model))
    decoder = open_decoder(job, trains=True)
    claim(job, decoder, Scheme(grid), layout)
    seqlen = s.seqlen
    if seqlen is None:
        seqlen = min(SEQLEN, window_length(decoder.config))
    drawn = draw(job, decoder, text, s.n_samples, seqlen)
    update = _update(grid, decoder, layouts.of(layout).scale_dtype(decoder.stored_dtype))
    moments = partial(GroupMoments, group_size=s.q_group_size)
    method = Method(
        "autoclip",
        {"w_bit": grid.bits, "q_group_size": s.q_group_size, "quant_type": s.quant_type},
        [per_stage(update, moments)],
        layout=layout,
        scheme=Scheme(grid) if isinstance(grid, Grid) else None,
        side_file=clip_file.FILE,
        side_note=clip_file.note(decoder.weights.folder, grid),
    )

    def side(rows: int, columns: int) -> int:
        groups = columns // grid.columns_per_group(columns)
        return 2 * rows * groups * decoder.stored_dtype.itemsize

    try:
        rows = run_job(job, decoder, method, drawn, cost=partial(_cost, grid), side=side)
    except Finished:
        _dump(job, dump_clip)  # the run that finished may have been killed before it
        raise
    _dump(job, dump_clip)
    return rows


def _cost(grid: Grid | NormalFloat, shapes, tokens, hidden, item) -> tuple[float, float, float]:
    """As `harness.blocks.plan.Cost`."""
    matrices = shapes.values()
    moments = [i * grid.columns_per_group(i) for _, i in matrices]
    forward = sum(tokens * o * i for o, i in matrices)
    search = sum(work(o, i, grid) for o, i in matrices)
    held = 4 * max(moments) + OF_WEIGHTS * max(o * i for o, i in matrices)
    return (
        forward,
        tokens * sum(moments) / 2 + search,
        3 * hidden + held + paused_bytes(shapes, tokens, item),
    )


def make_grid(w_bit: int | None, group_size: int, quant_type: str) -> Grid | NormalFloat:
    """The grid that these three describe; ``w_bit`` None is 2, or NormalFloat's own.

    Raises:
        UserError: they contradict one another, or there is no such grid.
    """
    if quant_type not in KINDS:
        raise UserError(f"quant_type {quant_type}: expected {', '.join(KINDS)}.")
    own = KINDS[quant_type]
    if own is None:
        return Grid(2 if w_bit is None else w_bit, group_size)
    if w_bit not in (None, own):
        raise UserError(f"{w_bit} bits: {quant_type} has {own}; leave the bits out, or give {own}.")
    return NormalFloat(own, group_size)


def _layout(format: str | None, quant_type: str) -> str:
    levels = KINDS.get(quant_type) is not None
    if levels and format in layouts.PACKED:
        raise UserError(f"the {format} format holds integers; {quant_type} needs --format dense.")
    return format or (layouts.QUANTIZED[-1] if levels else layouts.QUANTIZED[0])


def _check_dump(path: str | Path | None, out: Path, overwrite: bool) -> Path | None:
    if path is None:
        return None
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"--dump_clip {path}: expected a name that ends in .safetensors.")
    ours = out / clip_file.FILE  # of a run that is finished already
    same = ours.is_file() and path.is_file() and filecmp.cmp(ours, path, shallow=False)
    if path.exists() and not (overwrite or same):
        raise UserError(f"{path} exists; choose another --dump_clip, or replace it: --overwrite.")
    paths.check_place(path, "--dump_clip")
    return path


def _dump(job: Job, target: Path | None) -> None:
    if target and not job.dry_run:
        distributed.lead(lambda: _copy(Path(job.out) / clip_file.FILE, target))


def _copy(source: Path, target: Path) -> None:
    try:
        paths.write(target, lambda beside: shutil.copyfile(source, beside))
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{source.parent} is complete, but {target} could not be written ({reason}); "
            f"copy {source} there yourself."
        ) from error


def _update(grid: Grid | NormalFloat, decoder: Decoder, scale_dtype: torch.dtype):
    """The method's update. Errors are relative, group by group: Σ over groups of the mean square of
    x·(q - w) over that of x·w. Products between groups, which the moments do not tell, are left
    out, so that this is not quite |(W - Q)X|² / |WX|²."""
    computed, stored = decoder.dtype, decoder.stored_dtype
    # Ranges must be numbers of both.
    dtype = stored if precision.holds(computed, stored) else computed

    def update(matrices, moments, hand):
        mean = moments.mean()
        if not torch.isfinite(mean).all():
            raise UserError(
                f"{hand}: the inputs of {', '.join(matrices)} hold NaN or infinite values; try "
                "--dtype bfloat16 or float32."
            )
        # Training begins with what its dtype holds of the weights.
        return {name: one(name, w.to(computed).float(), mean) for name, w in matrices.items()}

    def one(name, weight, moments):
        if UNCLIPPED.search(name):
            low, high = full_range(weight, grid)
            before = after = None
        else:
            low, high, before, after = _search(weight, moments, grid, dtype, scale_dtype)
        clamped = clamp(weight, low, high)
        if isinstance(grid, Grid):
            result = nearest(clamped, grid, scale_dtype)
            values = result.dequantize(torch.float32)
        else:
            result = values = nearest_level(clamped, grid, scale_dtype)
        if before is None:
            before = after = output_energy(values - weight, moments)
        size = output_energy(weight, moments).sum().clamp_min(1e-30)
        full = torch.sub(*reversed(full_range(weight, grid)))
        kept = torch.where(full > 0, (high - low) / full, 1).mean().item()
        note = {"error_unclipped": (before.sum() / size).item(), "range_kept": kept}
        side = {"low": low.to(stored), "high": high.to(stored)}
        return Update(result, (after.sum() / size).clamp_min(0).item(), note, side)

    return update


def _search(weight, moments, grid, dtype, scale_dtype):
    """Rows are independent, but a product over fewer of them may round otherwise: they are dealt
    out on GPUs, and on CPUs every rank searches all, for the result of one rank bit for bit."""
    if not weight.is_cuda:
        return search(weight, moments, grid, dtype, scale_dtype)
    share = distributed.shares(len(weight))[distributed.rank()]
    clips = search(weight[share], moments, grid, dtype, scale_dtype)
    return [distributed.gather_rows(part, len(weight)) for part in clips]
