"""What the three commands share: flags, the run, and the report at its end. No torch up here."""

import argparse
from pathlib import Path

from harness import cli

PACKED = ("compressed-tensors", "gptq")
CHOICES = {"unstructured": (0, 0), "2:4": (2, 4), "4:8": (4, 8)}


def add_flags(p: argparse.ArgumentParser, *, data: str, packed: bool = False) -> None:
    """MODEL, DATASET and the flags of all three; ``data`` says what the text is for."""
    p.add_argument("model", help="folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    p.add_argument(
        "dataset",
        nargs="?",
        help=f"{data}: wikitext2, ptb, c4, pileval, alpaca, dolly, stdlib (embedded), or a local "
        ".txt/.jsonl/.parquet/.csv file or folder",
    )
    what = p.add_argument_group("how much goes")
    what.add_argument(
        "--sparsity",
        "--sparsity_ratio",
        type=float,
        help="share of the weights to drop, 0 to below 1 (.5 costs little, .6 some; above it try "
        "--ratios owl)",
    )
    what.add_argument(
        "--prunen",
        type=int,
        default=0,
        help="with --prunem: how many of every PRUNEM consecutive weights of a row are DROPPED, as "
        "in SparseGPT (1 of 4 is 25 %% zeros; the usual N:M name counts the ones that stay)",
    )
    what.add_argument("--prunem", type=int, default=0, help="length of that pattern, 4 or 8")
    what.add_argument(
        "--sparsity_type",
        choices=list(CHOICES),
        help="Wanda's spelling: 2:4 is --prunen 2 --prunem 4",
    )
    what.add_argument(
        "--ratios",
        default="uniform",
        choices=["uniform", "owl"],
        help="the same sparsity for every block (default), or OWL: blocks with more outliers keep "
        "more, the mean stays; costs one more pass over the text",
    )
    what.add_argument(
        "--owl_lambda",
        type=float,
        default=0.08,
        help="OWL: the most and the least pruned block differ by twice this (default .08)",
    )
    what.add_argument(
        "--owl_m",
        type=float,
        default=5.0,
        help="OWL: a weight is an outlier above this many times its block's mean (default 5)",
    )
    where = p.add_argument_group("which linears")
    where.add_argument("--minlayer", type=int, default=-1, help="first block (default: all)")
    where.add_argument("--maxlayer", type=int, default=1000, help="first block that is not pruned")
    where.add_argument(
        "--prune_only",
        default="",
        metavar="PART",
        help="only linears whose name holds PART, e.g. mlp or down_proj",
    )
    where.add_argument(
        "--invert", action="store_true", help="prune what these three flags leave, leave the rest"
    )
    how = p.add_argument_group("how")
    how.add_argument("--nsamples", type=int, default=128, help="calibration windows (default 128)")
    how.add_argument(
        "--seqlen", type=int, help="tokens per window (default: the model's context, at most 2048)"
    )
    how.add_argument(
        "--format",
        default="dense",
        choices=["dense", "bitmask", *(PACKED if packed else [])],
        help="how the result is stored: dense (default, loads everywhere, saves nothing), bitmask "
        "(zeros are not stored; only the harness reads it)"
        + (", or packed integers with --wbits" if packed else ""),
    )
    cli.add_ignore(how)
    cli.add_bos(how)
    cli.add_shared_flags(p)


def run(args: argparse.Namespace, method: str, **options) -> int:
    """Prune, report, and return the exit code; ``options`` are the method's own."""
    return cli.run(lambda: _run(args, method, options))


def _run(args: argparse.Namespace, method: str, options: dict) -> None:
    n, m = _pattern(args)
    out = args.out or f"{Path(args.model).name}-{method}-{_amount(args.sparsity, n, m)}"

    from harness import distributed
    from harness.checkpoint import card
    from sparse.layerwise import prune

    with distributed.group():
        rows = prune(
            args.model, args.dataset, out=out, method=method, sparsity=args.sparsity,
            prunen=n, prunem=m, ratios=args.ratios, owl_lambda=args.owl_lambda, owl_m=args.owl_m,
            minlayer=args.minlayer, maxlayer=args.maxlayer, prune_only=args.prune_only,
            invert=args.invert, nsamples=args.nsamples, seqlen=args.seqlen, format=args.format,
            device=args.device, dtype=args.dtype, seed=args.seed, ignore=args.ignore, bos=args.bos,
            overwrite=args.overwrite,
            resume=args.resume, dry_run=args.dry_run, command=card.command_line(), **options,
        )  # fmt: skip
        lead = distributed.rank() == 0
    if lead and not args.dry_run:
        print_table(rows)
        print(honest_line(rows, Path(out), args.format))
        print(f"written to {out}")


def _pattern(args: argparse.Namespace) -> tuple[int, int]:
    """(n, m) from the two spellings of a pattern, which must agree."""
    from harness.errors import UserError

    given = (args.prunen, args.prunem)
    if args.sparsity_type is None:
        return given
    wanted = CHOICES[args.sparsity_type]
    if given not in ((0, 0), wanted):
        raise UserError(
            f"--sparsity_type {args.sparsity_type} contradicts --prunen {args.prunen} --prunem "
            f"{args.prunem}; give one of them."
        )
    return wanted


def _amount(sparsity: float | None, n: int, m: int) -> str:
    """The end of a default name: 50, 2of4."""
    return f"{n}of{m}" if m else f"{100 * (sparsity or 0):g}"


def print_table(rows: list[dict]) -> None:
    """Sparsity and relative output error per kind of linear, over the blocks."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["name"].split(f".{row['block']}.", 1)[1], []).append(row)
    print("| linear | sparsity | mean error | worst error | in block |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, some in kinds.items():
        zeros = sum(row["zeros"] for row in some) / sum(row["weights"] for row in some)
        cells = ["", "", ""]
        if some[0]["error"] is not None:
            worst = max(some, key=lambda row: row["error"])
            mean = sum(row["error"] for row in some) / len(some)
            cells = [f"{mean:.3g}", f"{worst['error']:.3g}", str(worst["block"])]
        print(f"| {kind} | {zeros:.4f} | {' | '.join(cells)} |")


def honest_line(rows: list[dict], out: Path, layout: str) -> str:
    """What the zeros are worth: shares, bytes on disk, and that nothing here runs them faster."""
    from harness.checkpoint import load
    from harness.metrics import footprint

    config = load.load_config(out)
    size = footprint.stored_size(out, config)
    packed = f", {size.disk_bytes / 1e6:.3f} MB as {layout}" if layout in PACKED else ""
    item = config.dtype.itemsize
    zeros, weights = (sum(row[key] for row in rows) for key in ("zeros", "weights"))
    dense = size.parameters * item
    bitmask = dense - sum(max(0, row["zeros"] * item - row["weights"] / 8) for row in rows)
    sizes = f"{dense / 1e6:.3f} MB dense, {bitmask / 1e6:.3f} MB as bitmask{packed}"
    return (
        f"{zeros / weights:.1%} of the pruned linears, {zeros / size.parameters:.1%} of the model "
        f"are zeros; on disk {sizes}. It runs no faster: no kernel here skips unstructured or n:m "
        "zeros (on a CPU, CSR wins only near 90 % of them)."
    )
