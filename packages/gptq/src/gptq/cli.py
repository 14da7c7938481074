"""``python -m gptq MODEL DATASET --wbits 4 ...``: parse, quantize and, if asked, evaluate."""

import argparse
import sys

from harness import cli

EXAMPLES = """\
examples:
  python -m gptq tiny-llama stdlib --wbits 3 --groupsize 128 --out tiny-w3
  python -m gptq facebook/opt-125m c4 --wbits 4 --groupsize 128 --act-order --true-sequential \\
      --out opt-125m-w4
  python -m gptq MODEL c4 --wbits 4 --sym --groupsize 128 --format gptq --out w4-for-kernels
  torchrun --nproc-per-node 2 -m gptq MODEL c4 --wbits 4 --out w4      windows dealt to 2 ranks
then:
  harness eval opt-125m-w4 --ppl wikitext2 c4 --speed
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m gptq",
        description="GPTQ: quantize the linear layers of any decoder-only language model to 2-8 "
        "bits, using a little text to repay rounding errors. A Hugging Face checkpoint in, a "
        "Hugging Face checkpoint out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", help="folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    p.add_argument(
        "dataset",
        nargs="?",
        help="calibration text: wikitext2, ptb, c4, pileval, alpaca, dolly, stdlib (embedded), or "
        "a local .txt/.jsonl/.parquet/.csv file or folder; not needed with --nearest",
    )
    what = p.add_argument_group("what to make")
    what.add_argument("--wbits", type=int, default=4, help="bits per weight, 2-8 (default 4)")
    what.add_argument(
        "--groupsize",
        type=int,
        default=-1,
        help="columns that share a scale; -1 is one scale per row (default), 128 is usual",
    )
    what.add_argument("--sym", action="store_true", help="symmetric grid, no zero points")
    what.add_argument(
        "--format",
        default="compressed-tensors",
        choices=["compressed-tensors", "gptq", "dense"],
        help="how the result is stored (default compressed-tensors: packed, loads in transformers "
        "and vLLM; gptq: for GPTQ kernels; dense: quantized values at full size)",
    )
    how = p.add_argument_group("how")
    how.add_argument(
        "--percdamp",
        type=float,
        default=0.01,
        help="damping, as a fraction of the Hessian's mean diagonal (default 0.01)",
    )
    how.add_argument("--nsamples", type=int, default=128, help="calibration windows (default 128)")
    how.add_argument(
        "--seqlen", type=int, help="tokens per window (default: the model's context, at most 2048)"
    )
    how.add_argument(
        "--act-order",
        action="store_true",
        help="round the most important columns first; helps most at 2-3 bits",
    )
    how.add_argument(
        "--true-sequential",
        action="store_true",
        help="quantize a block's layers one after another, each on the effect of the earlier ones; "
        "here also the faster order",
    )
    how.add_argument(
        "--static-groups",
        action="store_true",
        help="group grids from the original weights (implied by --act-order in packed formats)",
    )
    how.add_argument(
        "--nearest", action="store_true", help="plain round-to-nearest, the baseline; no data"
    )
    how.add_argument("--mse", action="store_true", help="search each range by its error")
    cli.add_ignore(how)
    cli.add_bos(how)
    after = p.add_argument_group("evaluation afterwards")
    after.add_argument(
        "--eval",
        nargs="*",
        metavar="DATASET",
        help="print perplexities of the result (bare: wikitext2 ptb c4, as the original does)",
    )
    after.add_argument(
        "--new-eval",
        action="store_true",
        help="with --eval: the original's newer ptb and c4 slices",
    )
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from harness.errors import UserError

    if args.wbits == 16:
        raise UserError(
            "--wbits 16 quantizes nothing; for the baseline: harness eval MODEL --ppl ..."
        )
    out = args.out or f"{Path(args.model).name}-{'rtn' if args.nearest else 'gptq'}-w{args.wbits}"

    from gptq.method import quantize
    from harness import distributed
    from harness.checkpoint import card

    with distributed.group():
        rows = quantize(
            args.model, args.dataset, out=out, wbits=args.wbits, groupsize=args.groupsize,
            sym=args.sym, percdamp=args.percdamp, nsamples=args.nsamples, seqlen=args.seqlen,
            act_order=args.act_order, true_sequential=args.true_sequential,
            static_groups=args.static_groups, nearest=args.nearest, mse=args.mse,
            format=args.format, device=args.device, dtype=args.dtype, seed=args.seed,
            ignore=args.ignore, bos=args.bos, overwrite=args.overwrite, resume=args.resume,
            dry_run=args.dry_run, command=card.command_line(),
        )  # fmt: skip
        lead = distributed.rank() == 0
    if lead and not args.dry_run:
        _print_table(rows)
        print(f"written to {out}")
        if args.eval is not None:
            _evaluate(out, args.eval or ["wikitext2", "ptb", "c4"], args)


def _print_table(rows: list[dict]) -> None:
    """Relative output error per kind of linear: mean and worst over the blocks."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        if row["error"] is not None:
            kinds.setdefault(row["name"].split(f".{row['block']}.", 1)[1], []).append(row)
    if not kinds:
        return
    print("| linear | mean error | worst error | in block |\n| --- | ---: | ---: | ---: |")
    for kind, some in kinds.items():
        worst = max(some, key=lambda row: row["error"])
        mean = sum(row["error"] for row in some) / len(some)
        print(f"| {kind} | {mean:.3g} | {worst['error']:.3g} | {worst['block']} |")


def _evaluate(out: str, datasets: list[str], args: argparse.Namespace) -> None:
    from harness.checkpoint import load
    from harness.data import corpora
    from harness.metrics import perplexity

    model = load.load_model(out, device=args.device, dtype=args.dtype)
    tokenizer = load.load_tokenizer(out)
    seqlen = load.window_length(model.config, args.seqlen)
    for name in datasets:
        windows = corpora.evaluation(tokenizer, name, seqlen=seqlen, new_eval=args.new_eval)
        value = perplexity.perplexity(model, windows).value
        print(f"{name}: token perplexity {value:.3f} (seqlen {seqlen}, non-overlapping)")


if __name__ == "__main__":
    sys.exit(main())
