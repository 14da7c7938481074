"""LLM-Pruner: heads, MLP channels, hidden channels or blocks are taken out of the model for good.

    groups (from derivatives) -> checked on every block -> scores -> masks
    -> every block is read, cut, and written

Scores see pruned groups as zeros, which to the model is the same; only writing cuts.
"""

from pathlib import Path

import torch

from harness import distributed, locks, precision
from harness.blocks import preflight
from harness.blocks.decoder import Decoder
from harness.checkpoint import load, runs
from harness.checkpoint.load import window_length
from harness.data import corpora
from harness.errors import UserError, nearest
from sparse.structured import importance, scores, selection, shrink
from sparse.structured import levels as cuts

LEVELS = ("block", "channel", "layer")


@locks.releasing
def prune(
    model: str,
    dataset: str | None = None,
    *,
    out: str | Path,
    pruning_ratio: float = 0.5,
    level: str = "block",
    pruner_type: str = "taylor",
    taylor: str = "param_first",
    grouping_strategy: str = "sum",
    global_pruning: bool = False,
    iterative_steps: int = 1,
    layer: int = 12,
    block_attention_layers: tuple[int | None, int | None] = (None, None),
    block_mlp_layers: tuple[int | None, int | None] = (None, None),
    multiple: int = 8,
    num_examples: int = 10,
    max_seq_len: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "sparse.structured.prune(...)",
) -> dict:
    """Prune ``model`` structurally and write the checkpoint folder ``out``.

    Args:
        model: folder, hub id or embedded name.
        dataset: text for the gradients of ``pruner_type`` "taylor".
        pruning_ratio: share of the groups of every part that goes, in [0, 1).
        level: "block" (heads and MLP channels), "channel" (hidden channels) or "layer" (keep the
            first ``layer`` blocks).
        pruner_type, taylor, grouping_strategy: see :mod:`sparse.structured.importance`.
        global_pruning: one threshold for the groups of all blocks.
        iterative_steps: prune in that many steps, scored anew before each.
        block_attention_layers, block_mlp_layers: first block, and first that is not pruned; None
            leaves out 3 of 32 at the start and 1 of 32 at the end.
        multiple: MLP and hidden channels are kept in multiples of this.
        num_examples, max_seq_len: windows for the gradients, and their length at most.

    Returns:
        "rows": per block heads, kv_heads and channels before and after; "hidden", "layers",
        "parameters", "macs" (per token, at the windows' length), each (before, after); "ordinary":
        whether plain transformers loads the result.

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    _check_words(pruning_ratio, level, pruner_type, taylor, grouping_strategy, locals())
    device = distributed.start(load.pick_device(device))
    folder = load.resolve(model)
    decoder = Decoder(folder, device=device, dtype=dtype, name=model)
    preflight.check(decoder, None, "dense", Path(out))
    runs.claim(Path(out), folder, overwrite, dry_run)
    settings = {"pruning_ratio": pruning_ratio, "level": level}
    if level == "layer":
        settings = {"level": level, "layer": layer}
        cut = cuts.layer_wise(decoder, layer)
    else:
        settings |= {
            "pruner_type": pruner_type, "grouping_strategy": grouping_strategy,
            "global_pruning": global_pruning, "iterative_steps": iterative_steps,
            "multiple": multiple,
        }  # fmt: skip
        exact = Decoder(folder, device=device, dtype=torch.float32)
        if level == "block":
            spans = cuts.ranges(decoder, block_attention_layers, block_mlp_layers)
            settings |= {f"block_{kind}_layers": list(span) for kind, span in spans.items()}
            cut = cuts.block_wise(exact, spans, multiple)
        else:
            cut = cuts.channel_wise(exact, pruning_ratio, multiple)
        counts = {name: len(mask) for name, mask in cut.alive.items()}
        selection.check_counts(counts, pruning_ratio, cut.multiples)
        cuts.check(
            exact, cut, selection.uniform(cut.alive, cut.alive, pruning_ratio, cut.multiples)
        )
    windows = calibration = None
    if level != "layer" and pruner_type == "taylor":
        settings["taylor"] = taylor
        if dataset is None:
            raise UserError(
                "taylor scores need text for their gradients; name a dataset, or take "
                "--pruner_type l2, l1 or random."
            )
        seqlen = window_length(decoder.config, min(max_seq_len, window_length(decoder.config)))
        calibration = {
            "dataset": dataset, "nsamples": num_examples, "seqlen": seqlen, "seed": seed,
        }  # fmt: skip
        windows = corpora.calibration(
            load.load_tokenizer(folder), dataset, nsamples=num_examples, seqlen=seqlen,
            seed=seed,
        )  # fmt: skip
    if dry_run:
        cut.alive = selection.uniform(cut.alive, cut.alive, pruning_ratio, cut.multiples)
        result = shrink.summary(decoder, cut, max_seq_len)
        shrink.print_needs(decoder, windows, result)
        return result
    if level != "layer":
        # Half precision has no room for gradients.
        scorer = exact if decoder.dtype == torch.float16 else decoder
        choose = selection.by_one_threshold if global_pruning else selection.uniform
        for step in range(1, iterative_steps + 1):
            if iterative_steps > 1:
                distributed.say(f"step {step} of {iterative_steps}")
            group_scores = scores.score(
                scorer, cut, windows, pruner_type, taylor, grouping_strategy, seed + step
            )
            ratio = pruning_ratio * step / iterative_steps
            cut.alive = choose(group_scores, cut.alive, ratio, cut.multiples)
        cuts.check(exact, cut, cut.alive)
    step = {
        "method": "llm_pruner", "base": str(model), "command": command, "settings": settings,
        "calibration": calibration, "dtype": precision.record(decoder.dtype, decoder.stored_dtype),
    }  # fmt: skip
    result = shrink.summary(decoder, cut, max_seq_len)
    mark = {"base": str(model), "dtype": precision.name(decoder.dtype), "seed": seed, **settings}
    mark |= calibration or {}

    def write():
        identity = runs.fingerprint(folder, windows, mark)
        how = {"overwrite": overwrite, "resume": resume}
        shrink.write(decoder, cut, Path(out), step, identity, result, **how)

    distributed.lead(write)
    return result


def _check_words(ratio, level, pruner, taylor, strategy, numbers) -> None:
    if not 0 <= ratio < 1:
        raise UserError(f"--pruning_ratio {ratio:g}: expected a share from 0 to below 1.")
    for value, known, flag in (
        (level, LEVELS, "level"),
        (pruner, importance.PRUNERS, "--pruner_type"),
        (taylor, importance.TAYLORS, "--taylor"),
        (strategy, importance.STRATEGIES, "--grouping_strategy"),
    ):
        if value not in known:
            raise UserError(
                f"{flag} {value}: expected one of {', '.join(known)}.{nearest(value, known)}"
            )
    for name in ("iterative_steps", "multiple", "num_examples", "layer"):
        if numbers[name] < 1:
            raise UserError(f"--{name} {numbers[name]}: expected at least 1.")
    if numbers["global_pruning"] and level == "channel":
        raise UserError(
            "--global_pruning compares the groups of different blocks; hidden channels are the "
            "same in all. Drop it, or take --block_wise."
        )
