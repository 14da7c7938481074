"""LLM-Pruner: heads, MLP channels, hidden channels or blocks are taken out of the model for good.

    groups (from derivatives) -> checked on every block -> scores -> masks
    -> every block is read, cut, and written

Scores see pruned groups as zeros, which to the model is the same; only writing cuts.
"""

from pathlib import Path

import torch

from harness import distributed, locks, precision
from harness.blocks.decoder import Decoder
from harness.blocks.job import Job, claim, open_decoder
from harness.checkpoint import load, runs
from harness.checkpoint.load import window_length
from harness.data import corpora
from harness.errors import UserError
from sparse.structured import levels, scores, selection, shrink


@locks.releasing
def run(settings, command: str) -> dict:
    """Prune the model structurally and write the checkpoint folder ``settings.out``.

    Args:
        settings: :class:`sparse.llm_pruner.Settings`. command: for the card.

    Returns:
        See :func:`sparse.llm_pruner.prune`.

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    s, level = settings, settings.level
    if s.global_pruning and level == "channel":
        raise UserError(
            "--global_pruning compares the groups of different blocks; hidden channels are the "
            "same in all. Drop it, or take --block_wise."
        )
    job, out = Job.of(settings, command), Path(s.out)
    decoder = open_decoder(job)
    claim(job, decoder, None, "dense")
    exact = None if level == "layer" else Decoder(
        decoder.weights.folder, device=str(decoder.device), dtype=torch.float32
    )  # fmt: skip
    cut, noted = _cut(s, decoder, exact)
    windows = calibration = None
    if level != "layer" and s.pruner_type == "taylor":
        noted["taylor"] = s.taylor
        windows, calibration = _windows(s, decoder)
    result = None
    if s.dry_run:
        cut.alive = selection.uniform(cut.alive, cut.alive, s.pruning_ratio, cut.multiples)
        result = shrink.summary(decoder, cut, s.max_seq_len)
        shrink.print_needs(decoder, windows, result)
        return result
    if level != "layer":
        _choose(s, decoder, exact, cut, windows)
    step = {
        "method": "llm_pruner", "base": s.model, "command": command, "settings": noted,
        "calibration": calibration, "dtype": precision.record(decoder.dtype, decoder.stored_dtype),
    }  # fmt: skip
    result = shrink.summary(decoder, cut, s.max_seq_len)
    mark = {"base": s.model, "dtype": precision.name(decoder.dtype), "seed": s.seed, **noted}
    mark |= calibration or {}

    def write():
        identity = runs.fingerprint(decoder.weights.folder, windows, mark)
        how = {"overwrite": s.overwrite, "resume": s.resume}
        shrink.write(decoder, cut, out, step, identity, result, **how)

    distributed.lead(write)
    return result


def _cut(s, decoder: Decoder, exact: Decoder | None) -> tuple[levels.Cut, dict]:
    """What may go at this level, checked on every block, and the settings of recipe.yaml."""
    if s.level == "layer":
        return levels.layer_wise(decoder, s.layer), {"level": "layer", "layer": s.layer}
    noted = {
        "pruning_ratio": s.pruning_ratio, "level": s.level, "pruner_type": s.pruner_type,
        "grouping_strategy": s.grouping_strategy, "global_pruning": s.global_pruning,
        "iterative_steps": s.iterative_steps, "multiple": s.multiple,
    }  # fmt: skip
    if s.level == "block":
        attention = (s.block_attention_layer_start, s.block_attention_layer_end)
        mlp = (s.block_mlp_layer_start, s.block_mlp_layer_end)
        spans = levels.ranges(decoder, attention, mlp)
        noted |= {f"block_{kind}_layers": list(span) for kind, span in spans.items()}
        cut = levels.block_wise(exact, spans, s.multiple)
    else:
        cut = levels.channel_wise(exact, s.pruning_ratio, s.multiple)
    counts = {name: len(mask) for name, mask in cut.alive.items()}
    selection.check_counts(counts, s.pruning_ratio, cut.multiples)
    evenly = selection.uniform(cut.alive, cut.alive, s.pruning_ratio, cut.multiples)
    levels.check(exact, cut, evenly)
    return cut, noted


def _windows(s, decoder: Decoder) -> tuple[torch.Tensor, dict]:
    """The text for the gradients, and what the card says of it."""
    if s.dataset is None:
        raise UserError(
            "taylor scores need text for their gradients; name a dataset, or take "
            "--pruner_type l2, l1 or random."
        )
    seqlen = window_length(decoder.config, min(s.max_seq_len, window_length(decoder.config)))
    noted = {"dataset": s.dataset, "nsamples": s.num_examples, "seqlen": seqlen, "seed": s.seed}
    windows = corpora.calibration(
        load.load_tokenizer(decoder.weights.folder), s.dataset, nsamples=s.num_examples,
        seqlen=seqlen, seed=s.seed,
    )  # fmt: skip
    return windows, noted


def _choose(s, decoder: Decoder, exact: Decoder, cut: levels.Cut, windows) -> None:
    """Score the groups and mark in ``cut`` those that stay, step by step."""
    # Half precision has no room for gradients.
    scorer = exact if decoder.dtype == torch.float16 else decoder
    choose = selection.by_one_threshold if s.global_pruning else selection.uniform
    for step in range(1, s.iterative_steps + 1):
        if s.iterative_steps > 1:
            distributed.say(f"step {step} of {s.iterative_steps}")
        group_scores = scores.score(
            scorer, cut, windows, s.pruner_type, s.taylor, s.grouping_strategy, s.seed + step
        )
        ratio = s.pruning_ratio * step / s.iterative_steps
        cut.alive = choose(group_scores, cut.alive, ratio, cut.multiples)
    levels.check(exact, cut, cut.alive)
