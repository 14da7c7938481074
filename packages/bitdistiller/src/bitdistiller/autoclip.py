"""``python -m bitdistiller.autoclip MODEL DATASET --w_bit 2 ...``: search the clipping ranges."""

import argparse
import sys

from harness import cli

EXAMPLES = """\
examples:
  python -m bitdistiller.autoclip tiny-llama stdlib --w_bit 2 --n_samples 16 --out tiny-clip-w2
  python -m bitdistiller.autoclip meta-llama/Llama-2-7b-hf pileval --w_bit 2 --q_group_size 128 \\
      --dump_clip clip_cache/llama-2-7b.safetensors
  python -m bitdistiller.autoclip MODEL c4 --quant_type nf3 --out nf3
  torchrun --nproc-per-node 2 -m bitdistiller.autoclip MODEL c4 --out w2   windows dealt to 2 ranks
then:
  harness eval tiny-clip-w2 --ppl stdlib
  python -m bitdistiller.train tiny-llama --clip tiny-clip-w2 ...
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m bitdistiller.autoclip",
        description="Asymmetric clipping: for every group of weights the range, its ends shrunk "
        "independently, whose rounding hurts the layer's output least. Writes the clipped and "
        "rounded checkpoint, and in it clip.safetensors, from which training starts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", help="folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    p.add_argument(
        "dataset",
        nargs="?",
        help="calibration text: pileval (default), wikitext2, ptb, c4, alpaca, dolly, stdlib "
        "(embedded), or a local .txt/.jsonl/.parquet/.csv file or folder",
    )
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--w_bit", "--w-bit", type=int, help="bits per weight, 2-8 (default 2; nf3: 3, nf4: 4)"
    )
    what.add_argument(
        "--q_group_size",
        "--q-group-size",
        type=int,
        default=128,
        help="columns that share a range (default 128); -1 is one range per row",
    )
    what.add_argument(
        "--quant_type",
        "--quant-type",
        default="int",
        choices=["int", "nf3", "nf4"],
        help="asymmetric integers (default), or NormalFloat with a scale for each sign",
    )
    what.add_argument(
        "--format",
        choices=["compressed-tensors", "gptq", "dense"],
        help="how the checkpoint is stored (default compressed-tensors: packed, loads in "
        "transformers and vLLM; gptq: for GPTQ kernels; dense: rounded values at full size, "
        "default and only one for NormalFloat)",
    )
    what.add_argument(
        "--dump_clip", "--dump-clip", metavar="FILE", help="copy clip.safetensors to FILE too"
    )
    how = p.add_argument_group("how")
    how.add_argument(
        "--n_samples",
        "--n-samples",
        "--nsamples",
        type=int,
        default=128,
        help="calibration windows (default 128)",
    )
    how.add_argument(
        "--seqlen", type=int, help="tokens per window (default 1024, or the model's context)"
    )
    how.add_argument(
        "--calib_dataset",
        "--calib-dataset",
        metavar="DATASET",
        help="the original's spelling of DATASET (pile is pileval)",
    )
    how.add_argument(
        "--run_clip", "--run-clip", action="store_true", help="the original's; always done here"
    )
    cli.add_ignore(how)
    cli.add_bos(how)
    cli.add_shared_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from bitdistiller.autoclip_run import clip, make_grid
    from harness import distributed
    from harness.checkpoint import card

    bits = make_grid(args.w_bit, args.q_group_size, args.quant_type).bits
    kind = f"w{bits}" if args.quant_type == "int" else args.quant_type
    out = args.out or f"{Path(args.model).name}-clip-{kind}"
    with distributed.group():
        rows = clip(
            args.model, _dataset(args), out=out, w_bit=args.w_bit, q_group_size=args.q_group_size,
            quant_type=args.quant_type, n_samples=args.n_samples, seqlen=args.seqlen,
            dump_clip=args.dump_clip, format=args.format, device=args.device, dtype=args.dtype,
            seed=args.seed, ignore=args.ignore, bos=args.bos,
            overwrite=args.overwrite, resume=args.resume, dry_run=args.dry_run,
            command=card.command_line(),
        )  # fmt: skip
        lead = distributed.rank() == 0
    if lead and not args.dry_run:
        _print_table(rows)
        print(f"written to {out}")


def _dataset(args: argparse.Namespace) -> str:
    """DATASET from its two spellings, which must agree."""
    from harness.errors import UserError

    named = {"pile": "pileval"}.get(args.calib_dataset, args.calib_dataset)
    if args.dataset and named and args.dataset != named:
        raise UserError(
            f"DATASET {args.dataset} contradicts --calib_dataset {args.calib_dataset}; give one of "
            "them."
        )
    return args.dataset or named or "pileval"


def _print_table(rows: list[dict]) -> None:
    """Per kind of linear, means over the blocks: relative output error, share of the range kept."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["name"].split(f".{row['block']}.", 1)[1], []).append(row)
    print("| linear | error, full range | error, clipped | range kept |")
    print("| --- | ---: | ---: | ---: |")
    for kind, some in kinds.items():
        before, after, kept = (
            sum(row[key] for row in some) / len(some)
            for key in ("error_unclipped", "error", "range_kept")
        )
        print(f"| {kind} | {before:.3g} | {after:.3g} | {kept:.1%} |")
    print("error: |change of a group's output|² / |its output|², groups of columns summed apart")


if __name__ == "__main__":
    sys.exit(main())
