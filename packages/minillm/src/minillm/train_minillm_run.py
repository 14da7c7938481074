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
from harness.quant import masks
from harness.training import batching, engine, loop
from harness.training.cost import training_cost
from minillm import finetune_run, flags, models, rollouts
from minillm.on_policy import OnPolicy, without_dropout

BATCH = 64  # rollouts of a step in the published runs: 4 on each of 16 GPUs


def train(args) -> dict | None:
    """Run the command ``minillm.train_minillm`` with its parsed arguments, on every rank.

    Returns:
        As :func:`harness.training.loop.train`; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    objective = _objective(args)
    device = engine.launch(load.pick_device(args.device))
    out, source = Path(args.out), load.resolve(args.model)
    runs.claim(out, source, args.overwrite, args.dry_run)
    columns = models.shared_columns(args.teacher, args.model)
    folders = [source, load.resolve(args.teacher)]
    configs = [load.load_config(folder) for folder in folders]
    longest, longest_prompt = flags.lengths(args, *map(context_length, configs))
    tokenizer = load.load_tokenizer(source)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= columns:
        raise UserError(
            f"the student's end token ({tokenizer.eos_token}) is not among the {columns} tokens "
            "that it shares with the teacher; give both the same end token."
        )
    examples, dev = finetune_run.examples(args, tokenizer, longest, longest_prompt)
    example_sets.check_tokens([examples, dev], configs[0])
    text = None
    if args.lm_data and args.lm_coef:
        text = example_sets.windows(tokenizer, args.lm_data, length=longest, limit=args.lm_num)
    elif args.lm_coef:
        distributed.say("no --lm-data: the loss has no part on plain text")
    plan, training = _plan(args, len(examples))
    stored_dtype = Weights(source).dtype
    dtype = precision.choose_for_training(args.dtype, stored_dtype, device, args.model)
    settings = {k: v for k, v in vars(args).items() if k not in finetune_run.FREE and v is not None}
    settings |= {
        "steps": training.steps, "dtype": precision.name(dtype), "max_length": longest,
        "max_prompt_length": longest_prompt, "gradient_accumulation_steps": training.accumulate,
    }  # fmt: skip
    if args.dry_run:
        pairs = zip(folders, configs, strict=True)
        counts = [stored_size(*pair).parameters for pair in pairs]
        _print_plan(args, counts, dtype, stored_dtype)
        return None

    student = models.load_student(args.model, device=device, dtype=dtype, peft_path=args.peft_path)
    teacher = models.load_teacher(
        args.teacher, device=device, peft_path=args.teacher_peft_path,
        dtype=dtype if dtype == torch.float32 else "auto",
    )  # fmt: skip
    fused = from_hidden.fusable(student, args.zero) and from_hidden.fusable(teacher)
    lora, finish = flags.lora(args), None
    if lora:
        masks.ask_before_merging(student, args.model, args.densify)
        student = models.add_lora(student, **lora)

        def finish(tensors):
            plain = models.load_student(
                args.model, device="cpu", dtype=torch.float32, peft_path=args.peft_path
            )
            return models.merged(plain, tensors, stored_dtype, **lora)

    student.config.use_cache = False
    without_dropout(student)
    run = OnPolicy(
        student, teacher, columns, fused, tokenizer, batching.pad_id(tokenizer), examples, dev,
        text, objective, plan, training, longest - longest_prompt, args.lm_coef, args.kd_ratio,
        args.chunk_size, args.eval_batch_size or args.chunk_size, args.select,
    )  # fmt: skip
    identity = runs.fingerprint(source, None, settings)
    identity["teacher"] = hashes.model_files(folders[1])
    identity["data"] = {"training": examples.key, "validation": dev.key}
    identity["data"] |= {"text": text.key} if text else {}
    step_entry = {
        "method": "minillm", "base": args.model, "command": card.command_line(),
        "settings": settings,
        "training": {
            "dataset": args.data, "nsamples": len(examples), "seqlen": longest, "seed": args.seed,
        },
    }  # fmt: skip
    # Activations are made again in train mode only.
    return loop.train(
        student.train(args.gradient_checkpointing), training, batches=run.batches,
        loss_of=run.loss_of, out=out, identity=identity, evaluate=run.evaluate,
        better="higher" if args.select == "rouge" else "lower", eval_steps=args.eval_interval,
        save_steps=args.save_interval, boundary=plan.starts_phase, finish=finish,
        stored=[] if lora else None, resume=args.resume, overwrite=args.overwrite,
        step_entry=step_entry, source=source,
    )  # fmt: skip


def _objective(args) -> rollouts.Objective:
    if not 0 <= args.kd_ratio <= 1:
        raise UserError(f"--kd-ratio {args.kd_ratio}: expected 0 to 1.")
    positive = (
        "epochs", "total_iters", "eval_interval", "save_interval", "train_num", "dev_num",
        "batch_size", "gradient_accumulation_steps", "chunk_size", "eval_batch_size", "lm_num",
    )  # fmt: skip
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")
    return rollouts.Objective(
        args.teacher_mixed_alpha, args.gamma, args.reward_scaling, args.cliprange_reward,
        args.cliprange, args.length_norm, args.single_step_reg, args.future_rewards,
    )  # fmt: skip


def _plan(args, prompts: int) -> tuple[rollouts.Plan, engine.Training]:
    """Phases and the optimizer: the shorter of --total-iters and --epochs."""
    ranks = distributed.world_size()
    accumulate = args.gradient_accumulation_steps
    if accumulate is None:
        accumulate = max(1, min(BATCH, args.num_rollouts) // (args.batch_size * ranks))
    batch = args.batch_size * accumulate * ranks
    plan = rollouts.Plan(args.num_rollouts, batch, args.ppo_epochs)
    phases = max(1, ceil(args.epochs * prompts / plan.rollouts))
    steps = min(args.total_iters, phases * plan.steps)
    training = engine.Training(
        args.lr, steps, args.batch_size, accumulate, args.warmup_iters, args.lr_decay_style,
        min(args.lr_min, args.lr), betas=(0.9, 0.95), weight_decay=args.weight_decay,
        clip=args.clip_grad, zero=args.zero, offload=args.offload,
        gradient_checkpointing=args.gradient_checkpointing, seed=args.seed,
    )  # fmt: skip
    distributed.say(
        f"minillm of {args.model}: {steps} steps of {batch} rollouts; {plan.rollouts} are written "
        f"every {plan.steps} steps, {steps / plan.steps * plan.rollouts / prompts:.3g} epochs over "
        f"the prompts"
    )
    return plan, training


def _print_plan(args, parameters: list[int], dtype, stored_dtype) -> None:
    """--dry-run: what the models and the optimizer take, activations and caches aside."""
    ours, theirs = parameters
    item, trained = dtype.itemsize, 0 if args.peft else ours
    cost = training_cost(ours, trained, item, stored_dtype.itemsize, args.zero)
    memory = (cost.memory + theirs * item) / 1e9
    print(
        f"minillm: {args.model} ({ours / 1e6:.2f} M parameters, {precision.name(dtype)}), "
        f"teacher {args.teacher} "
        f"({theirs / 1e6:.2f} M) -> {args.out}\nmemory: about {memory:.2f} GB a process, and the "
        f"activations of {args.batch_size} rollouts or the caches of {args.chunk_size}; disk: "
        f"{cost.result / 1e6:.1f} MB, and while it runs {cost.disk / 1e6:.1f} MB"
    )
