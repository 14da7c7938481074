"""What the command ``minillm.generate`` does: prompts in, a file of responses out, resumable."""

from dataclasses import replace
from pathlib import Path

from harness import distributed
from harness.checkpoint import load, runs
from harness.checkpoint.load import context_length
from harness.data import example_sets
from harness.errors import UserError
from harness.generation import response_file, responses
from harness.generation.vllm_loading import dtype_for
from harness.settings import record
from minillm import flags

BATCH = {"transformers": 16, "vllm": 1024}
# What does not change what is said, but for rounding.
FREE = ("model", "out", "resume", "overwrite", "dry_run", "device", "local_rank", "batch_size")


def run(settings) -> dict[str, int] | None:
    """What the command does with a `minillm.generate.Settings`, on every rank.

    Returns:
        Counts of what was written and left out, by name; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    settings = settings.completed()
    device = distributed.start(load.pick_device(settings.device))
    source, out = load.resolve(settings.model), Path(settings.out)
    runs.RunFolder(out, kind=None).claim(settings.overwrite, settings.dry_run)
    settings, sampling = resolved(settings, source, device)
    tokenizer = load.load_tokenizer(source)
    pairs = example_sets.pairs(settings.data, "train", tokenizer=tokenizer)[: settings.gen_num]
    texts = [pair["prompt"] for pair in pairs]
    short, prompts = shorter(settings, settings.data, tokenizer, texts)
    texts = [texts[index] for index in short]
    groups = responses.batches(prompts, settings.batch_size)
    distributed.say(
        f"{settings.data}: {len(prompts)} prompts, responses of at most {sampling.new_tokens} "
        f"tokens{left_out(len(pairs) - len(prompts), settings)}"
    )
    if settings.dry_run:
        print(f"{len(groups)} batches of at most {settings.batch_size} -> {out}")
        return None
    written = response_file.write(
        out,
        lambda: open_engine(settings, source, device, tokenizer, sampling),
        tokenizer, prompts, groups, sampling.new_tokens,
        lambda index, answer: {"prompt": texts[index], "response": answer.text},
        run=response_file.identity(source, record(settings, FREE), texts), seed=settings.seed,
        resume=settings.resume, overwrite=settings.overwrite,
    )  # fmt: skip
    return {
        "responses": len(written),
        "tokens": sum(answer.tokens for answer in written),
        "empty": sum(not answer.text.strip() for answer in written),
        "not ended at the limit": sum(not answer.ended for answer in written),
    }


def resolved(settings, source: Path, device: str):
    """Settings (those here, or of minillm.evaluate) with dtype, lengths and batch size filled in
    for the model in ``source``, and how to sample."""
    longest, prompt = flags.lengths(settings, context_length(load.load_config(source)))
    if prompt >= longest:
        raise UserError(
            f"--max-prompt-length {prompt}: expected less than --max-length {longest}, which holds "
            "prompt and response."
        )
    sampling = responses.Sampling(
        longest - prompt, settings.temperature, settings.top_p, settings.top_k,
        settings.no_repeat_ngram_size,
    )  # fmt: skip
    dtype = dtype_for(settings.engine, settings.dtype, source, device, settings.model)
    batch = settings.batch_size or BATCH[settings.engine]
    return replace(
        settings, dtype=dtype, max_length=longest, max_prompt_length=prompt, batch_size=batch
    ), sampling


def open_engine(settings, source: Path, device: str, tokenizer, sampling) -> responses.Ask:
    """The engine of resolved settings."""
    return responses.open_engine(
        settings.engine, source, tokenizer, sampling, settings.max_length, dtype=settings.dtype,
        device=device,
    )  # fmt: skip


def shorter(settings, name: str, tokenizer, texts: list[str]) -> tuple[list[int], list[list[int]]]:
    """Which of the prompts have 1 to --max-prompt-length tokens, and these as token ids."""
    longest = settings.max_prompt_length
    ids = example_sets.prompt_ids(tokenizer, texts) if texts else []
    short = [i for i, prompt in enumerate(ids) if 0 < len(prompt) <= longest]
    if not short:
        raise UserError(
            f"{name}: of {len(texts)} prompts none has at most {longest} tokens; raise "
            "--max-prompt-length."
        )
    prompts = [ids[i] for i in short]
    responses.check_tokens(tokenizer, prompts, load.load_config(load.resolve(settings.model)))
    return short, prompts


def left_out(count: int, settings) -> str:
    longest = settings.max_prompt_length
    return f"; {count} left out, their prompt has more than {longest}" * bool(count)
