"""MiniLLM's run: check, load, and hand what there is (on_policy.py) to harness.training.loop."""

from math import ceil
from pathlib import Path

import torch

from harness import distributed, precision
from harness.checkpoint import card, hashes, load, runs
from harness.checkpoint.load import context_length
from harness.checkpoint.weights import Weights
from harness.data import example_sets
from harness.errors import UserError
from harness.losses import from_hidden
from harness.metrics.footprint import stored_size
from harness.settings import record
from harness.training import batching, distillation, engine, loop
from harness.training.cost import print_plan, training_cost
from minillm import finetune_run, flags, models, rollouts
from minillm.on_policy import OnPolicy, without_dropout

BATCH = 64  # rollouts of a step in the published runs: 4 on each of 16 GPUs


def run(settings) -> dict | None:
    """What the command does with a `minillm.train_minillm.Settings`, on every rank.

    Returns:
        As :func:`harness.training.loop.train`; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    settings = settings.completed()
    objective = _objective(settings)
    device = engine.launch(load.pick_device(settings.device))
    out, source = Path(settings.out), load.resolve(settings.model)
    runs.claim(out, source, settings.overwrite, settings.dry_run)
    columns = distillation.shared_columns(settings.teacher, settings.model)
    folders = [source, load.resolve(settings.teacher)]
    configs = [load.load_config(folder) for folder in folders]
    longest, longest_prompt = flags.lengths(settings, *map(context_length, configs))
    tokenizer = load.load_tokenizer(source)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= columns:
        raise UserError(
            f"the student's end token ({tokenizer.eos_token}) is not among the {columns} tokens "
            "that it shares with the teacher; give both the same end token."
        )
    examples, dev = finetune_run.examples(settings, tokenizer, longest, longest_prompt)
    example_sets.check_tokens([examples, dev], configs[0])
    text = None
    if settings.lm_data and settings.lm_coef:
        text = example_sets.windows(
            tokenizer, settings.lm_data, length=longest, limit=settings.lm_num
        )
    elif settings.lm_coef:
        distributed.say("no --lm-data: the loss has no part on plain text")
    plan, training = _plan(settings, len(examples))
    stored_dtype = Weights(source).dtype
    dtype = precision.choose_for_training(settings.dtype, stored_dtype, device, settings.model)
    recorded = record(settings, finetune_run.FREE) | {
        "steps": training.steps, "dtype": precision.name(dtype), "max_length": longest,
        "max_prompt_length": longest_prompt, "gradient_accumulation_steps": training.accumulate,
    }  # fmt: skip
    if settings.dry_run:
        pairs = zip(folders, configs, strict=True)
        counts = [stored_size(*pair).parameters for pair in pairs]
        _print_plan(settings, counts, dtype, stored_dtype)
        return None

    student = models.load_student(
        settings.model, device=device, dtype=dtype, peft_path=settings.peft_path
    )
    teacher = models.load_teacher(
        settings.teacher, device=device, peft_path=settings.teacher_peft_path,
        dtype=dtype if dtype == torch.float32 else "auto",
    )  # fmt: skip
    fused = from_hidden.fusable(student, settings.zero) and from_hidden.fusable(teacher)
    student, finish = models.with_lora(student, settings, stored_dtype)
    student.config.use_cache = False
    without_dropout(student)
    on_policy = OnPolicy(
        student, teacher, columns, fused, tokenizer, batching.pad_id(tokenizer), examples, dev,
        text, objective, plan, training, longest - longest_prompt, settings.lm_coef,
        settings.kd_ratio, settings.chunk_size, settings.eval_batch_size or settings.chunk_size,
        settings.select,
    )  # fmt: skip
    identity = runs.fingerprint(source, None, recorded)
    identity["teacher"] = hashes.model_files(folders[1])
    identity["data"] = {"training": examples.key, "validation": dev.key}
    identity["data"] |= {"text": text.key} if text else {}
    # Activations are made again in train mode only.
    return loop.train(
        student.train(settings.gradient_checkpointing), training, batches=on_policy.batches,
        loss_of=on_policy.loss_of, out=out, identity=identity, evaluate=on_policy.evaluate,
        better="higher" if settings.select == "rouge" else "lower",
        eval_steps=settings.eval_interval, save_steps=settings.save_interval,
        boundary=plan.starts_phase, finish=finish,
        stored=[] if finish else None, resume=settings.resume, overwrite=settings.overwrite,
        step_entry=card.training_step(
            "minillm", settings, recorded, dataset=settings.data, nsamples=len(examples),
            seqlen=longest,
        ), source=source,
    )  # fmt: skip


def _objective(settings) -> rollouts.Objective:
    return rollouts.Objective(
        settings.teacher_mixed_alpha, settings.gamma, settings.reward_scaling,
        settings.cliprange_reward, settings.cliprange, settings.length_norm,
        settings.single_step_reg, settings.future_rewards,
    )  # fmt: skip


def _plan(settings, prompts: int) -> tuple[rollouts.Plan, engine.Training]:
    """Phases and the optimizer: the shorter of --total-iters and --epochs."""
    ranks = distributed.world_size()
    accumulate = settings.gradient_accumulation_steps
    if accumulate is None:
        accumulate = max(1, min(BATCH, settings.num_rollouts) // (settings.batch_size * ranks))
    batch = settings.batch_size * accumulate * ranks
    plan = rollouts.Plan(settings.num_rollouts, batch, settings.ppo_epochs)
    phases = max(1, ceil(settings.epochs * prompts / plan.rollouts))
    steps = min(settings.total_iters, phases * plan.steps)
    training = engine.Training(
        settings.lr, steps, settings.batch_size, accumulate, settings.warmup_iters,
        settings.lr_decay_style, min(settings.lr_min, settings.lr), betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        clip=settings.clip_grad, zero=settings.zero, offload=settings.offload,
        gradient_checkpointing=settings.gradient_checkpointing, seed=settings.seed,
    )  # fmt: skip
    distributed.say(
        f"minillm of {settings.model}: {steps} steps of {batch} rollouts; {plan.rollouts} are "
        f"written every {plan.steps} steps, {steps / plan.steps * plan.rollouts / prompts:.3g} "
        "epochs over the prompts"
    )
    return plan, training


def _print_plan(settings, parameters: list[int], dtype, stored_dtype) -> None:
    """--dry-run: what the models and the optimizer take, activations and caches aside."""
    ours, theirs = parameters
    item, trained = dtype.itemsize, 0 if settings.peft else ours
    print_plan(
        f"minillm: {settings.model} ({ours / 1e6:.2f} M parameters, {precision.name(dtype)}), "
        f"teacher {settings.teacher} ({theirs / 1e6:.2f} M) -> {settings.out}",
        training_cost(ours, trained, item, stored_dtype.itemsize, settings.zero),
        f"{settings.batch_size} rollouts or the caches of {settings.chunk_size}",
        theirs * item,
    )
