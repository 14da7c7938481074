"""`harness convert`: the same model stored another way, with or without its zeros."""

from pathlib import Path

from harness import precision
from harness.blocks import preflight
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, Update, compress, per_stage
from harness.checkpoint import card, load, runs
from harness.checkpoint.weights import Weights
from harness.errors import UserError
from harness.metrics import sparsity
from harness.metrics.footprint import stored_size


def convert(args) -> int:
    """Body of `harness convert`; `args` as cli.py parses them. Prints both sizes; returns 0.

    Block by block and resumable, as every pass. The dense form of a packed checkpoint is what its
    codes stand for. Raises UserError where a bitmask would save nothing.
    """
    folder = load.resolve(args.model)
    out = Path(args.out or f"{Path(args.model).resolve().name}-{args.format}")
    decoder = Decoder(folder, dtype=Weights(folder).dtype)
    precision.say_unused(args.dtype, decoder.stored_dtype)
    preflight.check(decoder, None, args.format, out)
    runs.claim(out, folder, args.overwrite, args.dry_run)
    before = stored_size(folder, decoder.config).disk_bytes
    if args.format == "bitmask":
        _check_worth(args.model, sparsity.of_checkpoint(folder))
    if args.dry_run:
        print(f"{args.model} ({before / 1e6:,.2f} MB) would be written to {out} as {args.format}")
        return 0
    compress(
        decoder,
        Method("convert", {"format": args.format}, [per_stage(_unchanged)], (), layout=args.format),
        out,
        base=args.model,
        command=card.command_line(),
        overwrite=args.overwrite,
        resume=args.resume,
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
