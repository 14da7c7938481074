"""What the command ``minillm.cache_teacher`` does: shard after shard, resumable.

``OUT.partial/`` holds finished shards, ``OUT.partial.json`` says of what run; at the end the folder
is renamed to ``OUT``.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from harness.errors import UserError
from harness.perplexity import context_length
from harness.progress import track
from harness.validation import inputs_of
from safetensors import safe_open

from harness import card, checkpoint, distributed, example_sets, teacher_cache, writer
from minillm import finetuning, flags, models


def cache(args) -> dict | None:
    """Run the command with its parsed arguments, on every rank.

    Returns:
        What is in cache.json; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    device = distributed.start(checkpoint.pick_device(args.device))
    source, out = checkpoint.resolve(args.model), Path(args.out)
    _check_out(out, args.overwrite or args.dry_run)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1.")
    configs = [checkpoint.load_config(source)]
    tokenizer = checkpoint.load_tokenizer(args.student or source)
    vocabulary = configs[0].get_text_config().vocab_size
    if args.student:
        configs.append(checkpoint.load_config(checkpoint.resolve(args.student)))
        vocabulary = models.shared_columns(args.model, args.student)
    if not 1 <= args.topk <= vocabulary:
        raise UserError(f"--topk {args.topk}: expected 1 to {vocabulary}, the vocabulary.")
    longest, longest_prompt = flags.lengths(args, *map(context_length, configs))
    examples = example_sets.examples(
        tokenizer, finetuning.pairs(args, "train"), max_length=longest,
        max_prompt_length=longest_prompt, name=f"{args.data}, train",
    )  # fmt: skip
    example_sets.check_tokens([examples], configs[0])
    width = teacher_cache.bytes_per_label(args.topk, vocabulary)
    edges, labels = teacher_cache.cut(examples, width), sum(teacher_cache.counts(examples))
    distributed.say(f"{labels} labels, {width} bytes each: {labels * width / 1e6:.1f} MB")
    if args.dry_run:
        print(f"{len(edges) - 1} shards -> {out}")
        return None
    files = writer.fingerprint(source, None, {})["model"]
    note = {
        "teacher": args.model, "teacher_files": files, "command": card.command_line(),
        "data": args.data, "top_k": args.topk, "vocabulary": vocabulary, "labels": labels,
        "examples": len(examples), "bytes_per_label": width, "edges": edges,
        "content": teacher_cache.content(examples),
    }  # fmt: skip
    identity = {key: value for key, value in note.items() if key not in ("teacher", "command")}
    identity["settings"] = {"dtype": args.dtype, "teacher_peft_path": args.teacher_peft_path}
    partial = out.with_name(out.name + ".partial")
    file = out.with_name(out.name + ".partial.json")
    distributed.lead(lambda: _open(partial, file, identity, args.resume))
    shards = list(enumerate(teacher_cache.shard_ranges(edges)))
    rest = [s for s in shards if not (partial / teacher_cache.shard_name(s[0])).is_file()]
    if len(rest) < len(shards):
        distributed.say(f"resuming: {len(shards) - len(rest)} of {len(shards)} shards are there")
    mine = rest[distributed.rank() :: distributed.world_size()]
    distributed.sum_number(0.0)  # every rank has looked, before one writes
    if mine:
        teacher = models.load_teacher(
            args.model, device=device, dtype=args.dtype, peft_path=args.teacher_peft_path
        )
        pad = example_sets.pad_id(tokenizer)
        for number, chosen in track(mine, "shards") if distributed.rank() == 0 else mine:
            some = [examples[index] for index in chosen]
            tensors = probabilities(teacher, some, args.topk, vocabulary, args.batch_size, pad)
            writer.save_tensors(partial / teacher_cache.shard_name(number), tensors)
    distributed.sum_number(0.0)  # every rank has written
    return distributed.lead(lambda: _finish(partial, file, out, note))


@torch.no_grad()
def probabilities(
    teacher, examples: list, top_k: int, vocabulary: int, batch: int, pad: int
) -> dict[str, torch.Tensor]:
    """`harness.teacher_cache.compress` of the labels of (ids, first) pairs, in their order."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    found = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        made = example_sets.collate([examples[i] for i in chosen], pad)
        counted = made["labels"] != example_sets.IGNORED
        logits = teacher(**inputs_of(made, teacher.device)).logits
        parts = teacher_cache.compress(logits[counted.to(logits.device)][:, :vocabulary], top_k)
        sizes = counted.sum(1).tolist()
        pieces = {key: tensor.split(sizes) for key, tensor in parts.items()}
        found |= {i: {key: pieces[key][n] for key in parts} for n, i in enumerate(chosen)}
    return {
        key: torch.cat([found[i][key] for i in range(len(examples))]) for key in teacher_cache.KEYS
    }


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another --out, or replace it with --overwrite.")
    if out.exists() and not (out / teacher_cache.NOTE).is_file():
        raise UserError(f"{out} is not a teacher's cache; --overwrite will not delete it.")


def _open(partial: Path, file: Path, identity: dict, resume: bool) -> None:
    if resume and file.is_file() and any(partial.glob("shard-*")):
        writer.refuse_other_run(partial, json.loads(file.read_text()), identity)
    else:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.glob("*.tmp"):
        path.unlink()
    writer.write_text(file, json.dumps(identity, indent=1))


def _finish(partial: Path, file: Path, out: Path, note: dict) -> dict:
    total = 0.0
    for path in partial.glob("shard-*"):
        with safe_open(path, framework="pt") as shard:
            total += shard.get_tensor("log_tail").double().exp().sum().item()
    note["mean_tail"] = total / note["labels"]
    writer.write_text(partial / teacher_cache.NOTE, json.dumps(note, indent=1) + "\n")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    file.unlink()
    return note
