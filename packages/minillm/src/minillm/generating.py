"""What the command ``minillm.generate`` does: prompts in, a file of responses out, resumable.

While a run is under way ``OUT.partial/`` holds what each rank has, a line a response, and
``OUT.partial.json`` says what run it is. At the end the responses are written in the order of the
prompts, beside and renamed.
"""

import hashlib
import json
import shutil
from pathlib import Path

from harness.errors import UserError
from harness.perplexity import context_length

from harness import checkpoint, distributed, example_sets, responses, writer
from minillm import flags

BATCH = {"transformers": 16, "vllm": 1024}
# What does not change what is said: neither does the device, but for rounding.
FREE = ("model", "out", "resume", "overwrite", "dry_run", "device", "local_rank")


def generate(args) -> dict[str, int] | None:
    """Run the command with its parsed arguments, on every rank.

    Returns:
        Counts of what was written and left out, by name; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    device = distributed.start(checkpoint.pick_device(args.device))
    source, out = checkpoint.resolve(args.model), Path(args.out)
    if out.is_dir() or (out.exists() and not (args.overwrite or args.dry_run)):
        raise UserError(f"{out} exists; choose another --out, or replace it with --overwrite.")
    pairs = example_sets.pairs(args.data, "train")[: args.gen_num]
    tokenizer = checkpoint.load_tokenizer(source)
    sampling, longest = how(args, source)
    texts = [pair["prompt"] for pair in pairs]
    kept, prompts = short(args, args.data, tokenizer, texts)
    texts = [texts[index] for index in kept]
    groups = responses.batches(prompts, args.batch_size)
    distributed.say(
        f"{args.data}: {len(prompts)} prompts, responses of at most {sampling.new_tokens} tokens"
        + left_out(len(pairs) - len(prompts), args)
    )
    if args.dry_run:
        print(f"{len(groups)} batches of at most {args.batch_size} -> {out}")
        return None
    settings = {k: v for k, v in vars(args).items() if k not in FREE and v is not None}
    identity = writer.fingerprint(source, None, settings)
    identity["prompts"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    partial = out.with_name(out.name + ".partial")
    file = out.with_name(out.name + ".partial.json")
    done = distributed.lead(lambda: _open(partial, file, identity, args.resume))
    if done:
        distributed.say(f"resuming: {len(done)} responses are there")
    rest = [group for group in groups if not done.issuperset(group)]
    if rest:
        ask = responses.open_engine(args, source, device, tokenizer, sampling, longest)
        with (partial / f"rank-{distributed.rank()}.jsonl").open("w") as lines:
            for group, said in responses.respond(ask, prompts, args.seed, rest, "responses"):
                read = tokenizer.batch_decode(said, skip_special_tokens=True)
                for index, text, ids in zip(group, read, said, strict=True):
                    cut = len(ids) == sampling.new_tokens
                    lines.write(json.dumps([index, text, len(ids), cut]) + "\n")
                lines.flush()
        distributed.sum_number(0.0)  # every rank has written
    return distributed.lead(lambda: _finish(partial, file, texts, out))


def how(args, source: Path) -> tuple[responses.Sampling, int]:
    """How to sample, and the longest prompt with its response, in tokens, from the flags; fills in
    --batch-size and --max-prompt-length."""
    context = context_length(checkpoint.load_config(source))
    longest, args.max_prompt_length = flags.lengths(args, context)
    if args.max_prompt_length >= longest:
        raise UserError(
            f"--max-prompt-length {args.max_prompt_length}: expected less than --max-length "
            f"{longest}, which holds prompt and response."
        )
    if args.batch_size is None:
        args.batch_size = BATCH[args.engine]
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1.")
    sampling = responses.Sampling(
        longest - args.max_prompt_length, args.temperature, args.top_p, args.top_k,
        args.no_repeat_ngram_size,
    )  # fmt: skip
    return sampling, longest


def short(args, name: str, tokenizer, texts: list[str]) -> tuple[list[int], list[list[int]]]:
    """Which of the prompts have 1 to --max-prompt-length tokens, and these as token ids."""
    ids = example_sets.prompt_ids(tokenizer, texts) if texts else []
    kept = [i for i, some in enumerate(ids) if 0 < len(some) <= args.max_prompt_length]
    if not kept:
        raise UserError(
            f"{name}: of {len(texts)} prompts none has at most {args.max_prompt_length} tokens; "
            "raise --max-prompt-length."
        )
    return kept, [ids[i] for i in kept]


def left_out(count: int, args) -> str:
    return f"; {count} left out, their prompt has more than {args.max_prompt_length}" * bool(count)


def _rows(partial: Path) -> dict[int, list]:
    """Index -> line of all responses there; a line that was cut off is not one."""
    found = {}
    for path in partial.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                index, *row = json.loads(line)
            except ValueError:
                continue
            found[index] = row
    return found


def _open(partial: Path, file: Path, identity: dict, resume: bool) -> set[int]:
    """Make or take up the folder; which responses are there."""
    rows = _rows(partial) if resume and file.is_file() else {}
    if rows:
        writer.refuse_other_run(partial, json.loads(file.read_text()), identity)
    # One file of what all ranks had: the next run may have other ranks.
    kept = partial / "kept.jsonl"
    partial.mkdir(parents=True, exist_ok=True)
    writer.write_text(kept, "".join(json.dumps([i, *row]) + "\n" for i, row in rows.items()))
    for path in partial.glob("rank-*.jsonl"):
        path.unlink()
    writer.write_text(file, json.dumps(identity, indent=1))
    return set(rows)


def _finish(partial: Path, file: Path, texts: list[str], out: Path) -> dict[str, int]:
    rows = _rows(partial)
    lines = [
        json.dumps({"prompt": text, "response": rows[index][0]}) + "\n"
        for index, text in enumerate(texts)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    writer.write_text(out, "".join(lines))
    file.unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    return {
        "responses": len(lines),
        "tokens": sum(row[1] for row in rows.values()),
        "empty": sum(not row[0].strip() for row in rows.values()),
        "not ended at the limit": sum(row[2] for row in rows.values()),
    }
