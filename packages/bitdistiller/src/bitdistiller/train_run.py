"""Quantization-aware self-distillation: check, load teacher and student, choose the loss, train
(harness.training.loop)."""

import hashlib
from collections.abc import Callable
from math import ceil
from pathlib import Path

from bitdistiller import autoclip_run, clip_file, objectives, plan, result, student, train_examples
from harness import distributed, modules, precision
from harness.blocks import preflight
from harness.blocks.decoder import Decoder
from harness.checkpoint import card, hashes, load, runs
from harness.checkpoint.load import window_length
from harness.checkpoint.weights import Weights
from harness.data import corpora, example_sets
from harness.errors import UserError
from harness.losses import from_hidden
from harness.modules import block_linears, find_blocks
from harness.quant.scheme import Scheme
from harness.settings import record
from harness.training import batching, engine, loop, teacher_cache, validation

# What may differ when a killed run goes on: the rest changes the result. Of the batch's sizes only
# their product counts.
FREE = (
    "model", "model_name_or_path", "out", "resume", "overwrite", "dry_run", "device", "local_rank",
    "save_steps", "gradient_checkpointing", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
# Of these the content counts, not the name.
HASHED = ("clip", "start", "teacher_cache")


@engine.memory_knobs()
def run(settings) -> dict | None:
    """What the command does with a `bitdistiller.train.Settings`, on every rank.

    Returns:
        As :func:`harness.training.loop.train`; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    settings = settings.completed()
    grid = autoclip_run.make_grid(*settings.grid())
    device = engine.launch(load.pick_device(settings.device))
    out, source = Path(settings.out), load.resolve(settings.model)
    config = load.load_config(source)
    runs.claim(out, source, settings.overwrite, settings.dry_run)
    result.check_dense(source)
    ranges = _ranges(settings, source, grid)
    tokenizer = load.load_tokenizer(source)
    longest = train_examples.length(settings.model_max_length, config)
    # cache_teacher knows nothing of what is looked at: it leaves out the parts held out, always.
    alone = bool(settings.eval_data or settings.ppl) and not settings.teacher_cache
    examples = train_examples.read(settings, tokenizer, longest, "train", alone)
    look_at = _look_at(settings, tokenizer, config, longest)
    sets = [s for s in (examples, look_at) if isinstance(s, example_sets.Examples)]
    example_sets.check_tokens(sets, config)
    stored = _cache(settings, source, config, examples)
    training = _training(settings, len(examples))
    stored_dtype = Weights(source).dtype
    dtype = precision.choose_for_training(settings.dtype, stored_dtype, device, settings.model)
    if settings.dry_run:
        plan.show(settings, source, grid, training, dtype, stored_dtype)
        return None

    def dense(where: str):
        loaded = load.load_model(source, device=where, dtype=dtype)
        modules.ignore(*find_blocks(loaded), settings.ignore)
        return loaded

    def quantized(where: str):
        return student.build(
            dense(where), grid, ranges=ranges, learn=settings.learn, dtype=stored_dtype,
            start=settings.start and Path(settings.start),
        )  # fmt: skip

    pupil = quantized(device)
    beside = student.beside_the_grids(pupil)
    taught = settings.kd_loss_type != "ce" and stored is None
    teacher = dense(device).eval().requires_grad_(False) if taught else None
    if taught and settings.zero < 3:  # at 3 the engine takes the student's tensors apart
        student.share(pupil, teacher)
    collate = train_examples.collate(examples, tokenizer, settings.original_loss, stored)

    def batches(step: int) -> list[dict]:
        return [collate(micro) for micro in batching.deal(examples.lengths, step, training)]

    objective, beta = _objective(settings, teacher, stored, batches)

    def finish(tensors):
        pupil = loop.put_in(quantized("cpu"), tensors)
        return _finish(pupil, Path(settings.start or source), beside, dtype, stored_dtype)

    recorded = _record(settings) | {
        "bits": grid.bits, "learning_rate": training.learning_rate, "steps": training.steps,
        "dtype": precision.name(dtype), "model_max_length": longest,
        "processes": distributed.world_size(), **({} if beta is None else {"beta": beta}),
    }  # fmt: skip
    return loop.train(
        pupil.train(), training, batches=batches, loss_of=objective, out=out,
        identity=_identity(settings, source, training, dtype, examples, look_at, stored),
        step_entry=card.training_step(
            "bitdistiller", settings, recorded, dataset=settings.data, nsamples=len(examples),
            seqlen=longest,
        ), source=source,
        evaluate=_evaluate(
            settings, look_at, tokenizer, validation.label_loss if stored else objective
        ),
        eval_steps=settings.eval_steps or max(1, len(examples) // batching.batch_size(training)),
        save_steps=settings.save_steps, stored=beside, finish=finish, resume=settings.resume,
        overwrite=settings.overwrite,
    )  # fmt: skip


def _finish(pupil, start: Path, beside: list[str], dtype, stored_dtype):
    """The plain model of a trained student that began as ``start``, and the file beside it."""
    model, side, note = result.finish(pupil)
    if not precision.holds(dtype, stored_dtype):
        # What was not trained has lost digits.
        names = [*beside, *(f"{name}.weight" for name in block_linears(*find_blocks(model)))]
        trained = {name: model.get_parameter(name) for name in names}
        model = loop.put_in(loop.source_model(start), trained)
    return precision.cast(model, stored_dtype), {result.FILE: (side, note)}


def _ranges(settings, source: Path, grid) -> student.Ranges | None:
    """Those of --clip; what the student cannot be is refused here, before data is read."""
    decoder = Decoder(source, sizes_only=True)
    decoder.ignore(settings.ignore)
    preflight.check(decoder, Scheme(grid), "dense", Path(settings.out))
    ranges = clip_file.read(settings.clip, source, grid) if settings.clip else None
    start = Path(settings.start) if settings.start else None
    student.check(decoder.model, grid, ranges=ranges, learn=settings.learn, start=start)
    return ranges


def _look_at(settings, tokenizer, config, longest: int):
    """What a look is at: --ppl's windows int64 [N, T], or the held-out examples."""
    if not settings.ppl:
        return train_examples.read(
            settings, tokenizer, longest, "validation", bool(settings.eval_data)
        )
    return corpora.evaluation(
        tokenizer, settings.ppl, seqlen=window_length(config), limit=settings.ppl_limit
    )


def _evaluate(settings, look_at, tokenizer, loss_of: Callable) -> Callable:
    """(engine, step) -> the values of a look."""

    def perplexity(running, step: int) -> dict:
        value = validation.perplexity(running, look_at)
        return {"value": value, "perplexity": value}

    if settings.ppl:
        return perplexity
    collate = train_examples.collate(look_at, tokenizer, settings.original_loss)
    size = settings.per_device_eval_batch_size or settings.per_device_train_batch_size

    def held_out(running, step: int) -> dict:
        means = validation.held_out(running, len(look_at), collate, loss_of, batch=size)
        named = {f"validation_{name}": value for name, value in means.items()}
        return {"value": means["loss"], **named}

    return held_out


def _cache(settings, source: Path, config, examples) -> teacher_cache.Cache | None:
    if not settings.teacher_cache:
        return None
    vocabulary = config.get_text_config().vocab_size
    stored = teacher_cache.Cache(settings.teacher_cache, examples, vocabulary)
    if stored.identity["teacher_files"] != hashes.model_files(source):
        raise UserError(
            f"{settings.teacher_cache} holds the probabilities of another model than "
            f"{settings.model}; make one of this model with python -m bitdistiller.cache_teacher."
        )
    return stored


def _training(settings, count: int) -> engine.Training:
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    batch *= distributed.world_size()
    steps = settings.max_steps or max(1, ceil(settings.num_train_epochs * count / max(1, batch)))
    training = engine.Training(
        settings.learning_rate, steps, settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps, settings.warmup_steps, settings.lr_scheduler_type,
        weight_decay=settings.weight_decay, clip=settings.max_grad_norm, zero=settings.zero,
        offload=settings.offload, gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
    )  # fmt: skip
    distributed.say(
        f"{settings.kd_loss_type} of {settings.model}: {steps} steps of {batch} examples, "
        f"{steps * batch / count:.3g} epochs, learning rate {settings.learning_rate:.3g}"
    )
    return training


def _objective(settings, teacher, stored, batches) -> tuple[Callable, float | None]:
    """The loss, and beta where it has one."""
    if settings.kd_loss_type == "ce":
        return validation.label_loss, None
    # The student has the teacher's head, and what is said of one is true of both.
    fused = teacher is not None and from_hidden.fusable(teacher, settings.zero)
    beta = None
    if settings.kd_loss_type == "cakld":
        beta = settings.beta
        if beta is None:
            first = (batch for step in range(settings.cakld_steps) for batch in batches(step))
            beta = objectives.confidence(teacher, first, fused)
        distributed.say(f"cakld: beta {beta:.4f}")
    rows = objectives.row_function(settings.kd_loss_type, beta)
    if stored:
        return objectives.from_cache(rows, stored.vocabulary), beta
    return objectives.from_teacher(teacher, rows, fused), beta


def _record(settings) -> dict:
    """The flags that count; what another has replaced does not."""
    without = {*FREE, "bf16", "train_kd", "num_train_epochs" if settings.max_steps else None}
    if settings.kd_loss_type != "cakld" or settings.beta is not None:
        without.add("cakld_steps")
    if settings.ppl:
        without.add("max_eval_samples")
    if not settings.ignore:
        without.add("ignore")
    return record(settings, without)


def _identity(settings, source: Path, training, dtype, examples, look_at, stored) -> dict:
    recorded = _record(settings) | {
        "steps": training.steps, "batch": batching.batch_size(training),
        "dtype": precision.name(dtype),
    }  # fmt: skip
    for name in HASHED:
        recorded.pop(name, None)
    identity = runs.fingerprint(source, None, recorded)
    looked = hashlib.sha256(look_at.numpy()).hexdigest()[:16] if settings.ppl else look_at.key
    identity["data"] = {"training": examples.key, "looked at": looked}
    # None too: a run without them is another run.
    identity |= dict.fromkeys(HASHED)
    if settings.clip:
        identity["clip"] = hashes.file_hash(clip_file.locate(settings.clip))
    if settings.start:
        folder = Path(settings.start)
        grids = {result.FILE: hashes.file_hash(folder / result.FILE)}
        identity["start"] = hashes.model_files(folder) | grids
    if stored:
        identity["teacher_cache"] = stored.identity
    return identity
