"""``python -m sparse.llm_pruner MODEL DATASET --pruning_ratio .25 --block_wise ...``"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from harness import cli
from harness.errors import UserError
from harness.settings import AT_LEAST_1, Shared, flag, make_parser, word

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


@dataclass(frozen=True, kw_only=True)
class What:
    """what goes"""

    pruning_ratio: float = flag(
        0.5, "share of the heads and channels of every pruned block (or of the hidden channels) "
        "that goes, 0 to below 1 (default .5; .25 is what the paper recovers well)",
        check=(lambda value: 0 <= value < 1, "expected a share from 0 to below 1"),
    )  # fmt: skip
    block_wise: bool = flag(
        False, "attention heads and MLP channels, block by block (default). A key/value head goes "
        "with all its query heads",
    )  # fmt: skip
    channel_wise: bool = flag(
        False, "hidden channels, the same ones everywhere; for families with RMS norms whose head "
        "size stands on its own (LLaMA, Mistral, Qwen)",
    )  # fmt: skip
    layer_wise: bool = flag(False, "keep the first --layer blocks")
    layer: int = flag(12, "with --layer_wise (default 12)", check=AT_LEAST_1)
    multiple: int = flag(
        8, "channels are kept in multiples of this, so that kernels stay fast (default 8)",
        check=AT_LEAST_1,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Range:
    """which blocks, with --block_wise"""

    block_attention_layer_start: int | None = flag(
        None, "first block that loses heads (default: 3 of 32 blocks are left out)"
    )
    block_attention_layer_end: int | None = flag(
        None, "first block after it that does not (default: the last of 32 is left out)"
    )
    block_mlp_layer_start: int | None = flag(
        None, "first block that loses MLP channels (default: 3 of 32 blocks are left out)"
    )
    block_mlp_layer_end: int | None = flag(
        None, "first block after it that does not (default: the last of 32 is left out)"
    )


@dataclass(frozen=True, kw_only=True)
class How:
    """how it is chosen"""

    pruner_type: str = flag(
        "taylor", "how a group's importance is estimated: from gradients on DATASET (taylor, "
        "default), from its weights, or not at all (the original's own default is l2)",
        choices=["random", "l1", "l2", "taylor"],
    )  # fmt: skip
    taylor: str = flag(
        "param_first", "of every weight |w g| (param_first, default), |w² E[g²]| (param_second) or "
        "both (param_mix), or |Σ w g| of every row and column (vectorize)",
        choices=["vectorize", "param_first", "param_second", "param_mix"],
    )  # fmt: skip
    grouping_strategy: str = flag(
        "sum", "how the matrices of a group are put together (default sum)",
        choices=["sum", "mean", "max", "prod", "first"],
    )  # fmt: skip
    global_pruning: bool = flag(
        False, "one threshold for the groups of all blocks, a head and a channel being one each, "
        "instead of the same share everywhere",
    )  # fmt: skip
    iterative_steps: int = flag(
        1, "prune in that many steps, importance estimated anew before each (default 1)",
        check=AT_LEAST_1,
    )  # fmt: skip
    num_examples: int = flag(10, "windows for the gradients (default 10)", check=AT_LEAST_1)
    max_seq_len: int = flag(
        128,
        "tokens per window (default 128)",
        check=(lambda value: value >= 2, "at least 2 tokens"),
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """evaluation"""

    test_before_train: bool = flag(
        False, "print the perplexity before pruning, on DATASET (stdlib where none is given)"
    )
    test_after_train: bool = flag(False, "the same after pruning")


@dataclass(frozen=True, kw_only=True)
class Settings(What, Range, How, Evaluation, Shared):
    """LLM-Pruner: take whole attention heads, MLP channels, hidden channels or blocks out of any
    decoder-only language model. What is left is a smaller dense model: fewer bytes, fewer
    multiplications, faster everywhere. Quality drops; sparse.recover brings much of it back.
    """

    SEPARATORS: ClassVar[tuple[str, ...]] = ("_",)

    model: str = word("model", "folder, hub id, or embedded: tiny-llama, tiny-llama-student")
    dataset: str | None = word(
        "dataset", "text for the gradients of --pruner_type taylor: wikitext2, ptb, c4, pileval, "
        "alpaca, dolly, stdlib (embedded), or a local .txt/.jsonl/.parquet/.csv file or folder "
        "(the original takes bookcorpus)", None,
    )  # fmt: skip

    @property
    def level(self) -> str:
        """What is taken out: "block" (heads and MLP channels), "channel" or "layer".

        Raises:
            UserError: more than one is asked for.
        """
        levels = ("block", "channel", "layer")
        asked = [name for name in levels if getattr(self, f"{name}_wise")]
        if len(asked) > 1:
            flags = " and ".join(f"--{name}_wise" for name in asked)
            raise UserError(f"{flags} exclude each other; run one after the other on its result.")
        return asked[0] if asked else "block"


def prune(
    model, dataset: str | None = None, *, command: str = "sparse.llm_pruner.prune(...)", **flags
) -> dict:
    """The command from Python: its flags as keywords (out=, pruning_ratio=, ...).

    Returns:
        "rows": per block heads, kv_heads and channels before and after; "hidden", "layers",
        "parameters", "macs" (per token, at the windows' length), each (before, after); "ordinary":
        whether plain transformers loads the result.

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    from sparse.structured.prune import run

    return run(Settings(model=str(model), dataset=dataset, **flags), command)


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names are the original's where it has them."""
    return make_parser(Settings, "sparse.llm_pruner", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    level = settings.level
    amount = settings.layer if level == "layer" else f"{100 * settings.pruning_ratio:g}"
    out = settings.out or f"{Path(settings.model).name}-llm_pruner-{level}-{amount}"

    from harness import distributed
    from harness.checkpoint import card
    from sparse.structured.prune import run

    with distributed.group():
        if settings.test_before_train:
            _perplexity(settings, settings.model, "before")
        result = run(replace(settings, out=out), card.command_line())
        lead = distributed.rank() == 0
    if not lead:
        return
    _print_table(result, settings.max_seq_len)
    if settings.dry_run:
        return
    if settings.test_after_train:
        _perplexity(settings, out, "after")
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


def _perplexity(settings: Settings, model: str, when: str) -> None:
    from harness.blocks.streams import stream_logits
    from harness.checkpoint import load
    from harness.data import corpora
    from harness.losses import nll

    dataset = settings.dataset or "stdlib"
    folder = load.resolve(model)
    seqlen = load.window_length(load.load_config(folder))
    windows = corpora.evaluation(load.load_tokenizer(folder), dataset, seqlen=seqlen)
    device = load.pick_device(settings.device)
    logits = stream_logits(model, windows, device=device, dtype=settings.dtype)
    value = nll.perplexity_of_logits(logits, windows).value
    print(f"{dataset}: token perplexity {when} pruning {value:.3f} (seqlen {seqlen})")


if __name__ == "__main__":
    sys.exit(main())
