"""SparseGPT, Wanda and magnitude pruning on the harness's pass: checks, data, the method."""

from collections.abc import Sequence
from pathlib import Path

from harness import locks
from harness.blocks.job import Job, claim, draw, open_decoder, run
from harness.blocks.sequential import Method, per_stage
from harness.checkpoint import formats
from harness.errors import UserError, nearest
from harness.modules import get_matrix, linears
from harness.quant.grid import Grid
from harness.quant.hessian import Hessian
from sparse import methods
from sparse.ratios import owl

METHODS = ("sparsegpt", "wanda", "magnitude")
FORMATS = ("dense", "bitmask", *formats.PACKED)
EVERY_BLOCK = 1000


@locks.releasing
def prune(
    model: str,
    dataset: str | None = None,
    *,
    out: str | Path,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    prunen: int = 0,
    prunem: int = 0,
    ratios: str = "uniform",
    owl_lambda: float = 0.08,
    owl_m: float = 5.0,
    minlayer: int = -1,
    maxlayer: int = EVERY_BLOCK,
    prune_only: str = "",
    invert: bool = False,
    percdamp: float = 0.01,
    blocksize: int = 128,
    wbits: int = 16,
    groupsize: int = -1,
    sym: bool = False,
    true_sequential: bool = False,
    use_variant: bool = False,
    per_row: bool = False,
    nsamples: int = 128,
    seqlen: int | None = None,
    format: str = "dense",
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    ignore: Sequence[str] = (),
    bos: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "sparse.prune(...)",
) -> list[dict]:
    """Prune the linears of ``model``'s blocks and write the checkpoint folder ``out``.

    Args:
        model: folder, hub id or embedded name.
        dataset: calibration text (named dataset, local file, embedded corpus); magnitude needs it
            for ``ratios="owl"`` only.
        method: "sparsegpt", "wanda" or "magnitude".
        sparsity: share of every linear that goes, in [0, 1).
        prunen, prunem: drop ``prunen`` of every ``prunem`` columns, row by row.
        ratios: "uniform", or "owl" for one sparsity per block (``owl_lambda``, ``owl_m``).
        minlayer, maxlayer, prune_only, invert: prune blocks minlayer <= i < maxlayer, and of them
            linears whose name holds ``prune_only``; ``invert`` prunes all the others.
        percdamp, blocksize, wbits, groupsize, sym: SparseGPT's; below 16 bits what stays is
            quantized.
        true_sequential: the stages of a block one after another.
        use_variant: Wanda's. per_row: magnitude's.
        nsamples, seqlen: calibration windows and their length (default: the model's context, at
            most 2,048).
        ignore: linears that stay as they are, see :func:`harness.modules.ignore`.
        bos: at the head of the windows, see :func:`harness.blocks.calibration.draw`.
        format: "dense" or "bitmask"; below 16 bits also "compressed-tensors" or "gptq".

    Returns:
        One row per pruned linear: block, name, weights, zeros, error (relative output error; None
        for magnitude).

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    if method not in METHODS:
        raise UserError(
            f"method {method!r}: expected {', '.join(METHODS)}.{nearest(method, METHODS)}"
        )
    goal = _goal(sparsity, prunen, prunem)
    _check_ratios(ratios, goal, owl_lambda, owl_m)
    grid = _grid(method, wbits, groupsize, sym, format)
    if not 0 < percdamp <= 1:
        raise UserError(f"percdamp is {percdamp}; expected a fraction above 0, at most 1.")
    if blocksize < 1:
        raise UserError(f"blocksize is {blocksize}; expected a positive number of columns.")
    if use_variant and goal.m:
        raise UserError("--use_variant is for unstructured sparsity; drop it or the n:m pattern.")

    job = Job(model, out, device, dtype, seed, ignore, bos, overwrite, resume, dry_run, command)
    decoder = open_decoder(job)
    stored = decoder.stored_dtype
    chosen = _chosen(decoder, minlayer, maxlayer, prune_only, invert)
    _check_divides(chosen, goal)
    all_of_them = len(chosen) == sum(len(linears(block)) for block in decoder.blocks)
    if format == "gptq" and not all_of_them:
        raise UserError("the gptq format holds all linears or none; use compressed-tensors.")
    claim(job, decoder, grid, format)

    settings = {
        "sparsity": goal.sparsity, "prunen": goal.n, "prunem": goal.m, "ratios": ratios,
    }  # fmt: skip
    settings |= {"owl_lambda": owl_lambda, "owl_m": owl_m} if ratios == "owl" else {}
    settings |= {
        "sparsegpt": {
            "true_sequential": true_sequential, "percdamp": percdamp, "blocksize": blocksize,
            "wbits": wbits,
        },
        "wanda": {"true_sequential": true_sequential, "use_variant": use_variant},
        "magnitude": {"per_row": per_row},
    }[method]  # fmt: skip
    settings |= {"groupsize": groupsize, "sym": sym} if grid else {}
    if not all_of_them:
        settings |= {
            "minlayer": minlayer, "maxlayer": maxlayer, "prune_only": prune_only, "invert": invert,
        }  # fmt: skip

    drawn = (None, None)
    if method != "magnitude" or ratios == "owl":
        if dataset is None:
            raise UserError(
                "no calibration dataset given; name one, or use python -m sparse.magnitude, which "
                "needs none without --ratios owl."
            )
        drawn = draw(job, decoder, dataset, nsamples, seqlen)
    per_block = {}
    if ratios == "owl" and not dry_run:
        names = {index: [n for i, n in chosen if i == index] for index, _ in chosen}
        per_block = owl(decoder, drawn[0], names, goal.sparsity, owl_m, owl_lambda)

    def target(index: int, name: str) -> methods.Target | None:
        if (index, name) not in chosen:
            return None
        return methods.Target(per_block.get(index, goal.sparsity), goal.n, goal.m)

    if method == "sparsegpt":
        update = methods.sparsegpt(
            target, stored, percdamp=percdamp, blocksize=blocksize, grid=grid,
            scale_dtype=formats.scale_dtype(format, stored),
        )  # fmt: skip
        act = per_stage(update, Hessian, true_sequential)
    elif method == "wanda":
        update = methods.wanda(target, stored, variant=use_variant)
        act = per_stage(update, methods.Norms, true_sequential)
    else:
        act = per_stage(methods.magnitude(target, stored, per_row=per_row))
    prunes = Method(
        method, settings, [act], () if method == "magnitude" else ("quantized",), layout=format,
        grid=grid if format in formats.PACKED else None,
    )  # fmt: skip
    return run(job, decoder, prunes, drawn)


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
    kinds = ("uniform", "owl")
    if kind not in kinds:
        raise UserError(f"ratios {kind!r}: expected {' or '.join(kinds)}.{nearest(kind, kinds)}")
    if kind == "owl" and goal.m:
        raise UserError("--ratios owl is for unstructured sparsity; n:m drops the same everywhere.")
    if kind == "owl" and (not 0 <= spread < 0.5 or m <= 0):
        raise UserError(
            f"owl_lambda is {spread}, owl_m {m}; expected a lambda from 0 to 0.5 and a positive m."
        )


def _grid(method: str, wbits: int, groupsize: int, sym: bool, format: str) -> Grid | None:
    if format not in FORMATS:
        raise UserError(
            f"format {format}: expected one of {', '.join(FORMATS)}.{nearest(format, FORMATS)}"
        )
    if wbits != 16 and method != "sparsegpt":
        raise UserError(
            f"wbits is {wbits}; only SparseGPT quantizes, use 16 with {method} pruning."
        )
    if wbits == 16:
        if format in formats.PACKED:
            raise UserError(
                f"--format {format} holds integers; quantize too (SparseGPT's --wbits 4), or use "
                "--format dense or bitmask."
            )
        return None
    return Grid(wbits, groupsize, sym)


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
