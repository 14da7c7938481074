"""Quantization-aware self-distillation: check, load teacher and student, choose the loss, train
(harness.training.loop)."""

import hashlib
from collections.abc import Callable
from math import ceil, inf
from pathlib import Path

from bitdistiller import autoclip_run, clip_file, objectives, result, student, train_examples
from harness import distributed, modules, precision
from harness.blocks import preflight
from harness.blocks.decoder import Decoder
from harness.checkpoint import card, hashes, load, runs
from harness.checkpoint.load import window_length
from harness.checkpoint.weights import Weights
from harness.data import corpora, example_sets
from harness.errors import UserError
from harness.losses import from_hidden
from harness.modules import find_blocks
from harness.training import batching, engine, loop, teacher_cache, validation

ORIGINAL_NAMES = {"int2-asym": ("int", 2), "ste-n2f3": ("nf3", 3)}
# What may differ when a killed run goes on: the rest changes the result. Of the batch's sizes only
# their product counts.
FREE = (
    "model", "model_name_or_path", "out", "resume", "overwrite", "dry_run", "device", "local_rank",
    "save_steps", "gradient_checkpointing", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
# Of these the content counts, not the name.
HASHED = ("clip", "start", "teacher_cache")
POSITIVE = (
    "num_train_epochs", "max_steps", "max_train_samples", "max_eval_samples", "cakld_steps",
    "eval_steps", "save_steps", "ppl_limit", "per_device_eval_batch_size",
)  # fmt: skip
NOT_NEGATIVE = ("warmup_steps", "weight_decay", "max_grad_norm")


@engine.memory_knobs()
def train(args) -> dict | None:
    """Run the command ``bitdistiller.train`` with its parsed arguments, on every rank.

    Returns:
        As :func:`harness.training.loop.train`; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    grid = _check(args)
    device = engine.launch(load.pick_device(args.device))
    out, source = Path(args.out), load.resolve(args.model)
    config = load.load_config(source)
    runs.claim(out, source, args.overwrite, args.dry_run)
    result.check_dense(source)
    ranges = _ranges(args, source, grid)
    tokenizer = load.load_tokenizer(source)
    longest = train_examples.length(args.model_max_length, config)
    # cache_teacher knows nothing of what is looked at: it leaves out the parts held out, always.
    alone = bool(args.eval_data or args.ppl) and not args.teacher_cache
    examples = train_examples.read(args, tokenizer, longest, "train", alone)
    look_at = _look_at(args, tokenizer, config, longest)
    sets = [s for s in (examples, look_at) if isinstance(s, example_sets.Examples)]
    example_sets.check_tokens(sets, config)
    stored = _cache(args, source, config, examples)
    training = _training(args, len(examples))
    stored_dtype = Weights(source).dtype
    dtype = precision.choose_for_training(args.dtype, stored_dtype, device, args.model)
    if args.dry_run:
        from bitdistiller import plan

        plan.show(args, source, grid, training, dtype, stored_dtype)
        return None

    def dense(where: str):
        loaded = load.load_model(source, device=where, dtype=dtype)
        modules.ignore(*find_blocks(loaded), args.ignore)
        return loaded

    start = Path(args.start) if args.start else None

    def quantized(where: str):
        return student.build(
            dense(where), grid, ranges=ranges, learn=args.learn, dtype=stored_dtype, start=start
        )

    pupil = quantized(device)
    beside = student.beside_the_grids(pupil)
    teacher = None
    if args.kd_loss_type != "ce" and stored is None:
        teacher = dense(device).eval().requires_grad_(False)
        if args.zero < 3:
            # At stage 3 the engine takes the student's tensors apart.
            student.share(pupil, teacher)
    collate = train_examples.collate(examples, tokenizer, args.original_loss, stored)

    def batches(step: int) -> list[dict]:
        return [collate(micro) for micro in batching.deal(examples.lengths, step, training)]

    identity = _identity(args, source, training, dtype, examples, look_at, stored)
    objective, beta = _objective(args, teacher, stored, batches)
    evaluate = _evaluate(args, look_at, tokenizer, validation.label_loss if stored else objective)

    def finish(tensors):
        model, side, note = result.finish(loop.put_in(quantized("cpu"), tensors))
        if not precision.holds(dtype, stored_dtype):
            # What was not trained has lost digits.
            names = [*beside, *(f"{name}.weight" for name in student.find_linears(model))]
            trained = {name: model.get_parameter(name) for name in names}
            model = loop.put_in(loop.source_model(start or source), trained)
        return precision.cast(model, stored_dtype), {result.FILE: (side, note)}

    shown = {"bits": grid.bits, "learning_rate": training.learning_rate, "steps": training.steps}
    shown |= {
        "dtype": precision.name(dtype),
        "model_max_length": longest,
        "processes": distributed.world_size(),
    }
    step_entry = {
        "method": "bitdistiller", "base": args.model, "command": card.command_line(),
        "settings": _settings(args) | shown | ({} if beta is None else {"beta": beta}),
        "training": {
            "dataset": args.data, "nsamples": len(examples), "seqlen": longest, "seed": args.seed,
        },
    }  # fmt: skip
    return loop.train(
        pupil.train(), training, batches=batches, loss_of=objective, out=out, identity=identity,
        step_entry=step_entry, source=source, evaluate=evaluate,
        eval_steps=args.eval_steps or max(1, len(examples) // batching.batch_size(training)),
        save_steps=args.save_steps, stored=beside, finish=finish, resume=args.resume,
        overwrite=args.overwrite,
    )  # fmt: skip


def _check(args):
    """Fill in what depends on other flags, refuse what does not go together; returns the grid."""
    if args.model and args.model_name_or_path:
        raise UserError("MODEL and --model_name_or_path: give one of the two.")
    args.model = args.model or args.model_name_or_path
    if not args.model:
        raise UserError("no model is named; give MODEL (or --model_name_or_path).")
    kind, bits = ORIGINAL_NAMES.get(args.quant_type, (args.quant_type, args.bits))
    if args.bits not in (None, bits):
        raise UserError(f"--bits {args.bits}: {args.quant_type} has {bits}; use --quant_type int.")
    grid = autoclip_run.make_grid(bits, args.q_group_size, kind)
    args.out = args.out or f"{Path(args.model).name}-qat-w{grid.bits}"
    args.learn = args.learn or ("scales" if args.start else "weights")
    if args.bf16:
        if args.dtype not in ("auto", "bfloat16"):
            raise UserError(f"--bf16 and --dtype {args.dtype}: give one of the two.")
        args.dtype = "bfloat16"
    if not args.train_kd:
        args.kd_loss_type = "ce"
    args.train_on_inputs |= args.original_loss
    if args.kd_loss_type == "ce" and args.teacher_cache:
        raise UserError("--kd_loss_type ce has no teacher; leave --teacher_cache out.")
    if args.beta is not None and args.kd_loss_type != "cakld":
        raise UserError(f"--kd_loss_type {args.kd_loss_type} has no beta; leave --beta out.")
    if args.beta is not None and not 0 <= args.beta <= 1:
        raise UserError(f"--beta {args.beta}: expected 0 to 1.")
    if args.ppl and args.eval_data:
        raise UserError("--ppl and --eval_data: a look is at one of the two; leave the other out.")
    if args.ppl_limit is not None and not args.ppl:
        raise UserError("--ppl_limit counts windows of --ppl; give --ppl TEXT, or leave it out.")
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < inf:
            raise UserError(f"--{name} {value}: expected a number above 0.")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(args, name) < inf:
            raise UserError(f"--{name} {getattr(args, name)}: expected 0 or more.")
    return grid


def _ranges(args, source: Path, grid) -> student.Ranges | None:
    """Those of --clip; what the student cannot be is refused here, before data is read."""
    decoder = Decoder(source, sizes_only=True)
    decoder.ignore(args.ignore)
    preflight.check(decoder, grid, "dense", Path(args.out))
    ranges = clip_file.read(args.clip, source, grid) if args.clip else None
    start = Path(args.start) if args.start else None
    student.check(decoder.model, grid, ranges=ranges, learn=args.learn, start=start)
    return ranges


def _look_at(args, tokenizer, config, longest: int):
    """What a look is at: --ppl's windows int64 [N, T], or the held-out examples."""
    if not args.ppl:
        return train_examples.read(args, tokenizer, longest, "validation", bool(args.eval_data))
    return corpora.evaluation(
        tokenizer, args.ppl, seqlen=window_length(config), limit=args.ppl_limit
    )


def _evaluate(args, look_at, tokenizer, loss_of: Callable) -> Callable:
    """(engine, step) -> the values of a look."""

    def perplexity(running, step: int) -> dict:
        value = validation.perplexity(running, look_at)
        return {"value": value, "perplexity": value}

    if args.ppl:
        return perplexity
    collate = train_examples.collate(look_at, tokenizer, args.original_loss)
    size = args.per_device_eval_batch_size or args.per_device_train_batch_size

    def held_out(running, step: int) -> dict:
        found = validation.held_out(running, len(look_at), collate, loss_of, batch=size)
        named = {f"validation_{name}": value for name, value in found.items()}
        return {"value": found["loss"], **named}

    return held_out


def _cache(args, source: Path, config, examples) -> teacher_cache.Cache | None:
    if not args.teacher_cache:
        return None
    known = config.get_text_config().vocab_size
    stored = teacher_cache.Cache(args.teacher_cache, examples, known)
    if stored.identity["teacher_files"] != hashes.model_files(source):
        raise UserError(
            f"{args.teacher_cache} holds the probabilities of another model than {args.model}; "
            "make one of this model with python -m bitdistiller.cache_teacher."
        )
    return stored


def _training(args, count: int) -> engine.Training:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batch *= distributed.world_size()
    steps = args.max_steps or max(1, ceil(args.num_train_epochs * count / max(1, batch)))
    made = engine.Training(
        args.learning_rate, steps, args.per_device_train_batch_size,
        args.gradient_accumulation_steps, args.warmup_steps, args.lr_scheduler_type,
        weight_decay=args.weight_decay, clip=args.max_grad_norm, zero=args.zero,
        offload=args.offload, gradient_checkpointing=args.gradient_checkpointing, seed=args.seed,
    )  # fmt: skip
    distributed.say(
        f"{args.kd_loss_type} of {args.model}: {steps} steps of {batch} examples, "
        f"{steps * batch / count:.3g} epochs, learning rate {args.learning_rate:.3g}"
    )
    return made


def _objective(args, teacher, stored, batches) -> tuple[Callable, float | None]:
    """The loss, and beta where it has one."""
    if args.kd_loss_type == "ce":
        return validation.label_loss, None
    # The student has the teacher's head, and what is said of one is true of both.
    fused = teacher is not None and from_hidden.fusable(teacher, args.zero)
    beta = None
    if args.kd_loss_type == "cakld":
        beta = args.beta
        if beta is None:
            first = (batch for step in range(args.cakld_steps) for batch in batches(step))
            beta = objectives.confidence(teacher, first, fused)
        distributed.say(f"cakld: beta {beta:.4f}")
    rows = objectives.row_function(args.kd_loss_type, beta)
    if stored:
        return objectives.from_cache(rows, stored.vocabulary), beta
    return objectives.from_teacher(teacher, rows, fused), beta


def _settings(args) -> dict:
    """The flags that count; what another has replaced does not."""
    without = {*FREE, "bf16", "train_kd", "num_train_epochs" if args.max_steps else None}
    if args.kd_loss_type != "cakld" or args.beta is not None:
        without.add("cakld_steps")
    if args.ppl:
        without.add("max_eval_samples")
    without |= set() if args.ignore else {"ignore"}
    return {k: v for k, v in vars(args).items() if k not in without and v is not None}


def _identity(args, source: Path, training, dtype, examples, look_at, stored) -> dict:
    settings = _settings(args) | {
        "steps": training.steps, "batch": batching.batch_size(training),
        "dtype": precision.name(dtype),
    }  # fmt: skip
    for name in HASHED:
        settings.pop(name, None)
    identity = runs.fingerprint(source, None, settings)
    looked = hashlib.sha256(look_at.numpy()).hexdigest()[:16] if args.ppl else look_at.key
    identity["data"] = {"training": examples.key, "looked at": looked}
    # None too: a run without them is another run.
    identity |= dict.fromkeys(HASHED)
    if args.clip:
        identity["clip"] = hashes.file_hash(clip_file.locate(args.clip))
    if args.start:
        folder = Path(args.start)
        grids = {result.FILE: hashes.file_hash(folder / result.FILE)}
        identity["start"] = hashes.model_files(folder) | grids
    if stored:
        identity["teacher_cache"] = stored.identity
    return identity
