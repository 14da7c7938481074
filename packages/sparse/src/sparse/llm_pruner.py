"""``python -m sparse.llm_pruner MODEL DATASET --pruning_ratio .25 --block_wise ...``"""

import argparse
import sys

from harness import cli

EXAMPLES = """\
examples:
  python -m sparse.llm_pruner tiny-llama stdlib --pruning_ratio .25 --block_wise --out tiny-25
  python -m sparse.llm_pruner MODEL c4 --pruning_ratio .25 --block_wise \\
      --block_attention_layer_start 4 --block_attention_layer_end 30 \\
      --block_mlp_layer_start 4 --block_mlp_layer_end 30 --out llama-20
                                         the paper's "20 %" of LLaMA-7B (80.5 % of it is left)
  python -m sparse.llm_pruner MODEL c4 --pruning_ratio .2 --channel_wise --out channels-20
  python -m sparse.llm_pruner MODEL --layer_wise --layer 24 --out first-24-blocks
then:
  harness eval tiny-25 --ppl stdlib --speed
  python -m sparse.recover tiny-25 --dataset alpaca --out tiny-25-recovered
"""

LEVELS = {"block_wise": "block", "channel_wise": "channel", "layer_wise": "layer"}


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m sparse.llm_pruner",
        description="LLM-Pruner: take whole attention heads, MLP channels, hidden channels or "
        "blocks out of any decoder-only language model. What is left is a smaller dense model: "
        "fewer bytes, fewer multiplications, faster everywhere. Quality drops; sparse.recover "
        "brings much of it back.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", help="folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    p.add_argument(
        "dataset",
        nargs="?",
        help="text for the gradients of --pruner_type taylor: wikitext2, ptb, c4, pileval, alpaca, "
        "dolly, stdlib (embedded), or a local .txt/.jsonl/.parquet/.csv file or folder (the "
        "original takes bookcorpus)",
    )
    _what(p.add_argument_group("what goes"))
    _range(p.add_argument_group("which blocks, with --block_wise"))
    _how(p.add_argument_group("how it is chosen"))
    after = p.add_argument_group("evaluation")
    for when in ("before", "after"):
        after.add_argument(
            f"--test_{when}_train",
            action="store_true",
            help=f"print the perplexity {when} pruning, on DATASET (stdlib where none is given)",
        )
    cli.add_shared_flags(p)
    return p


def _what(group) -> None:
    group.add_argument(
        "--pruning_ratio",
        type=float,
        default=0.5,
        help="share of the heads and channels of every pruned block (or of the hidden channels) "
        "that goes, 0 to below 1 (default .5; .25 is what the paper recovers well)",
    )
    group.add_argument(
        "--block_wise",
        action="store_true",
        help="attention heads and MLP channels, block by block (default). A key/value head goes "
        "with all its query heads",
    )
    group.add_argument(
        "--channel_wise",
        action="store_true",
        help="hidden channels, the same ones everywhere; for families with RMS norms whose head "
        "size stands on its own (LLaMA, Mistral, Qwen)",
    )
    group.add_argument("--layer_wise", action="store_true", help="keep the first --layer blocks")
    group.add_argument("--layer", type=int, default=12, help="with --layer_wise (default 12)")
    group.add_argument(
        "--multiple",
        type=int,
        default=8,
        help="channels are kept in multiples of this, so that kernels stay fast (default 8)",
    )


def _range(group) -> None:
    for kind, what in (("attention", "heads"), ("mlp", "MLP channels")):
        group.add_argument(
            f"--block_{kind}_layer_start",
            type=int,
            help=f"first block that loses {what} (default: 3 of 32 blocks are left out)",
        )
        group.add_argument(
            f"--block_{kind}_layer_end",
            type=int,
            help="first block after it that does not (default: the last of 32 is left out)",
        )


def _how(group) -> None:
    group.add_argument(
        "--pruner_type",
        default="taylor",
        choices=["random", "l1", "l2", "taylor"],
        help="how a group's importance is estimated: from gradients on DATASET (taylor, default), "
        "from its weights, or not at all (the original's own default is l2)",
    )
    group.add_argument(
        "--taylor",
        default="param_first",
        choices=["vectorize", "param_first", "param_second", "param_mix"],
        help="of every weight |w g| (param_first, default), |w² E[g²]| (param_second) or both "
        "(param_mix), or |Σ w g| of every row and column (vectorize)",
    )
    group.add_argument(
        "--grouping_strategy",
        default="sum",
        choices=["sum", "mean", "max", "prod", "first"],
        help="how the matrices of a group are put together (default sum)",
    )
    group.add_argument(
        "--global_pruning",
        action="store_true",
        help="one threshold for the groups of all blocks, a head and a channel being one each, "
        "instead of the same share everywhere",
    )
    group.add_argument(
        "--iterative_steps",
        type=int,
        default=1,
        help="prune in that many steps, importance estimated anew before each (default 1)",
    )
    group.add_argument(
        "--num_examples", type=int, default=10, help="windows for the gradients (default 10)"
    )
    group.add_argument(
        "--max_seq_len", type=int, default=128, help="tokens per window (default 128)"
    )


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from harness.errors import UserError

    asked = [flag for flag in LEVELS if getattr(args, flag)]
    if len(asked) > 1:
        flags = " and ".join(f"--{flag}" for flag in asked)
        raise UserError(f"{flags} exclude each other; run one after the other on its result.")
    level = LEVELS[asked[0]] if asked else "block"
    amount = args.layer if level == "layer" else f"{100 * args.pruning_ratio:g}"
    out = args.out or f"{Path(args.model).name}-llm_pruner-{level}-{amount}"

    from harness import distributed
    from harness.checkpoint import card
    from sparse.structured.prune import prune

    with distributed.group():
        if args.test_before_train:
            _perplexity(args, args.model, "before")
        result = prune(
            args.model, args.dataset, out=out, pruning_ratio=args.pruning_ratio, level=level,
            pruner_type=args.pruner_type, taylor=args.taylor,
            grouping_strategy=args.grouping_strategy, global_pruning=args.global_pruning,
            iterative_steps=args.iterative_steps, layer=args.layer,
            block_attention_layers=(
                args.block_attention_layer_start, args.block_attention_layer_end,
            ),
            block_mlp_layers=(args.block_mlp_layer_start, args.block_mlp_layer_end),
            multiple=args.multiple, num_examples=args.num_examples, max_seq_len=args.max_seq_len,
            device=args.device, dtype=args.dtype, seed=args.seed, overwrite=args.overwrite,
            resume=args.resume, dry_run=args.dry_run, command=card.command_line(),
        )  # fmt: skip
        lead = distributed.rank() == 0
    if not lead:
        return
    _print_table(result, args.max_seq_len)
    if args.dry_run:
        return
    if args.test_after_train:
        _perplexity(args, out, "after")
    print(_where(result, out))


def _print_table(result: dict, length: int) -> None:
    """Sizes per block, then of the model, before and after."""
    from harness import memory

    print("| block | heads | key/value heads | MLP channels |\n| ---: | --- | --- | --- |")
    for row in result["rows"]:
        cells = [row.get(what) for what in ("heads", "kv_heads", "channels")]
        print(f"| {row['block']} | {' | '.join(_change(*c) if c else '' for c in cells)} |")
    before, after = result["parameters"]
    macs = [count / 1e6 for count in result["macs"]]
    print(
        f"hidden channels {_change(*result['hidden'])}, blocks {_change(*result['layers'])}\n"
        f"parameters {before / 1e6:.2f} M -> {after / 1e6:.2f} M ({after / before:.1%} are left), "
        f"MMAC per token over {length} keys {macs[0]:.2f} -> {macs[1]:.2f} "
        f"({macs[1] / macs[0]:.1%}), peak memory {memory.peak()}"
    )


def _change(before: int, after: int) -> str:
    return f"{before}" if before == after else f"{before} -> {after}"


def _where(result: dict, out: str) -> str:
    """What was written, and what loads it."""
    if not result["ordinary"]:
        return (
            f"written to {out}; its blocks differ in size, which no ordinary config can say: it "
            "loads in the harness (harness.checkpoint.load.load_model), not in plain transformers"
        )
    kind = result["config"]["model_type"]
    if kind == result["family"]:
        return f"written to {out}, an ordinary {kind} checkpoint"
    return (
        f"written to {out} as an ordinary {kind} checkpoint: the same computation as "
        f"{result['family']}, whose config wants hidden_size to be a multiple of the heads"
    )


def _perplexity(args: argparse.Namespace, model: str, when: str) -> None:
    from harness.blocks.streams import stream_logits
    from harness.checkpoint import load
    from harness.data import corpora
    from harness.losses import nll

    dataset = args.dataset or "stdlib"
    folder = load.resolve(model)
    seqlen = load.window_length(load.load_config(folder))
    windows = corpora.evaluation(load.load_tokenizer(folder), dataset, seqlen=seqlen)
    device = load.pick_device(args.device)
    logits = stream_logits(model, windows, device=device, dtype=args.dtype)
    value = nll.perplexity_of_logits(logits, windows).value
    print(f"{dataset}: token perplexity {when} pruning {value:.3f} (seqlen {seqlen})")


if __name__ == "__main__":
    sys.exit(main())
