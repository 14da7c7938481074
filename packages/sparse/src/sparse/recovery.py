"""Bring back what pruning cost: load, choose what is trained, train, write the best."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.errors import UserError, nearest
from harness.perplexity import context_length
from harness.save import save_model

from harness import checkpoint, distributed, training_data, writer
from sparse import losses, tuning
from sparse.training import Diverged, Plan, held_out_loss, target_count, train
from sparse.training_state import Store

# Published for models 4,096 wide; the best rate of Adam falls as the width grows (Yang et al.,
# arXiv 2203.03466), which is why it is scaled for others. Full tuning is ours.
RATES = {"lora": 1e-4, "full": 2e-5}
RATES_WIDTH = 4096
INSTRUCTIONS = {"batch_size": 64, "cutoff_len": 256, "val_set_size": 2000}
TEXT = {"batch_size": 8, "cutoff_len": 1024, "val_set_size": 32}
TEXT_EXAMPLES = 30_000
SELF_TEST = "def f(x):\n    return 'Ünïcode', [x + 1, 2e-3]  # 日本 <s> </s>\n\n\tThe end."


@dataclass
class Result:
    """Losses are in nats per token on the validation examples: of the pruned model, of the one
    written and, where there is one, of the teacher."""

    before: float
    after: float
    teacher: float | None
    step: int
    steps: int
    tokens: int
    seconds: float
    rows: list[dict]


def recover(
    model: str,
    dataset: str,
    *,
    out: str | Path,
    tune: str = "lora",
    teacher: str | None = None,
    kd_loss: str = "forward_kl",
    kd_weight: float = 0.5,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_target_modules: list[str] | None = None,
    num_epochs: float = 2,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    micro_batch_size: int = 4,
    cutoff_len: int | None = None,
    val_set_size: int | None = None,
    max_train_samples: int | None = None,
    warmup_steps: int = 100,
    train_on_inputs: bool = False,
    max_steps: int | None = None,
    max_minutes: float | None = None,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    patience: int = 3,
    gradient_checkpointing: bool = False,
    densify: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "sparse.recovery.recover(...)",
) -> Result | None:
    """Tune the pruned checkpoint ``model`` on ``dataset`` and write the best one seen to ``out``.

    Args:
        tune: "lora" (merged at the end) or "full". teacher: the dense model to distil from.
        kd_weight: the divergence's part of the loss, the rest is cross entropy.
        batch_size: examples per step over all ranks. micro_batch_size: of them at a time.
        cutoff_len: tokens per example; longer ones are cut.
        max_minutes: the learning rate then falls with the clock, and the bytes of the result depend
            on the machine.
        eval_steps, save_steps: default: ten looks at the validation loss, a save at each.
        patience: stop after so many looks without a better loss; 0 never.
        densify: let LoRA fill the zeros of a sparse model.

    Returns:
        The losses before and after; None with ``dry_run``.

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    _check_numbers(locals())
    out = Path(out)
    device = distributed.start(checkpoint.pick_device(device))
    folder = checkpoint.resolve(model)
    config = checkpoint.load_config(folder)
    weights = checkpoint.Weights(folder)
    stored = weights.dtype
    compute = _compute_dtype(dtype, stored)
    if weights.layout in ("compressed-tensors", "gptq"):
        raise UserError(
            f"{model} is quantized ({weights.layout}), and training would undo that; recover the "
            "pruned model first and quantize the result."
        )
    if out.exists() and out.samefile(folder):
        raise UserError(f"{out} is the model itself; choose another --out.")
    if not dry_run:
        writer.check_out(out, overwrite)
    tokenizer = checkpoint.load_tokenizer(folder)
    teacher_folder = _check_teacher(teacher, tokenizer, config) if teacher else None

    kind = INSTRUCTIONS if training_data.is_instructions(dataset) else TEXT
    limit = max_train_samples or (TEXT_EXAMPLES if kind is TEXT else None)
    seqlen = _length(cutoff_len, kind["cutoff_len"], config)
    data, held = training_data.load(
        tokenizer, dataset, seqlen=seqlen, held_out=val_set_size or kind["val_set_size"],
        limit=limit, train_on_inputs=train_on_inputs, seed=seed,
    )  # fmt: skip
    _check_tokens(data, config)
    batch = min(batch_size or kind["batch_size"], len(data))
    steps = max(1, math.ceil(num_epochs * len(data) / batch))
    steps = min(steps, max_steps or steps)
    width = config.get_text_config().hidden_size
    rate = learning_rate or RATES[tune] * RATES_WIDTH / width
    plan = Plan(
        steps, batch, micro_batch_size, rate, min(warmup_steps, max(1, steps // 10)), max_minutes,
        eval_steps, save_steps, patience, seed,
    )  # fmt: skip
    settings = {
        "tune": tune, "dataset": dataset, "teacher": teacher, "learning_rate": rate,
        "num_epochs": num_epochs, "max_steps": max_steps, "max_minutes": max_minutes,
        "batch_size": batch, "micro_batch_size": micro_batch_size, "cutoff_len": seqlen,
        "warmup_steps": plan.warmup, "val_set_size": len(held), "train_on_inputs": train_on_inputs,
        "eval_steps": eval_steps, "patience": patience, "dtype": str(compute), "seed": seed,
        "densify": densify, "gradient_checkpointing": gradient_checkpointing,
    }  # fmt: skip
    if tune == "lora":
        settings |= {
            "lora_r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
            "lora_target_modules": lora_target_modules,
        }  # fmt: skip
    if teacher:
        settings |= {"kd_loss": kd_loss, "kd_weight": kd_weight}
    distributed.say(_describe(plan, data, held, learning_rate, tune, width))

    # LoRA keeps the frozen weights as they are stored; what is trained is float32.
    whole = tune == "full" or compute == torch.float32
    name = "float32" if whole else str(stored).removeprefix("torch.")
    if dry_run:
        _print_plan(folder, out, tune, lora_r, stored, whole, teacher_folder)
        return None
    identity = writer.fingerprint(folder, _all_ids(data + held), {"method": "recover", **settings})
    if teacher_folder:
        identity["teacher"] = writer.fingerprint(teacher_folder, None, {})["model"]
    student = checkpoint.load_model(folder, device=device, dtype=name)
    masks = _zeros(student, model, tune, densify)
    if tune == "full":
        parameters = tuning.train_all(student)
    else:
        names = list(tuning.block_linears(student))
        targets = tuning.choose_targets(names, lora_target_modules)
        parameters = tuning.add_lora(
            student, targets, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, seed=seed
        )
    trained = sum(p.numel() for p in parameters.values())
    distributed.say(f"{tune}: {trained / 1e6:.2f} M parameters are trained")
    if gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    loss, teacher_loss = losses.cross_entropy, None

    def look(some=student) -> float:
        return held_out_loss(some, held, losses.cross_entropy, micro_batch_size, compute)

    if teacher_folder:
        kept = "float32" if compute == torch.float32 else "auto"
        dense = checkpoint.load_model(teacher_folder, device=device, dtype=kept)
        dense.requires_grad_(False)
        loss = losses.distillation(dense, kd_loss, kd_weight, compute)
        teacher_loss = look(dense)
        distributed.say(f"teacher: validation loss {teacher_loss:.4f}")

    store = Store(out, identity, overwrite=overwrite, resume=resume)
    start = time.perf_counter()
    try:
        progress = train(student, parameters, masks, data, loss, look, plan, compute, store)
    except Diverged:
        distributed.lead(store.forget)  # the same command would end here again
        raise
    store.load_best(progress.best_step, parameters)
    if progress.best_step == 0:
        distributed.say("no look found a better loss than before: the model is written unchanged")
    student = tuning.finish(student, stored)
    after = look(student)
    step = {
        "method": "recover", "base": model, "command": command, "settings": settings,
        "calibration": {
            "dataset": dataset, "nsamples": len(data), "seqlen": seqlen, "seed": seed,
        },
    }  # fmt: skip
    before = progress.rows[0]["validation_loss"]
    sizes = {
        "validation perplexity before": math.exp(min(before, 700)),
        "validation perplexity after": math.exp(min(after, 700)),
    }
    log = {"looks": progress.rows, "written": {"step": progress.best_step, "loss": after}}
    distributed.lead(
        lambda: save_model(
            student, folder, out, base=model, step=step, log=log, sizes=sizes,
            overwrite=overwrite, staging=store.partial / "result",
        )
    )  # fmt: skip
    distributed.lead(store.forget)
    return Result(
        before, after, teacher_loss, progress.best_step, progress.step, progress.tokens,
        time.perf_counter() - start, progress.rows,
    )  # fmt: skip


def _check_numbers(given: dict) -> None:
    positive = (
        "learning_rate", "lora_r", "lora_alpha", "num_epochs", "batch_size", "micro_batch_size",
        "cutoff_len", "val_set_size", "max_train_samples", "max_steps", "max_minutes",
        "eval_steps", "save_steps",
    )  # fmt: skip
    for name in positive:
        value = given[name]
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: expected a number above 0.")
    for name in ("warmup_steps", "patience"):
        if given[name] < 0:
            raise UserError(f"--{name} {given[name]}: expected 0 or more.")
    if not 0 <= given["lora_dropout"] < 1:
        raise UserError(f"--lora_dropout {given['lora_dropout']}: expected 0 or more, below 1.")
    if not 0 < given["kd_weight"] <= 1:
        raise UserError(f"--kd_weight {given['kd_weight']}: expected above 0, at most 1.")
    for name, known in (("tune", RATES), ("kd_loss", losses.DIVERGENCES)):
        if given[name] not in known:
            hint = nearest(given[name], known)
            raise UserError(f"--{name} {given[name]}: expected one of {', '.join(known)}.{hint}")


def _compute_dtype(dtype: str, stored: torch.dtype) -> torch.dtype:
    if dtype == "float16":
        raise UserError(
            "--dtype float16 overflows in training; expected bfloat16 (also for models stored in "
            "float16) or float32."
        )
    if dtype == "auto":
        return torch.float32 if stored == torch.float32 else torch.bfloat16
    return checkpoint.parse_dtype(dtype)


def _length(wanted: int | None, default: int, config) -> int:
    context = context_length(config)
    if wanted is None:
        return min(default, context or default)
    if wanted < 2 or (context and wanted > context):
        raise UserError(
            f"--cutoff_len {wanted}: expected 2 to {context or 'any number of'} tokens, the "
            "model's context."
        )
    return wanted


def _check_teacher(teacher: str, tokenizer, config) -> Path:
    """The teacher's folder, if its logits mean the same tokens."""
    folder = checkpoint.resolve(teacher)
    theirs = checkpoint.load_config(folder).get_text_config().vocab_size
    ours = config.get_text_config().vocab_size
    other = checkpoint.load_tokenizer(folder)
    same = other.get_vocab() == tokenizer.get_vocab() and all(
        other(text)["input_ids"] == tokenizer(text)["input_ids"] for text in (SELF_TEST, "a")
    )
    if theirs != ours or not same:
        raise UserError(
            f"--teacher {teacher} has another vocabulary ({theirs} tokens) than the pruned model "
            f"({ours}); distillation needs the dense model it was pruned from, or one with the "
            "same tokenizer."
        )
    return folder


def _check_tokens(data, config) -> None:
    largest, known = max(int(ids.max()) for ids, _ in data), config.get_text_config().vocab_size
    if largest >= known:
        raise UserError(
            f"the tokenizer gives token {largest}, the model knows {known}; tokenizer and model do "
            "not belong together."
        )


def _zeros(student, model: str, tune: str, densify: bool) -> dict:
    """Masks that keep the zeros of a sparse model; {} for others.

    Raises:
        UserError: LoRA would fill them.
    """
    share = tuning.zero_share(student)
    if share <= tuning.SPARSE_FROM:
        return {}
    if densify:
        distributed.say(f"{share:.1%} of the weights are zeros; they are filled (--densify)")
        return {}
    if tune == "lora":
        raise UserError(
            f"{model} is sparse ({share:.1%} of its linears' weights are zeros), and merging LoRA "
            "would fill the zeros; use --tune full, which keeps them, or --densify to fill them "
            "knowingly."
        )
    distributed.say(f"{share:.1%} of the weights are zeros, and stay so")
    return tuning.kept(student)


def _all_ids(examples) -> torch.Tensor:
    return torch.cat([torch.cat([ids, ids.new_tensor([-first])]) for ids, first in examples])


def _describe(plan: Plan, data, held, given, tune: str, width: int) -> str:
    tokens = sum(len(ids) for ids, _ in data)
    rate = f"learning rate {plan.rate:.3g}"
    if given is None and width != RATES_WIDTH:
        rate += f" ({RATES[tune]:.0e} at width {RATES_WIDTH}, this model has {width})"
    limit = f" or {plan.minutes:g} minutes" if plan.minutes else ""
    return (
        f"{len(data)} training examples ({tokens} tokens, {target_count(data)} of them predicted), "
        f"{len(held)} held out\n"
        f"{plan.steps} steps of {plan.batch}{limit}, {rate}, {plan.warmup} steps of warm-up"
    )


def _print_plan(folder, out, tune, r, stored, whole, teacher) -> None:
    """--dry-run: what training takes, activations aside."""
    from harness.footprint import linear_shapes, stored_size

    writer.check_out(out, overwrite=True)
    count = stored_size(folder, checkpoint.load_config(folder)).parameters
    shapes = [s for n, s in linear_shapes(folder).items() if "embed" not in n and "head" not in n]
    trained = count if tune == "full" else sum(r * (o + i) for o, i in shapes)
    item = 4 if whole else stored.itemsize
    memory = count * item + trained * (12 if tune == "full" else 16)
    if teacher:
        memory += stored_size(teacher, checkpoint.load_config(teacher)).parameters * item
    print(f"recover ({tune}): {trained / 1e6:.2f} of {count / 1e6:.2f} M parameters -> {out}")
    print(
        f"memory: about {memory / 1e9:.2f} GB for weights, gradients and moments, and the "
        f"activations of a micro-batch; disk: {count * stored.itemsize / 1e6:.1f} MB, and "
        f"{trained * 16 / 1e6:.1f} MB while it runs"
    )
