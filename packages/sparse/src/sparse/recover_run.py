"""Bring back what pruning cost: check, load, choose what is trained, train (training.loop)."""

from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from harness import distributed, precision
from harness.checkpoint import card, hashes, layouts, load, runs
from harness.checkpoint.load import context_length, example_length
from harness.checkpoint.weights import Weights
from harness.data import example_sets
from harness.errors import UserError
from harness.losses import from_hidden
from harness.losses.divergence import jsd_rows, kl_rows, reverse_kl_rows
from harness.metrics.footprint import linear_shapes, stored_size
from harness.modules import block_linears, find_blocks
from harness.quant import masks
from harness.settings import record
from harness.training import batching, distillation, engine, loop, lora, validation
from harness.training.cost import model_bytes, print_plan, training_cost

# What does not change the result; the rest of the flags is what a resumed run must repeat.
FREE = (
    "model", "out", "resume", "overwrite", "dry_run", "device", "local_rank", "save_steps",
    "micro_batch_size", "gradient_checkpointing",
)  # fmt: skip
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
DIVERGENCES = {"forward_kl": kl_rows, "reverse_kl": reverse_kl_rows, "jsd": jsd_rows}


class Usual(NamedTuple):
    """What is taken where nothing is said. ``rates`` are at RATES_WIDTH."""

    batch_size: int
    cutoff_len: int
    val_set_size: int
    max_train_samples: int | None
    rates: dict[str, float]


# LLM-Pruner's published setting is for instructions, LoRA and models 4,096 wide; its code's default
# rate of 3e-4 serves text, where short runs gain by it (measured, as full tuning's rates are). The
# best rate of Adam falls as the width grows (Yang et al., arXiv 2203.03466): others are scaled.
RATES_WIDTH = 4096
INSTRUCTIONS = Usual(64, 256, 2000, None, {"lora": 1e-4, "full": 2e-5})
TEXT = Usual(8, 1024, 32, 30_000, {"lora": 3e-4, "full": 6e-5})


@engine.memory_knobs()
def run(settings) -> dict | None:
    """What the command does with a `sparse.recover.Settings`, on every rank.

    Returns:
        As :func:`harness.training.loop.train`, and "teacher", its validation loss or None; losses
        are in nats per token. None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    settings = settings.completed()
    device = engine.launch(load.pick_device(settings.device))
    source, out = load.resolve(settings.model), Path(settings.out)
    config = load.load_config(source)
    weights = Weights(source)
    dtype = precision.choose_for_training(settings.dtype, weights.dtype, device, settings.model)
    runs.claim(out, source, settings.overwrite, settings.dry_run)
    _check_layout(weights, settings.model)
    columns = settings.teacher and distillation.shared_columns(settings.teacher, settings.model)
    usual = TEXT if example_sets.is_text(settings.dataset) else INSTRUCTIONS
    longest = example_length(
        "--cutoff_len", settings.cutoff_len, usual.cutoff_len, context_length(config)
    )
    tokenizer = load.load_tokenizer(source)
    train, held = (
        example_sets.read(
            tokenizer, settings.dataset, part, length=longest, limit=limit,
            train_on_inputs=settings.train_on_inputs,
        )
        for part, limit in (
            ("train", settings.max_train_samples or usual.max_train_samples),
            ("validation", settings.val_set_size or usual.val_set_size),
        )
    )  # fmt: skip
    example_sets.check_tokens([train, held], config)
    training = _training(settings, usual, len(train), config.get_text_config().hidden_size)
    if settings.dry_run:
        _print_plan(settings, source, training, dtype, weights.dtype)
        return None

    student = load.load_model(source, device=device, dtype=dtype)
    objective, teacher_loss = validation.label_loss, None
    size, pad = settings.micro_batch_size, batching.pad_id(tokenizer)

    def look(running, step: int) -> dict:
        loss = validation.held_out_loss(running, held, batch=size, pad=pad)
        return {"value": loss, "validation_loss": loss}

    if settings.teacher:
        kept = torch.float32 if dtype == torch.float32 else "auto"
        teacher = load.load_model(settings.teacher, device=device, dtype=kept)
        teacher.eval().requires_grad_(False)
        teacher_loss = look(teacher, 0)["value"]
        distributed.say(f"teacher: validation loss {teacher_loss:.4f}")
        fused = from_hidden.fusable(student, settings.zero) and from_hidden.fusable(teacher)
        rows = partial(
            from_hidden.mix_rows, rows=DIVERGENCES[settings.kd_loss], kd_ratio=settings.kd_weight
        )
        objective = partial(distillation.over_labels, teacher, rows, columns, fused)
    identity = _identity(settings, source, training, dtype, train, held)
    student, finish = _trainable(student, settings, source, weights.dtype)

    def batches(step: int) -> list[dict]:
        chosen = batching.deal(train.lengths, step, training)
        return [batching.collate([train[i] for i in micro], pad) for micro in chosen]

    result = loop.train(
        student.train(), training, batches=batches, loss_of=objective, out=out, identity=identity,
        step_entry=card.training_step(
            "recover", settings, _record(settings, training, dtype), dataset=settings.dataset,
            nsamples=len(train), seqlen=longest,
        ),
        source=source, evaluate=look, eval_steps=settings.eval_steps, patience=settings.patience,
        save_steps=settings.save_steps, stored=[] if finish else None, finish=finish,
        keep_zeros=not settings.densify, resume=settings.resume, overwrite=settings.overwrite,
    )  # fmt: skip
    if result["best_step"] == 0:
        distributed.say("no look found a better loss than before: the model is written unchanged")
    return result | {"teacher": teacher_loss}


def _check_layout(weights: Weights, model: str) -> None:
    if weights.layout in layouts.PACKED:
        raise UserError(
            f"{model} is quantized ({weights.layout}), and training would undo that; recover the "
            "pruned model first and quantize the result."
        )
    if layouts.of(weights.layout).MARK:
        distributed.say(
            f"{model} is stored as {weights.layout}; the result is written dense (harness convert "
            f"--format {weights.layout} packs it again)"
        )


def _training(settings, usual: Usual, count: int, width: int) -> engine.Training:
    """How long, how fast, in what batches, for ``count`` examples and a model so wide."""
    ranks = distributed.world_size()
    batch = min(settings.batch_size or usual.batch_size, count)
    if batch < ranks:
        raise UserError(f"{batch} examples per step are too few for {ranks} processes; use fewer.")
    forwards = min(ceil(batch / (settings.micro_batch_size * ranks)), batch // ranks)
    steps = max(1, ceil(settings.num_epochs * count / batch))
    steps = min(steps, settings.max_steps or steps)
    rate = settings.learning_rate or usual.rates[settings.tune] * RATES_WIDTH / width
    training = engine.Training(
        rate, steps, ceil(batch / (forwards * ranks)), forwards,
        min(settings.warmup_steps, max(1, steps // 10)), "linear", weight_decay=0.0,
        zero=settings.zero, offload=settings.offload,
        gradient_checkpointing=settings.gradient_checkpointing, seed=settings.seed, batch=batch,
        minutes=settings.max_minutes,
    )  # fmt: skip
    line = f"{steps} steps of {batch} examples"
    line += f" or {settings.max_minutes:g} minutes" if settings.max_minutes else ""
    line += f", dealt to {ranks} processes" if ranks > 1 else ""
    line += f", learning rate {rate:.3g}"
    if not settings.learning_rate and width != RATES_WIDTH:
        line += f" ({usual.rates[settings.tune]:.0e} at width {RATES_WIDTH}, this one has {width})"
    distributed.say(f"{line}, {training.warmup} steps of warm-up")
    return training


def _trainable(student, settings, source: Path, stored: torch.dtype) -> tuple[object, Callable]:
    """``student`` as it is trained, and what makes the plain model of its trained tensors, if that
    is more than putting them in.

    Raises:
        UserError: LoRA would fill a sparse model's zeros, or a target is not there.
    """
    if settings.tune == "full":
        return student, None
    masks.ask_before_merging(student, settings.model, settings.densify, "use --tune full")
    wanted = settings.lora_target_modules
    options = {
        "targets": lora.choose_targets(
            list(block_linears(*find_blocks(student))), wanted.split(",") if wanted else None
        ),
        "r": settings.lora_r, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout,
        "seed": settings.seed,
    }  # fmt: skip

    def finish(tensors):
        return lora.merged(load.load_model(source, dtype=torch.float32), tensors, stored, **options)

    return lora.add(student, **options), finish


def _record(settings, training, dtype) -> dict:
    """The flags that count, with what their defaults came to."""
    without = {*FREE, *(LORA if settings.tune == "full" else ())}
    without |= set() if settings.teacher else {"kd_loss", "kd_weight"}
    return record(settings, without) | {
        "learning_rate": training.learning_rate, "steps": training.steps,
        "batch_size": training.batch, "warmup_steps": training.warmup,
        "dtype": precision.name(dtype),
    }  # fmt: skip


def _identity(settings, source: Path, training, dtype, train, held) -> dict:
    identity = runs.fingerprint(source, None, _record(settings, training, dtype))
    identity["data"] = {"training": train.key, "validation": held.key}
    if settings.teacher:
        identity["teacher"] = hashes.model_files(load.resolve(settings.teacher))
    return identity


def _print_plan(settings, source: Path, training, dtype, stored: torch.dtype) -> None:
    """--dry-run: what training takes, activations aside."""
    count = stored_size(source, load.load_config(source)).parameters
    shapes = [s for n, s in linear_shapes(source).items() if "embed" not in n and "head" not in n]
    adapters = sum(settings.lora_r * (rows + columns) for rows, columns in shapes)
    trained = count if settings.tune == "full" else adapters
    print_plan(
        f"recover ({settings.tune}): {trained / 1e6:.2f} of {count / 1e6:.2f} M parameters, "
        f"{precision.name(dtype)} -> {settings.out}",
        training_cost(count, trained, dtype.itemsize, stored.itemsize, training.zero),
        f"{training.micro_batch} examples",
        model_bytes(settings.teacher, dtype.itemsize) if settings.teacher else 0,
    )
