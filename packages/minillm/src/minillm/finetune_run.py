"""SFT and distillation on given responses: check, load, choose the loss, train (training.loop).

Legend: B examples in a micro-batch, T tokens of the longest of them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from harness import distributed, precision
from harness.checkpoint import card, hashes, load, runs
from harness.checkpoint.load import context_length
from harness.checkpoint.weights import Weights
from harness.data import example_sets
from harness.generation import responses
from harness.losses import from_hidden
from harness.metrics.footprint import stored_size
from harness.settings import record
from harness.training import batching, distillation, engine, loop, teacher_cache, validation
from harness.training.cost import model_bytes, print_plan, training_cost
from minillm import align, flags, losses, models, packing

# What does not change the result; the rest of the flags is what a resumed run must repeat.
FREE = (
    "model", "out", "resume", "overwrite", "dry_run", "device", "local_rank", "save_interval",
    "preset",
)  # fmt: skip


def run(settings) -> dict | None:
    """What the command does with a `minillm.finetune.Settings`, on every rank.

    Returns:
        As :func:`harness.training.loop.train`; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    settings = settings.completed()
    device = engine.launch(load.pick_device(settings.device))
    out, source = Path(settings.out), load.resolve(settings.model)
    config = load.load_config(source)
    runs.claim(out, source, settings.overwrite, settings.dry_run)
    contexts = [context_length(config)]
    columns = None
    if settings.teacher:
        contexts.append(context_length(load.load_config(load.resolve(settings.teacher))))
        if not settings.align:
            columns = distillation.shared_columns(
                settings.teacher, settings.model, "--align uld, or "
            )
    longest, longest_prompt = flags.lengths(settings, *contexts)
    tokenizer = load.load_tokenizer(source)
    train, dev = examples(settings, tokenizer, longest, longest_prompt, **_how(settings))
    example_sets.check_tokens([train, dev], config)
    stored = None
    if settings.teacher_cache:
        vocabulary = config.get_text_config().vocab_size
        stored = teacher_cache.Cache(settings.teacher_cache, train, vocabulary)
    rows = packing.pack(train.lengths, longest, settings.seed) if settings.packing else None
    parameters = stored_size(source, config).parameters
    count = len(rows or train)
    training, how = flags.training(settings, parameters, count, distributed.world_size())
    distributed.say(f"{settings.type} of {settings.model}: {how}")
    stored_dtype = Weights(source).dtype
    dtype = precision.choose_for_training(settings.dtype, stored_dtype, device, settings.model)
    if settings.dry_run:
        _print_plan(settings, parameters, training, dtype, stored_dtype)
        return None

    student = models.load_student(
        settings.model, device=device, dtype=dtype, peft_path=settings.peft_path
    )
    if settings.packing and not packing.isolates(student):
        distributed.say("packing: this family reads packed examples as one text, each sees those "
                        "before it")  # fmt: skip
    identity = _identity(settings, source, training, dtype, train, dev)
    if stored:
        identity["teacher_cache"] = stored.identity
    objective = _objective(settings, student, device, columns, dtype, stored)
    student, finish = models.with_lora(student, settings, stored_dtype)
    collate = _collate(settings, train, rows, tokenizer, longest, stored)
    lengths = [sum(train.lengths[i] for i in row) for row in rows] if rows else train.lengths

    def batches(step: int) -> list[dict]:
        return [collate(micro) for micro in batching.deal(lengths, step, training)]

    every = settings.eval_interval or max(1, count // batching.batch_size(training))
    recorded = _record(settings, training, dtype, longest, longest_prompt)
    return loop.train(
        student.train(), training, batches=batches, loss_of=objective, out=out, identity=identity,
        evaluate=_look(settings, dev, tokenizer, longest - longest_prompt),
        better="higher" if settings.select == "rouge" else "lower",
        eval_steps=every, save_steps=settings.save_interval, finish=finish,
        stored=[] if finish else None, resume=settings.resume, overwrite=settings.overwrite,
        step_entry=card.training_step(
            settings.type, settings, recorded, dataset=settings.data, nsamples=len(train),
            seqlen=longest,
        ), source=source,
    )  # fmt: skip


def pairs(
    data: flags.Data, split: str, tokenizer, *, generated: bool = False, cached: bool = False
) -> list[dict[str, str]]:
    """Prompts and responses of --data, --dev-data, --train-num and --dev-num; a file of its own for
    each is read whole.

    Args:
        generated: --data are responses of minillm.generate. cached: a cache of the teacher serves.
    """
    if split == "train":
        # cache_teacher knows nothing of --dev-data: it leaves out what is held out, always.
        alone = bool(data.dev_data) and not cached
        return example_sets.pairs(data.data, split, generated, alone=alone, tokenizer=tokenizer)[
            : data.train_num
        ]
    dev = data.dev_data
    return example_sets.pairs(
        dev or data.data, split, generated and not dev, alone=bool(dev), tokenizer=tokenizer
    )[: data.dev_num]


def examples(
    data: flags.Data, tokenizer, longest: int, longest_prompt: int, **how
) -> list[example_sets.Examples]:
    """Training and validation examples of :func:`pairs`."""
    return [
        example_sets.examples(
            tokenizer, pairs(data, split, tokenizer, **how), max_length=longest,
            max_prompt_length=longest_prompt, name=f"{name}, {split}",
        )
        for split, name in (("train", data.data), ("validation", data.dev_data or data.data))
    ]  # fmt: skip


def _how(settings) -> dict[str, bool]:
    """How :func:`pairs` reads the data of these settings."""
    return {"generated": settings.type == "seqkd", "cached": bool(settings.teacher_cache)}


def _objective(settings, student, device: str, columns: int | None, dtype, stored) -> Callable:
    """(engine, batch) -> (sum of losses, the sums to report)."""
    if stored:
        rows = losses.ROWS[settings.loss]
        return partial(teacher_cache.distillation, rows, settings.kd_ratio, stored.vocabulary)
    if settings.teacher is None:
        return validation.label_loss
    teacher = models.load_teacher(
        settings.teacher, device=device, peft_path=settings.teacher_peft_path,
        dtype=dtype if dtype == torch.float32 else "auto",
    )  # fmt: skip
    if settings.align:
        return partial(align.distillation, teacher, settings.kd_ratio)
    fused = from_hidden.fusable(student, settings.zero) and from_hidden.fusable(teacher)
    rows = partial(
        from_hidden.mix_rows, rows=losses.ROWS[settings.loss], kd_ratio=settings.kd_ratio
    )
    return partial(distillation.over_labels, teacher, rows, columns, fused)


def _collate(settings, train, rows, tokenizer, longest: int, stored) -> Callable[[list[int]], dict]:
    """Indices -> a micro-batch: of examples (with a cache's rows), of packed rows, or of texts for
    two tokenizers."""
    pad = batching.pad_id(tokenizer)
    if rows:
        return lambda micro: packing.collate([[train[i] for i in rows[n]] for n in micro], pad)
    if not settings.align:
        more = stored.rows if stored else lambda micro: {}
        return lambda micro: batching.collate([train[i] for i in micro], pad) | more(micro)
    texts = pairs(settings, "train", tokenizer, **_how(settings))
    other = load.load_tokenizer(settings.teacher)
    pads = (batching.pad_id(other), pad)
    return lambda micro: align.batch(
        [texts[train.sources[i]] for i in micro], other, tokenizer, longest, pads
    )


def _look(settings, dev, tokenizer, new_tokens: int) -> Callable:
    """(engine, step) -> the values of a look at the validation examples."""
    size, pad = settings.eval_batch_size or settings.batch_size, batching.pad_id(tokenizer)
    sampling = responses.Sampling(new_tokens, temperature=float(not settings.greedy))

    def evaluate(running, step: int) -> dict:
        values = {"validation_loss": validation.held_out_loss(running, dev, batch=size, pad=pad)}
        if settings.eval_gen:
            values["rouge_l"] = validation.rouge(
                running, tokenizer, dev, sampling=sampling, batch=size, seed=settings.seed
            )
        return validation.select(settings.select, values)

    return evaluate


def _record(settings, training, dtype, longest: int, longest_prompt: int) -> dict:
    return record(settings, FREE) | {
        "lr": training.learning_rate, "steps": training.steps, "dtype": precision.name(dtype),
        "max_length": longest, "max_prompt_length": longest_prompt,
    }  # fmt: skip


def _identity(settings, source: Path, training, dtype, train, dev) -> dict:
    identity = runs.fingerprint(source, None, _record(settings, training, dtype, 0, 0))
    identity["data"] = {"training": train.key, "validation": dev.key}
    if settings.teacher:
        folder = load.resolve(settings.teacher)
        identity["teacher"] = hashes.model_files(folder)
    return identity


def _print_plan(settings, parameters: int, training, dtype, stored_dtype) -> None:
    """--dry-run: what training takes, activations aside."""
    item, trained = dtype.itemsize, 0 if settings.peft else parameters
    print_plan(
        f"{settings.type}: {settings.model} ({parameters / 1e6:.2f} M parameters, "
        f"{precision.name(dtype)}) -> {settings.out}",
        training_cost(parameters, trained, item, stored_dtype.itemsize, training.zero),
        f"{training.micro_batch} examples",
        model_bytes(settings.teacher, item) if settings.teacher else 0,
    )
