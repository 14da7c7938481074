"""GPTQ on the harness's pass: one Hessian and one factorization per stage, its linears together."""

import sys
from pathlib import Path

import torch
from harness.decoder import Decoder
from harness.errors import UserError
from harness.grid import Grid, QuantizedWeight, nearest
from harness.hessian import Hessian, inverse_factor
from harness.perplexity import window_length

from gptq.solver import act_order, solve
from harness import checkpoint, data, distributed, formats, preflight, sequential, writer

ROWS_FOR_NORM = 256


def quantize(
    model: str,
    dataset: str | None = None,
    *,
    out: str | Path,
    wbits: int = 4,
    groupsize: int = -1,
    sym: bool = False,
    percdamp: float = 0.01,
    nsamples: int = 128,
    seqlen: int | None = None,
    act_order: bool = False,
    true_sequential: bool = False,
    static_groups: bool = False,
    nearest: bool = False,
    mse: bool = False,
    format: str = "compressed-tensors",
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "gptq.quantize(...)",
) -> list[dict]:
    """Quantize ``model`` and write the checkpoint folder ``out``.

    Args:
        model: folder, hub id or embedded name.
        dataset: calibration text (named dataset, local file, embedded corpus); may be None with
            ``nearest``.
        wbits: 2 to 8. groupsize: columns per scale, -1 for one per row. sym: symmetric grids.
        percdamp: damping as a fraction of the mean of the Hessian's diagonal.
        nsamples, seqlen: calibration windows and their length (default: the model's context, at
            most 2,048).
        act_order: columns by falling Hessian diagonal. static_groups: grids from the original
            weight. true_sequential: stages of a block one after another.
        nearest: round to nearest instead (no calibration). mse: search ranges by |error|^2.4.
        format: "compressed-tensors", "gptq" or "dense".

    Returns:
        One row per linear with its name and relative output error.

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    grid = Grid(wbits, groupsize, sym, mse)
    if format not in formats.FORMATS:
        raise UserError(f"format {format}: expected one of {', '.join(formats.FORMATS)}.")
    if not 0 < percdamp <= 1:
        raise UserError(f"percdamp is {percdamp}; expected a fraction above 0, at most 1.")
    grouped = groupsize != -1
    if act_order and grouped and not static_groups and format != "dense" and not nearest:
        print(
            f"--act-order with groups in the {format} format uses static groups; the dynamic kind "
            "is stored with --format dense",
            file=sys.stderr,
        )
        static_groups = True
    device = distributed.start(checkpoint.pick_device(device))
    folder = checkpoint.resolve(model)
    decoder = Decoder(folder, device=device, dtype=dtype, name=model)
    stored = decoder.stored_dtype
    dtypes = {"dtype": stored, "scale_dtype": formats.scale_dtype(format, stored)}
    settings = {
        "wbits": wbits, "groupsize": groupsize, "sym": sym, "mse": mse, "nearest": nearest,
    }  # fmt: skip
    method = sequential.Method(
        "nearest" if nearest else "gptq", settings, None, layout=format, grid=grid
    )
    # Before the data, which may have to be downloaded and take minutes to tokenize.
    preflight.check(decoder, grid, format, Path(out))
    if not dry_run:
        writer.check_out(Path(out), overwrite)
    windows = calibration = None
    if nearest:
        method.update = _nearest_update(grid, dtypes["scale_dtype"])
    else:
        settings |= {
            "percdamp": percdamp, "act_order": act_order, "static_groups": static_groups,
            "true_sequential": true_sequential,
        }  # fmt: skip
        if dataset is None:
            raise UserError("no calibration dataset given; name one, or use --nearest.")
        seqlen = window_length(decoder.config, seqlen)
        calibration = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "seed": seed}
        tokenizer = checkpoint.load_tokenizer(folder)
        windows = data.calibration(tokenizer, dataset, nsamples=nsamples, seqlen=seqlen, seed=seed)
        method.statistics = Hessian
        method.true_sequential = true_sequential
        method.actorder = act_order and (static_groups or not grouped)
        method.update = _gptq_update(grid, dtypes, percdamp, act_order, static_groups)
    if dry_run:
        from harness.plan import print_plan

        print_plan(decoder, method, out, 0 if windows is None else windows.numel())
        return []
    return sequential.compress(
        decoder, method, Path(out), base=model, windows=windows, calibration=calibration,
        command=command, overwrite=overwrite, resume=resume,
    )  # fmt: skip


def _nearest_update(grid: Grid, scale_dtype: torch.dtype):
    def update(matrices, statistics, where):
        return {n: sequential.Update(nearest(w, grid, scale_dtype)) for n, w in matrices.items()}

    return update


def _gptq_update(grid, dtypes: dict[str, torch.dtype], percdamp, by_diagonal, static_groups):
    """``dtypes``: of the stored values and scales, as :func:`gptq.solver.solve` takes them."""

    def update(matrices, hessian, where):
        matrix = hessian.mean()
        diagonal = matrix.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        order = act_order(diagonal) if by_diagonal else None
        weight = torch.cat(list(matrices.values()))
        weight[:, dead] = 0
        norms = _output_norms(weight, matrix)
        ordered = matrix if order is None else matrix[order][:, order]
        name = f"{where} {'/'.join(matrices)}"
        try:
            factor, damping = inverse_factor(ordered, percdamp, name)
        except ArithmeticError as error:
            raise UserError(
                f"{error} Give more or other calibration text, or a larger --percdamp."
            ) from error
        del matrix, ordered
        # Rows are independent, but a product over fewer of them may round otherwise. On GPUs, where
        # launches make the solver weigh most, they are dealt out all the same; on CPUs every rank
        # solves all, and the result is that of one rank bit for bit.
        dealt = weight.is_cuda
        share = distributed.shares(len(weight))[distributed.rank()] if dealt else slice(None)
        result, loss = solve(
            weight[share], factor, grid, **dtypes, order=order, static_groups=static_groups,
        )  # fmt: skip
        if dealt:
            result, loss = _gather(result, loss, len(weight))
        updates, start = {}, 0
        note = {} if damping == percdamp else {"percdamp": damping}
        for linear, old in matrices.items():
            rows = slice(start, start + len(old))
            start += len(old)
            error = (loss[rows].mean() / norms[rows].mean().clamp_min(1e-30)).item()
            updates[linear] = sequential.Update(_rows(result, rows), error, note)
        return updates

    return update


def _output_norms(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E|w x|² of every row [O], from at most ROWS_FOR_NORM of them.

    The exact norms would cost a product of O x I x I, as much as the solver; the mean over evenly
    spaced rows is only the denominator of the error that is printed.
    """
    step = -(-len(weight) // ROWS_FOR_NORM)
    some = weight[::step]
    norms = ((some @ hessian) * some).sum(dim=1)
    return norms.repeat_interleave(step)[: len(weight)]


def _rows(result, rows: slice):
    if isinstance(result, QuantizedWeight):
        return QuantizedWeight(
            result.codes[rows], result.scale[rows], result.zero[rows], result.grid
        )
    return result[rows]


def _gather(result, loss, rows: int):
    loss = distributed.gather_rows(loss, rows)
    if isinstance(result, QuantizedWeight):
        parts = (
            distributed.gather_rows(t, rows) for t in (result.codes, result.scale, result.zero)
        )
        return QuantizedWeight(*parts, result.grid), loss
    return distributed.gather_rows(result, rows), loss
