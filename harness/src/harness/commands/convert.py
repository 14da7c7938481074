"""`harness convert`: the same model stored another way, with or without its zeros."""

from pathlib import Path

from harness import precision
from harness.blocks import preflight
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, Update, compress, per_stage
from harness.checkpoint import layouts, load, runs
from harness.checkpoint.weights import Weights
from harness.errors import UserError
from harness.metrics import sparsity
from harness.metrics.footprint import stored_size


def convert(
    model: str,
    layout: str,
    *,
    out: str | Path | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "harness.commands.convert.convert(...)",
) -> int:
    """Body of `harness convert`: store `model` as `layout`. Prints both sizes; returns 0.

    Block by block and resumable, as every pass. The dense form of a packed checkpoint is what its
    codes stand for. Raises UserError where a bitmask would save nothing.
    """
    folder = load.resolve(model)
    out = Path(out or f"{Path(model).resolve().name}-{layout}")
    decoder = Decoder(folder, dtype=Weights(folder).dtype)
    precision.say_unused(dtype, decoder.stored_dtype)
    preflight.check(decoder, None, layout, out)
    runs.claim(out, folder, overwrite, dry_run)
    before = stored_size(folder, decoder.config).disk_bytes
    if layouts.of(layout).HOLDS == "zeros":
        _check_worth(model, sparsity.of_checkpoint(folder))
    if dry_run:
        print(f"{model} ({before / 1e6:,.2f} MB) would be written to {out} as {layout}")
        return 0
    compress(
        decoder,
        Method("convert", {"format": layout}, [per_stage(_unchanged)], (), layout=layout),
        out,
        base=model,
        command=command,
        overwrite=overwrite,
        resume=resume,
    )
    after = stored_size(out, decoder.config).disk_bytes
    print(f"written to {out}: {after / 1e6:,.2f} MB, {before / 1e6:,.2f} MB before")
    return 0


def _unchanged(matrices, statistics, hand):
    return {name: Update(matrix) for name, matrix in matrices.items()}


def _check_worth(model: str, found: sparsity.Sparsity) -> None:
    if found.bitmask_bytes == found.dense_bytes:
        raise UserError(
            f"{100 * found.share:.1f} % of the weights in {model} are zero: too few for a bitmask "
            "to save anything. Keep it dense, or prune it first."
        )
