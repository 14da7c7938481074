"""A trained result as the integers it stands for, on the harness's pass: codes are looked up."""

from pathlib import Path

import torch

from bitdistiller import result
from harness import locks, paths, precision
from harness.blocks.decoder import Decoder
from harness.blocks.job import Job, claim, run_job
from harness.blocks.sequential import Method, Update, per_stage
from harness.checkpoint import layouts, readers, recipe
from harness.checkpoint.runs import LOG
from harness.checkpoint.weights import Weights
from harness.errors import UserError
from harness.quant.scheme import Scheme


@locks.releasing
def export(
    folder: str | Path,
    layout: str = "compressed-tensors",
    *,
    out: str | Path | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "bitdistiller.export_run.export(...)",
) -> list[dict]:
    """Write the result ``folder`` in ``layout`` to ``out``, and print what reads it.

    Returns:
        One row per linear with its name, weights and bytes.

    Raises:
        UserError: no result folder, changed after training, or ``layout`` cannot hold it.
    """
    folder = Path(folder)
    out = Path(out or f"{folder.resolve().name}-{layout}")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that bitdistiller.train wrote.")
    grids = result.Grids(folder)
    if grids.grid is None and layout in layouts.PACKED:
        raise UserError(
            f"{folder} holds {grids.kind} values, for which {layout} has no codes; they are stored "
            "with --format dense only."
        )
    decoder = Decoder(folder, dtype=Weights(folder).dtype)
    decoder.ignore(_left_dense(folder))
    precision.say_unused(dtype, decoder.stored_dtype)
    job = Job(
        _base(folder), out, overwrite=overwrite, resume=resume, dry_run=dry_run, command=command
    )
    scheme = grids.grid and Scheme(grids.grid)
    claim(job, decoder, scheme, layout)
    _check_scales(grids, layout)
    settings = {"format": layout}
    if grids.grid is not None:
        settings |= {"bits": grids.grid.bits, "group_size": grids.grid.group_size}
    look_up = per_stage(_update(grids, layout))
    rows = run_job(
        job, decoder, Method("export", settings, [look_up], (), layout=layout, scheme=scheme)
    )
    if dry_run:
        return []
    bits = 8 * sum(row["bytes"] for row in rows) / sum(row["weights"] for row in rows)
    print(f"written to {out}: {bits:.2f} bits per weight of the quantized linears")
    print(f"read by: {readers.of_folder(out, decoder.config)}")
    return rows


def _left_dense(folder: Path) -> list[str]:
    """What --ignore left dense where the result was made, by its recipe: these have no grids."""
    steps = recipe.steps(folder)
    return steps[-1].get("settings", {}).get("ignore", []) if steps else []


def _base(folder: Path) -> str:
    """The dense model that the result was made from, as its own log names it."""
    log = folder / LOG
    return paths.read_json(log).get("base", str(folder)) if log.is_file() else str(folder)


def _update(grids: result.Grids, layout: str):
    def update(matrices, statistics, hand):
        if grids.grid is None:
            return {linear: Update(values) for linear, values in matrices.items()}
        codes = {n: grids.quantized(f"{hand.prefix}.{n}", w) for n, w in matrices.items()}
        return {n: Update(w if layout in layouts.PACKED else matrices[n]) for n, w in codes.items()}

    return update


def _check_scales(grids: result.Grids, layout: str) -> None:
    for name in sorted(grids.names):
        scale, _ = grids.read(name)
        dtype = layouts.of(layout).scale_dtype(scale.dtype)
        if not torch.equal(scale.to(dtype).float(), scale.float()):
            raise UserError(
                f"the scales of {name} do not fit the {dtype} of the {layout} format exactly; use "
                "--format compressed-tensors, which stores them as they are."
            )
