"""What the command ``bitdistiller.generate`` does: prompts of several sets in, one file of
responses out, resumable."""

import importlib.util
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bitdistiller import prompts as sets
from bitdistiller import response_table
from harness import distributed
from harness.checkpoint import load, runs
from harness.checkpoint.load import context_length
from harness.data import example_sets
from harness.errors import UserError
from harness.generation import response_file, responses
from harness.generation.vllm_loading import INSTALL, dtype_for

BATCH = {"transformers": 16, "vllm": 1024}
NEW_TOKENS = 1024
# What changes what is said by more than rounding.
SETTINGS = ("dataset", "engine", "dtype", "max_new_tokens", "temperature", "top_p", "seed")


def run(settings) -> str | None:
    """What the command does with a `bitdistiller.generate.Settings`, on every rank.

    Returns:
        The report, a table; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    device = distributed.start(load.pick_device(settings.device))
    _check(settings)
    model = settings.model or settings.base_model
    source = load.resolve(model)
    config = load.load_config(source)
    context = context_length(config)
    names = [name for name in settings.dataset.split(",") if name]
    counts = samples(names, settings.max_sample)
    new = settings.max_new_tokens or min(NEW_TOKENS, (context or 2 * NEW_TOKENS) // 2)
    if context and new >= context:
        raise UserError(
            f"--max_new_tokens {new}: expected 1 to {context - 1}; the model's context of "
            f"{context} holds prompt and response."
        )
    settings = replace(
        settings, max_new_tokens=new,
        dtype=dtype_for(settings.engine, settings.dtype, source, device, model),
        batch_size=settings.batch_size or BATCH[settings.engine],
    )  # fmt: skip
    sampling = responses.Sampling(new, settings.temperature, settings.top_p)
    out = (
        Path(settings.out)
        if settings.out
        else Path(settings.out_path or "") / _name(settings, names, counts)
    )
    runs.RunFolder(out, kind=None).claim(settings.overwrite, settings.dry_run)
    distributed.say(f"engine: {settings.engine}, at most {new} new tokens")
    tokenizer = load.load_tokenizer(source)
    asked = []  # (set, text, token ids)
    for name, count in zip(names, counts, strict=True):
        asked += _asked(name, count, settings.seed, tokenizer, context and context - new)
    labels, texts, prompts = map(list, zip(*asked, strict=True))
    responses.check_tokens(tokenizer, prompts, config)
    groups = responses.batches(prompts, settings.batch_size)
    if settings.dry_run:
        print(f"{len(groups)} batches of at most {settings.batch_size} prompts -> {out}")
        return None
    recorded = {key: getattr(settings, key) for key in SETTINGS} | {"max_sample": counts}
    longest = max(map(len, prompts)) + new
    said = response_file.write(
        out,
        lambda: responses.open_engine(
            settings.engine, source, tokenizer, sampling, longest, dtype=settings.dtype,
            device=device, gpus=settings.tensor_parallel_size,
        ),
        tokenizer, prompts, groups, new,
        lambda i, said: {
            "prompt": texts[i], "response": said.text, "dataset": labels[i], "ended": said.ended
        },
        run=response_file.identity(source, recorded, texts), seed=settings.seed,
        resume=settings.resume, overwrite=settings.overwrite,
    )  # fmt: skip
    rows = [
        (text, one.text, label, one.ended)
        for label, text, one in zip(labels, texts, said, strict=True)
    ]
    measured = [(len(ids), one.tokens) for ids, one in zip(prompts, said, strict=True)]
    return (
        f"{response_table.table(response_table.lines(rows, measured), 'tokens')}\nwritten to {out}"
    )


def _check(settings) -> None:
    """Refuse what would fail only after prompts are read and tokenized."""
    if (settings.model is None) == (settings.base_model is None):
        raise UserError("name the model once: as the first word, or with --base_model.")
    if settings.out and settings.out_path:
        raise UserError("--out names a file and --out_path a folder for one; give one of the two.")
    if settings.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"--engine vllm, the default, needs vLLM: {INSTALL}; --engine transformers works "
            "without."
        )
    if settings.engine != "vllm" and settings.tensor_parallel_size is not None:
        raise UserError(
            "--tensor_parallel_size is vLLM's; with --engine transformers each process of "
            "torchrun holds the model."
        )


def samples(names: list[str], given: str | None) -> list[int | None]:
    """How many prompts of each set: --max_sample, or what the original took; None: all.

    Raises:
        UserError: no set, one that is named twice or unknown, or another number of numbers.
    """
    if not names:
        raise UserError("--dataset: name a set, or several with commas between.")
    kinds = [sets.parse(name)[1] for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"--dataset: {twice[0]} is named twice; once is enough.")
    if given is None:
        return [sets.SAMPLES.get(kind) for kind in kinds]
    parts = given.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--max_sample {given}: expected numbers above 0, with commas between.")
    if len(parts) not in (1, len(names)):
        raise UserError(
            f"--max_sample {given}: {len(parts)} numbers for {len(names)} sets "
            f"({', '.join(names)}); give one for all, or one for each."
        )
    return [int(part) for part in parts] * (len(names) if len(parts) == 1 else 1)


def _asked(name, count, seed, tokenizer, longest) -> list[tuple[str, str, list[int]]]:
    """(set, prompt, token ids) of the prompts drawn from a set that fit into ``longest`` tokens."""
    label = sets.parse(name)[0]
    every = sets.prompts(name)
    if not every:
        raise UserError(
            f"{name}: nothing to ask; a text needs rows or passages of more than {sets.LONGER} "
            "characters."
        )
    texts = sets.draw(every, count, seed)
    ids = example_sets.prompt_ids(tokenizer, texts)
    fit = [
        (label, text, some)
        for text, some in zip(texts, ids, strict=True)
        if some and (longest is None or len(some) <= longest)
    ]
    if not fit:
        raise UserError(
            f"{name}: none of {len(texts)} prompts has at most {longest} tokens, which the model's "
            "context leaves; lower --max_new_tokens."
        )
    left = len(texts) - len(fit)
    mean = statistics.fmean(len(some) for _, _, some in fit)
    distributed.say(
        f"{name}: {len(fit)} prompts of {len(every)}, {mean:.0f} tokens on average"
        + f"; {left} left out, they leave no room for the response" * bool(left)
    )
    return fit


def _name(settings, names: list[str], counts: list[int | None]) -> str:
    """The original's name for the file, of all sets."""
    labels = "-".join(sets.parse(name)[0] for name in names)
    drawn = "-".join("all" if count is None else str(count) for count in counts)
    how = f"T{settings.temperature:g}_N{settings.max_new_tokens}_S{settings.seed}"
    return f"{labels}_{how}_{drawn}.jsonl"
