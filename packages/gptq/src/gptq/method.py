"""GPTQ on the harness's pass: one Hessian and one factorization per stage, its linears together."""

import sys

import torch

from gptq.solver import act_order, solve
from harness import distributed, locks
from harness.blocks.job import Job, claim, draw, open_decoder, run_job
from harness.blocks.sequential import Method, Update, per_stage
from harness.checkpoint import layouts
from harness.errors import UserError
from harness.quant import masks
from harness.quant.grid import Grid, QuantizedWeight, nearest
from harness.quant.hessian import Hessian, inverse_factor
from harness.quant.scheme import Scheme

ROWS_FOR_NORM = 256


@locks.releasing
def run(settings, command: str) -> list[dict]:
    """Quantize ``settings.model`` and write the checkpoint folder ``settings.out``.

    Args:
        settings: :class:`gptq.cli.Settings`. command: for the card.

    Returns:
        One row per linear with its name and relative output error.

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    s = settings
    grid = Grid(s.wbits, s.groupsize, s.sym, s.mse)
    grouped, static_groups = s.groupsize != -1, s.static_groups
    if s.act_order and grouped and not (static_groups or s.nearest) and s.format in layouts.PACKED:
        print(
            f"--act-order with groups in the {s.format} format uses static groups; the dynamic "
            "kind is stored with --format dense",
            file=sys.stderr,
        )
        static_groups = True
    job = Job.of(settings, command)
    decoder = open_decoder(job)
    stored = decoder.stored_dtype
    dtypes = {"dtype": stored, "scale_dtype": layouts.of(s.format).scale_dtype(stored)}
    noted = {
        "wbits": s.wbits, "groupsize": s.groupsize, "sym": s.sym, "mse": s.mse,
        "nearest": s.nearest,
    }  # fmt: skip
    claim(job, decoder, Scheme(grid), s.format)
    if s.nearest:
        round_all = per_stage(_nearest_update(grid, dtypes["scale_dtype"]))
        method = Method("nearest", noted, [round_all], (), layout=s.format, scheme=Scheme(grid))
        return run_job(job, decoder, method)
    if s.dataset is None:
        raise UserError("no calibration dataset given; name one, or use --nearest.")
    noted |= {
        "percdamp": s.percdamp, "act_order": s.act_order, "static_groups": static_groups,
        "true_sequential": s.true_sequential,
    }  # fmt: skip
    drawn = draw(job, decoder, s.dataset, s.nsamples, s.seqlen)
    update = _gptq_update(grid, dtypes, s.percdamp, s.act_order, static_groups)
    method = Method(
        "gptq", noted, [per_stage(update, Hessian, s.true_sequential)], layout=s.format,
        scheme=Scheme(grid), actorder=s.act_order and (static_groups or not grouped),
    )  # fmt: skip
    return run_job(job, decoder, method, drawn)


def _nearest_update(grid: Grid, scale_dtype: torch.dtype):
    def update(matrices, statistics, hand):
        return {n: Update(nearest(w, grid, scale_dtype)) for n, w in matrices.items()}

    return update


def _gptq_update(grid, dtypes: dict[str, torch.dtype], percdamp, by_diagonal, static_groups):
    """``dtypes``: of the stored values and scales, as :func:`gptq.solver.solve` takes them."""

    def update(matrices, hessian, hand):
        matrix = hessian.mean()
        diagonal = matrix.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        order = act_order(diagonal) if by_diagonal else None
        weight = torch.cat(list(matrices.values()))
        zeros = _zeros_of_pruned(matrices)
        weight[:, dead] = 0
        norms = _output_norms(weight, matrix)
        ordered = matrix if order is None else matrix[order][:, order]
        name = f"{hand} {'/'.join(matrices)}"
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
            zeros=None if zeros is None else zeros[share],
        )  # fmt: skip
        if dealt:
            result, loss = _gather(result, loss, len(weight))
        updates, start = {}, 0
        note = {} if damping == percdamp else {"percdamp": damping}
        for linear, old in matrices.items():
            rows = slice(start, start + len(old))
            start += len(old)
            error = (loss[rows].mean() / norms[rows].mean().clamp_min(1e-30)).item()
            updates[linear] = Update(_rows(result, rows), error, note)
        return updates

    return update


def _zeros_of_pruned(matrices: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Where pruned matrices of a stage are zero, [O, I] as they are solved together; None where
    none was pruned."""
    found = {name: masks.of_pruned(matrix) for name, matrix in matrices.items()}
    if all(zeros is None for zeros in found.values()):
        return None
    distributed.say_once("this model was pruned: its zeros stay zeros, and the other weights repay")
    parts = (
        torch.zeros_like(matrices[name], dtype=torch.bool) if zeros is None else zeros
        for name, zeros in found.items()
    )
    return torch.cat(list(parts))


def _output_norms(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E|w x|² of every row [O], the denominator of the error that is printed.

    Exact for the ROWS_FOR_NORM largest rows, because one outlier can hold most of the sum; of the
    others as many are looked at, and the rest is taken to give as much for its |w|² as those. All
    of them would cost a product of O x I x I, as much as the solver.
    """
    sizes = weight.square().sum(dim=1)
    largest = sizes.topk(min(ROWS_FOR_NORM, len(weight))).indices
    rows = torch.arange(0, len(weight), -(-len(weight) // ROWS_FOR_NORM), device=weight.device)
    norms = sizes * (_exact_norms(weight[rows], hessian).sum() / sizes[rows].sum().clamp_min(1e-30))
    norms[largest] = _exact_norms(weight[largest], hessian)
    return norms


def _exact_norms(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((rows @ hessian) * rows).sum(dim=1)


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
