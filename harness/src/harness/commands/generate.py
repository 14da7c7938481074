"""`harness generate`: what several models say to the same prompts, side by side."""

import re
import shutil
import sys
import textwrap
import time

from harness.checkpoint.load import context_length, load_model, load_tokenizer, resolve
from harness.data import corpora
from harness.errors import UserError

NARROWEST = 36  # columns of text that still read well
GAP = "  "


def generate(
    models: list[str],
    prompts: list[str] | None = None,
    *,
    max_new_tokens: int = 64,
    load: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> int:
    """Body of `harness generate`: continuations of `prompts` (default: three functions of the
    stdlib corpus) by all models. Prints the texts; returns 0.

    Greedy, one model in memory at a time. Raises UserError where a prompt and its continuation do
    not fit a model's context.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    folders = [resolve(model) for model in models]
    prompts = prompts or default_prompts()
    written = [
        continuations(
            load_model(model, device=device, dtype=dtype, load=load), folder, prompts,
            max_new_tokens,
        )
        for model, folder in zip(models, folders, strict=True)
    ]  # fmt: skip
    width = shutil.get_terminal_size((100, 24)).columns
    for number, prompt in enumerate(prompts):
        answers = [
            (f"{model} ({texts[number][1]:.1f} tokens/s)", texts[number][0])
            for model, texts in zip(models, written, strict=True)
        ]
        print(f"=== {prompt}\n{layout(answers, width)}\n")
    return 0


def default_prompts() -> list[str]:
    """The heads, with their docstrings, of three functions of the stdlib corpus."""
    questions = corpora.questions("stdlib-quiz")
    chosen = [questions[i * len(questions) // 3]["question"] for i in range(3)]
    # A question shows some lines before the function, too: what comes last is its head.
    heads = (list(re.finditer(r"^ *(async )?def ", text, re.M))[-1].start() for text in chosen)
    return [textwrap.dedent(text[start:]) for text, start in zip(chosen, heads, strict=True)]


def continuations(model, folder, prompts: list[str], count: int) -> list[tuple[str, float]]:
    """(text, tokens per second) of `model`, whose tokenizer is in `folder`, after every prompt:
    `count` tokens, unless the model ends earlier.

    The time is that of the whole call, the prompt's forward pass with it.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(folder)
    settings = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
    )
    context = context_length(model.config)
    texts = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        length = ids.shape[1]
        if not length:
            raise UserError("an empty prompt gives this model nothing to go on; name some text")
        corpora.check_token(int(ids.max()), model.config)
        if context and length + count > context:
            raise UserError(
                f"a prompt of {length} tokens and {count} new ones exceed the "
                f"context of {folder}, {context}; shorten --prompt or --max-new-tokens"
            )
        inputs = {"attention_mask": torch.ones_like(ids), "generation_config": settings}
        if number == 0:
            model.generate(ids, **inputs)  # the first call of all sets things up
        start = time.perf_counter()
        new = model.generate(ids, **inputs)[0, length:]
        seconds = time.perf_counter() - start
        texts.append((tokenizer.decode(new, skip_special_tokens=True), len(new) / seconds))
    return texts


def layout(answers: list[tuple[str, str]], width: int) -> str:
    """(heading, text) pairs in columns where `width` characters allow, else one after another."""
    column = (width - len(GAP) * (len(answers) - 1)) // len(answers)
    if len(answers) == 1 or column < NARROWEST:
        return "\n".join(f"--- {heading}\n{text.rstrip()}" for heading, text in answers)
    columns = []
    for heading, text in answers:
        lines = [*textwrap.wrap(heading, column), "-" * column]
        for line in text.rstrip().splitlines():
            lines += textwrap.wrap(
                line, column, replace_whitespace=False, drop_whitespace=False
            ) or [""]
        columns.append(lines)
    height = max(map(len, columns))
    padded = [[line.ljust(column) for line in c + [""] * (height - len(c))] for c in columns]
    return "\n".join(GAP.join(line).rstrip() for line in zip(*padded, strict=True))
