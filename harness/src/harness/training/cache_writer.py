"""Make a teacher's cache (teacher_cache.py): shard after shard, shared among ranks, resumable."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from harness import distributed, paths
from harness.checkpoint import card, hashes, runs, weight_files
from harness.data import example_sets
from harness.errors import UserError
from harness.progress import track
from harness.training import batching, teacher_cache
from harness.training.validation import inputs_of

KIND = runs.Kind("a teacher's cache", teacher_cache.NOTE, teacher_cache.NOTE)


def check(out: Path, overwrite: bool, batch: int, dry_run: bool = False) -> None:
    """Raise :class:`UserError` unless ``out`` may be made, ``batch`` examples at a time; hold
    it, unless this is a dry run."""
    runs.RunFolder(out, KIND).claim(overwrite, dry_run)
    if batch < 1:
        raise UserError(f"--batch-size {batch}: at least 1.")


# What the cache is made of, by name.
def cache(  # noqa: PLR0913
    load: Callable[[], torch.nn.Module],
    examples: example_sets.Examples,
    out: Path,
    *,
    teacher: str,
    source: Path,
    data: str,
    settings: dict,
    top_k: int,
    vocabulary: int,
    batch: int,
    pad: int,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
) -> dict | None:
    """Write the cache ``out`` of a teacher's probabilities at every label, on every rank.

    Args:
        load: the teacher, a causal LM in eval mode; called where there is work left.
        teacher, data: as the user named them. source: the teacher's folder.
        settings: what else changes the result.
        top_k: tokens a label, of the first ``vocabulary`` logits.
        batch: examples at a time. pad: the token that fills up a batch.

    Returns:
        What is in cache.json; None after a dry run.

    Raises:
        Finished: ``out`` is this very cache.
        UserError: top_k is out of range, another run has begun there, the disk is full, logits are
            NaN or infinite.
    """
    if not 1 <= top_k <= vocabulary:
        raise UserError(f"--topk {top_k}: expected 1 to {vocabulary}, the vocabulary.")
    width = teacher_cache.bytes_per_label(top_k, vocabulary)
    edges, labels = teacher_cache.cut(examples, width), sum(teacher_cache.counts(examples))
    distributed.say(f"{labels} labels, {width} bytes each: {labels * width / 1e6:.1f} MB")
    if dry_run:
        print(f"{len(edges) - 1} shards -> {out}")
        return None
    teacher_files = hashes.model_files(source)
    note = {
        "teacher": teacher, "teacher_files": teacher_files, "command": card.command_line(),
        "data": data, "top_k": top_k, "vocabulary": vocabulary, "labels": labels,
        "examples": len(examples), "bytes_per_label": width, "edges": edges,
        "content": teacher_cache.content(examples),
    }  # fmt: skip
    identity = {key: value for key, value in note.items() if key not in ("teacher", "command")}
    identity["settings"] = settings
    run = runs.RunFolder(out, KIND)
    partial = run.partial
    distributed.lead(lambda: _open(run, identity, overwrite, resume))
    shards = list(enumerate(teacher_cache.shard_ranges(edges)))
    rest = [s for s in shards if not (partial / teacher_cache.shard_name(s[0])).is_file()]
    if len(rest) < len(shards):
        distributed.say(f"resuming: {len(shards) - len(rest)} of {len(shards)} shards are there")
    mine = rest[distributed.rank() :: distributed.world_size()]
    distributed.sum_number(0.0)  # every rank has looked, before one writes
    with run.nothing_left():
        model = load() if mine else None
        for number, chosen in track(mine, "shards") if distributed.rank() == 0 else mine:
            part = [examples[index] for index in chosen]
            tensors = probabilities(model, part, top_k, vocabulary, batch, pad)
            paths.save_tensors(partial / teacher_cache.shard_name(number), tensors)
    distributed.sum_number(0.0)  # every rank has written
    return distributed.lead(lambda: _finish(run, note))


def summary(note: dict) -> str:
    """What a cache holds, for people."""
    return (
        f"{note['labels']} labels of {note['examples']} examples, {note['bytes_per_label']} "
        f"bytes each ({2 * note['vocabulary']} as float16 logits); beyond the top "
        f"{note['top_k']}: {note['mean_tail']:.2%} of the probability"
    )


@torch.no_grad()
def probabilities(
    teacher, examples: list, top_k: int, vocabulary: int, batch: int, pad: int
) -> dict[str, torch.Tensor]:
    """`training.teacher_cache.compress` of the labels of (ids, first) pairs, in their order."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    rows = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        made = batching.collate([examples[i] for i in chosen], pad)
        counted = made["labels"] != batching.IGNORED
        logits = teacher(**inputs_of(made, teacher.device)).logits
        parts = teacher_cache.compress(logits[counted.to(logits.device)][:, :vocabulary], top_k)
        sizes = counted.sum(1).tolist()
        pieces = {key: tensor.split(sizes) for key, tensor in parts.items()}
        rows |= {i: {key: pieces[key][n] for key in parts} for n, i in enumerate(chosen)}
    return {
        key: torch.cat([rows[i][key] for i in range(len(examples))]) for key in teacher_cache.KEYS
    }


def _open(run: runs.RunFolder, identity: dict, overwrite: bool, resume: bool) -> None:
    run.open(identity, "shard-*", overwrite=overwrite, resume=resume)
    for path in [*run.partial.glob("*.tmp"), *run.partial.glob("shard-*")]:
        if not _is_whole(path):
            path.unlink(missing_ok=True)


def _is_whole(shard: Path) -> bool:
    """Whether a file is there with all of its bytes: a loss of power can leave a name without."""
    try:
        return shard.suffix != ".tmp" and bool(weight_files.header(shard))
    except UserError:
        return False


def _finish(run: runs.RunFolder, note: dict) -> dict:
    total = 0.0
    for path in run.partial.glob("shard-*"):
        with safe_open(path, framework="pt") as shard:
            total += shard.get_tensor("log_tail").double().exp().sum().item()
    note["mean_tail"] = total / note["labels"]
    text = json.dumps(note | run.made_by, indent=1) + "\n"
    paths.write_text(run.partial / teacher_cache.NOTE, text)
    run.publish()
    return note
