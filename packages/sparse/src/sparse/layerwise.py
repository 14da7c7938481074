"""SparseGPT, Wanda and magnitude pruning on the harness's pass: checks, data, the method."""

from collections.abc import Callable

import torch

from harness import locks
from harness.blocks.job import Job, claim, draw, open_decoder, run_job
from harness.blocks.sequential import Act, Method, per_stage
from harness.checkpoint import layouts
from harness.errors import UserError, nearest
from harness.modules import get_matrix, linears
from harness.quant.grid import Grid
from harness.quant.hessian import Hessian
from harness.quant.scheme import Scheme
from sparse import methods
from sparse.ratios import owl

METHODS = ("sparsegpt", "wanda", "magnitude")


def check_method(name: str) -> None:
    """Raise :class:`UserError` unless ``name`` is one of METHODS."""
    if name not in METHODS:
        raise UserError(f"method {name!r}: expected {', '.join(METHODS)}.{nearest(name, METHODS)}")


@locks.releasing
def run(settings, command: str) -> list[dict]:
    """Prune the linears of ``settings.model``'s blocks and write the checkpoint folder
    ``settings.out``.

    Args:
        settings: of :mod:`sparse.sparsegpt`, `sparse.wanda` or `sparse.magnitude`.
        command: for the card.

    Returns:
        One row per pruned linear: block, name, weights, zeros, error (relative output error; None
        for magnitude).

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    s = settings
    goal = _goal(s.sparsity, *s.pattern)
    _check_ratios(s.ratios, goal, s.owl_lambda, s.owl_m)
    grid = _grid(s)
    if s.method == "wanda" and s.use_variant and goal.m:
        raise UserError("--use_variant is for unstructured sparsity; drop it or the n:m pattern.")

    job = Job.of(settings, command)
    decoder = open_decoder(job)
    chosen = _chosen(decoder, s.minlayer, s.maxlayer, s.prune_only, s.invert)
    _check_divides(chosen, goal)
    all_of_them = len(chosen) == sum(len(linears(block)) for block in decoder.blocks)
    if grid and not all_of_them:
        layouts.of(s.format).refuse(Scheme(grid), {}, some_left=True)
    claim(job, decoder, grid and Scheme(grid), s.format)
    drawn = (None, None)
    if s.method != "magnitude" or s.ratios == "owl":
        if s.dataset is None:
            raise UserError(
                "no calibration dataset given; name one, or use python -m sparse.magnitude, which "
                "needs none without --ratios owl."
            )
        drawn = draw(job, decoder, s.dataset, s.nsamples, s.seqlen)
    per_block = {}
    if s.ratios == "owl" and not s.dry_run:
        names = {index: [n for i, n in chosen if i == index] for index, _ in chosen}
        per_block = owl(decoder, drawn[0], names, goal.sparsity, s.owl_m, s.owl_lambda)

    def target(index: int, name: str) -> methods.Target | None:
        if (index, name) not in chosen:
            return None
        return methods.Target(per_block.get(index, goal.sparsity), goal.n, goal.m)

    method = Method(
        s.method, _noted(s, goal, grid, all_of_them), [_act(s, target, decoder.stored_dtype, grid)],
        () if s.method == "magnitude" else ("quantized",), layout=s.format,
        scheme=Scheme(grid) if s.format in layouts.PACKED else None,
    )  # fmt: skip
    return run_job(job, decoder, method, drawn)


def _act(s, target: Callable, stored: torch.dtype, grid: Grid | None) -> Act:
    if s.method == "magnitude":
        return per_stage(methods.magnitude(target, stored, per_row=getattr(s, "per_row", False)))
    if s.method == "wanda":
        update = methods.wanda(target, stored, variant=s.use_variant)
        return per_stage(update, methods.Norms, s.true_sequential)
    update = methods.sparsegpt(
        target, stored, percdamp=s.percdamp, blocksize=s.blocksize, grid=grid,
        scale_dtype=layouts.of(s.format).scale_dtype(stored),
    )  # fmt: skip
    return per_stage(update, Hessian, s.true_sequential)


def _noted(s, goal: methods.Target, grid: Grid | None, all_of_them: bool) -> dict:
    """The settings of recipe.yaml: those that have a meaning in this run."""
    names = {
        "sparsegpt": ("true_sequential", "percdamp", "blocksize", "wbits"),
        "wanda": ("true_sequential", "use_variant"),
        "magnitude": ("per_row",),
    }[s.method]
    names += ("owl_lambda", "owl_m") if s.ratios == "owl" else ()
    names += ("groupsize", "sym") if grid else ()
    names += () if all_of_them else ("minlayer", "maxlayer", "prune_only", "invert")
    noted = {
        "sparsity": goal.sparsity, "prunen": goal.n, "prunem": goal.m, "ratios": s.ratios,
    }  # fmt: skip
    return noted | {name: getattr(s, name, False) for name in names}


def _goal(sparsity: float | None, n: int, m: int) -> methods.Target:
    if not n and not m:
        if sparsity is None:
            raise UserError("how much is to go? Give --sparsity .5, or --prunen 2 --prunem 4.")
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity is {sparsity}; expected a share of at least 0 and below 1.")
        return methods.Target(sparsity)
    if not 0 <= n < m:
        raise UserError(
            f"prunen {n}, prunem {m}: expected prunen below prunem, as in --prunen 2 --prunem 4 "
            "(2 of every 4 are dropped)."
        )
    if sparsity not in (None, n / m):
        raise UserError(
            f"sparsity {sparsity} contradicts {n}:{m}, which drops {n / m:.4g}; give one of them."
        )
    return methods.Target(n / m, n, m)


def _check_ratios(kind: str, goal: methods.Target, spread: float, m: float) -> None:
    if kind == "owl" and goal.m:
        raise UserError("--ratios owl is for unstructured sparsity; n:m drops the same everywhere.")
    if kind == "owl" and (not 0 <= spread < 0.5 or m <= 0):
        raise UserError(
            f"owl_lambda is {spread}, owl_m {m}; expected a lambda from 0 to 0.5 and a positive m."
        )


def _grid(s) -> Grid | None:
    """What SparseGPT quantizes to; wanda has no such flags."""
    wbits = getattr(s, "wbits", 16)
    if wbits != 16 and s.method != "sparsegpt":
        raise UserError(
            f"wbits is {wbits}; only SparseGPT quantizes, use 16 with {s.method} pruning."
        )
    if wbits == 16:
        if s.format in layouts.PACKED:
            raise UserError(
                f"--format {s.format} holds integers; quantize too (SparseGPT's --wbits 4), or use "
                "--format dense or bitmask."
            )
        return None
    return Grid(wbits, s.groupsize, s.sym)


def _chosen(decoder, minlayer, maxlayer, part, invert) -> dict[tuple[int, str], int]:
    """(block, linear) -> its columns, for all that are to be pruned."""
    every = {
        (index, name): get_matrix(module).shape[1]
        for index, block in enumerate(decoder.blocks)
        for name, module in linears(block).items()
    }
    names = sorted({name for _, name in every})
    if not any(part in name for name in names):
        words = {word for name in names for word in (name, *name.split("."))}
        raise UserError(
            f"--prune_only {part}: no linear's name holds it; they are {', '.join(names)}."
            + nearest(part, words)
        )
    chosen = {
        (index, name): columns
        for (index, name), columns in every.items()
        if (minlayer <= index < maxlayer and part in name) != invert
    }
    if not chosen:
        raise UserError(
            f"nothing to prune: --minlayer {minlayer} --maxlayer {maxlayer} with "
            f"{'--invert' if invert else 'these flags'} leave none of {len(decoder)} blocks."
        )
    return chosen


def _check_divides(chosen: dict[tuple[int, str], int], goal: methods.Target) -> None:
    bad = {name: columns for (_, name), columns in chosen.items() if goal.m and columns % goal.m}
    if bad:
        listed = ", ".join(f"{name} ({columns})" for name, columns in bad.items())
        raise UserError(
            f"{goal.n}:{goal.m} does not divide the input columns of {listed}; use another prunem, "
            "or leave these out with --ignore."
        )
