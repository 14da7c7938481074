"""Bring back what pruning cost: load, choose what is trained, train, write the best."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import distributed, locks, precision
from harness.checkpoint import hashes, load, runs
from harness.checkpoint.save import save_model
from harness.checkpoint.weights import Weights
from harness.data import training_data
from harness.errors import UserError
from harness.quant.masks import SPARSE_FROM
from sparse import losses, tuning
from sparse import recovery_checks as checks
from sparse.training import Diverged, Plan, held_out_loss, train
from sparse.training_state import Store


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


# The signature is the command line.
@locks.releasing
def recover(  # noqa: C901, PLR0913
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
    patience: int = 5,
    gradient_checkpointing: bool = False,
    densify: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    command: str = "sparse.recover_run.recover(...)",
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
    checks.check_numbers(locals())
    out = Path(out)
    device = distributed.start(load.pick_device(device))
    folder = load.resolve(model)
    config = load.load_config(folder)
    weights = Weights(folder)
    stored = weights.dtype
    checks.check_dtype(dtype)
    compute = precision.choose_for_training(dtype, stored, device, model)
    checks.check_source(weights, model, out, overwrite, dry_run)
    tokenizer = load.load_tokenizer(folder)
    teacher_folder = checks.check_teacher(teacher, tokenizer, config) if teacher else None

    kind = checks.INSTRUCTIONS if training_data.is_instructions(dataset) else checks.TEXT
    limit = max_train_samples or (checks.TEXT_EXAMPLES if kind is checks.TEXT else None)
    seqlen = checks.length(cutoff_len, kind["cutoff_len"], config)
    data, held = training_data.load(
        tokenizer, dataset, seqlen=seqlen, held_out=val_set_size or kind["val_set_size"],
        limit=limit, train_on_inputs=train_on_inputs, seed=seed,
    )  # fmt: skip
    checks.check_tokens(data + held, config)
    batch = min(batch_size or kind["batch_size"], len(data))
    steps = max(1, math.ceil(num_epochs * len(data) / batch))
    steps = min(steps, max_steps or steps)
    width = config.get_text_config().hidden_size
    usual = None if learning_rate else kind["rate"][tune]
    rate = learning_rate or usual * checks.RATES_WIDTH / width
    plan = Plan(
        steps, batch, micro_batch_size, rate, min(warmup_steps, max(1, steps // 10)), max_minutes,
        eval_steps, save_steps, patience, seed,
    )  # fmt: skip
    settings = {
        "tune": tune, "dataset": dataset, "teacher": teacher, "learning_rate": rate,
        "num_epochs": num_epochs, "max_steps": max_steps, "max_minutes": max_minutes,
        "batch_size": batch, "micro_batch_size": micro_batch_size, "cutoff_len": seqlen,
        "warmup_steps": plan.warmup, "val_set_size": len(held), "train_on_inputs": train_on_inputs,
        "eval_steps": eval_steps, "patience": patience, "dtype": precision.name(compute),
        "seed": seed, "densify": densify, "gradient_checkpointing": gradient_checkpointing,
    }  # fmt: skip
    if tune == "lora":
        settings |= {
            "lora_r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
            "lora_target_modules": lora_target_modules,
        }  # fmt: skip
    if teacher:
        settings |= {"kd_loss": kd_loss, "kd_weight": kd_weight}
    distributed.say(checks.describe(plan, data, held, usual, width))

    # LoRA keeps the frozen weights as they are stored; what is trained is float32.
    whole = tune == "full" or compute == torch.float32
    if dry_run:
        checks.print_plan(folder, out, tune, lora_r, stored, whole, teacher_folder)
        return None
    identity = runs.fingerprint(folder, _all_ids(data + held), {"method": "recover", **settings})
    if teacher_folder:
        identity["teacher"] = hashes.model_files(teacher_folder)
    student = load.load_model(folder, device=device, dtype=torch.float32 if whole else stored)
    masks = _zeros(student, model, tune, densify)
    if tune == "full":
        parameters = tuning.train_all(student)
    else:
        targets = tuning.choose_targets(list(tuning.block_linears(student)), lora_target_modules)
        parameters = tuning.add_lora(
            student, targets, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, seed=seed
        )
    trained = sum(p.numel() for p in parameters.values())
    distributed.say(f"{tune}: {trained / 1e6:.2f} M parameters are trained")
    if gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    loss, teacher_loss = losses.cross_entropy, None

    # LoRA is not stored as it is: it is merged first.
    as_stored = [] if tune == "lora" else [p.data for p in parameters.values()]

    def look(some=student) -> float:
        with precision.rounded(as_stored, stored):
            return held_out_loss(some, held, losses.cross_entropy, micro_batch_size, compute)

    if teacher_folder:
        kept = torch.float32 if compute == torch.float32 else "auto"
        dense = load.load_model(teacher_folder, device=device, dtype=kept)
        dense.requires_grad_(False)
        loss = losses.distillation(dense, kd_loss, kd_weight, compute)
        teacher_loss = look(dense)
        distributed.say(f"teacher: validation loss {teacher_loss:.4f}")

    store = Store(out, identity, overwrite=overwrite, resume=resume)
    try:
        progress = train(student, parameters, masks, data, loss, look, plan, compute, store)
    except Diverged:
        distributed.lead(store.run.forget)  # the same command would end here again
        raise
    store.load_best(progress.best_step, parameters)
    if progress.best_step == 0:
        distributed.say("no look found a better loss than before: the model is written unchanged")
    student = tuning.finish(student, stored)
    # The values that are stored, in the dtype of all other looks.
    after = look(precision.cast(student, torch.float32) if compute == torch.float32 else student)
    precision.cast(student, stored)
    training = {"dataset": dataset, "nsamples": len(data), "seqlen": seqlen, "seed": seed}
    step = {
        "method": "recover", "base": model, "command": command, "settings": settings,
        "training": training, "dtype": precision.record(compute, stored),
    }  # fmt: skip
    distributed.lead(lambda: _write(student, folder, step, progress, after, store))
    return Result(
        progress.rows[0]["validation_loss"], after, teacher_loss, progress.best_step,
        progress.step, progress.tokens, progress.seconds, progress.rows,
    )  # fmt: skip


def _write(student, folder, step: dict, progress, after: float, store) -> None:
    before = progress.rows[0]["validation_loss"]
    save_model(
        student,
        folder,
        store.out,
        base=step["base"],
        step=step,
        log={"looks": progress.rows, "written": {"step": progress.best_step, "loss": after}},
        sizes={
            "validation perplexity before": math.exp(min(before, 700)),
            "validation perplexity after": math.exp(min(after, 700)),
        },
        run=store.run,
    )


def _zeros(student, model: str, tune: str, densify: bool) -> dict:
    """Masks that keep the zeros of a sparse model; {} for others.

    Raises:
        UserError: LoRA would fill them.
    """
    share = tuning.zero_share(student)
    if share <= SPARSE_FROM:
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
