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
from harness.errors import UserError
from harness.generation import responses
from harness.losses import from_hidden
from harness.metrics.footprint import stored_size
from harness.quant import masks
from harness.training import batching, engine, loop, teacher_cache, validation
from harness.training.cost import training_cost
from minillm import align, flags, losses, models, packing

# What does not change the result; the rest of the flags is what a resumed run must repeat.
FREE = (
    "model", "out", "resume", "overwrite", "dry_run", "device", "local_rank", "save_interval",
    "preset",
)  # fmt: skip


def finetune(args) -> dict | None:
    """Run the command ``minillm.finetune`` with its parsed arguments, on every rank.

    Returns:
        As :func:`harness.training.loop.train`; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    _check(args)
    device = engine.launch(load.pick_device(args.device))
    out, source = Path(args.out), load.resolve(args.model)
    config = load.load_config(source)
    runs.claim(out, source, args.overwrite, args.dry_run)
    contexts = [context_length(config)]
    columns = None
    if args.teacher:
        contexts.append(context_length(load.load_config(load.resolve(args.teacher))))
        if not args.align:
            columns = models.shared_columns(args.teacher, args.model)
    longest, longest_prompt = flags.lengths(args, *contexts)
    tokenizer = load.load_tokenizer(source)
    train, dev = examples(args, tokenizer, longest, longest_prompt)
    example_sets.check_tokens([train, dev], config)
    known = config.get_text_config().vocab_size
    stored = teacher_cache.Cache(args.teacher_cache, train, known) if args.teacher_cache else None

    rows = packing.pack(train.lengths, longest, args.seed) if args.packing else None
    parameters = stored_size(source, config).parameters
    count = len(rows or train)
    training, how = flags.training(args, parameters, count, distributed.world_size())
    distributed.say(f"{args.type} of {args.model}: {how}")
    stored_dtype = Weights(source).dtype
    dtype = precision.choose_for_training(args.dtype, stored_dtype, device, args.model)
    if args.dry_run:
        _print_plan(args, parameters, training, dtype, stored_dtype)
        return None

    lora = flags.lora(args)
    student = models.load_student(args.model, device=device, dtype=dtype, peft_path=args.peft_path)
    if args.packing and not packing.isolates(student):
        distributed.say("packing: this family reads packed examples as one text, each sees those "
                        "before it")  # fmt: skip
    identity = _identity(args, source, training, dtype, train, dev)
    if stored:
        identity["teacher_cache"] = stored.identity
    objective = _objective(args, student, device, columns, dtype, stored)
    finish = None
    if lora:
        masks.ask_before_merging(student, args.model, args.densify)
        student = models.add_lora(student, **lora)

        def finish(tensors):
            plain = models.load_student(
                args.model, device="cpu", dtype=torch.float32, peft_path=args.peft_path
            )
            return models.merged(plain, tensors, stored_dtype, **lora)

    pad = batching.pad_id(tokenizer)
    sampling = responses.Sampling(longest - longest_prompt, temperature=float(not args.greedy))
    collate = _collate(args, train, rows, tokenizer, longest, stored)
    lengths = [sum(train.lengths[i] for i in row) for row in rows] if rows else train.lengths

    def batches(step: int) -> list[dict]:
        return [collate(micro) for micro in batching.deal(lengths, step, training)]

    def evaluate(running, step: int) -> dict:
        size = args.eval_batch_size or args.batch_size
        loss = validation.held_out_loss(running, dev, batch=size, pad=pad)
        found = {"validation_loss": loss}
        if args.eval_gen:
            found["rouge_l"] = validation.rouge(
                running, tokenizer, dev, sampling=sampling, batch=size, seed=args.seed
            )
        return validation.select(args.select, found)

    every = args.eval_interval or max(1, count // batching.batch_size(training))
    step_entry = {
        "method": args.type, "base": args.model, "command": card.command_line(),
        "settings": _settings(args, training, dtype, longest, longest_prompt),
        "training": {
            "dataset": args.data, "nsamples": len(train), "seqlen": longest, "seed": args.seed,
        },
    }  # fmt: skip
    return loop.train(
        student.train(), training, batches=batches, loss_of=objective, out=out, identity=identity,
        evaluate=evaluate, better="higher" if args.select == "rouge" else "lower",
        eval_steps=every, save_steps=args.save_interval, finish=finish,
        stored=[] if lora else None, resume=args.resume, overwrite=args.overwrite,
        step_entry=step_entry, source=source,
    )  # fmt: skip


def pairs(args, split: str, tokenizer) -> list[dict[str, str]]:
    """Prompts and responses of the flags --data, --dev-data, --train-num and --dev-num; a file of
    its own for each is read whole."""
    generated = getattr(args, "type", None) == "seqkd"
    dev = getattr(args, "dev_data", None)
    if split == "train":
        # cache_teacher knows nothing of --dev-data: it leaves out what is held out, always.
        alone = bool(dev) and not getattr(args, "teacher_cache", None)
        return example_sets.pairs(args.data, split, generated, alone=alone, tokenizer=tokenizer)[
            : args.train_num
        ]
    found = example_sets.pairs(
        dev or args.data, split, generated and not dev, alone=bool(dev), tokenizer=tokenizer
    )
    return found[: args.dev_num]


def examples(args, tokenizer, longest: int, longest_prompt: int) -> list[example_sets.Examples]:
    """Training and validation examples of :func:`pairs`."""
    return [
        example_sets.examples(
            tokenizer, pairs(args, split, tokenizer), max_length=longest,
            max_prompt_length=longest_prompt, name=f"{name}, {split}",
        )
        for split, name in (("train", args.data), ("validation", args.dev_data or args.data))
    ]  # fmt: skip


def _check(args) -> None:
    """Fill in what depends on other flags, and refuse what does not go together."""
    args.select = args.select or ("rouge" if args.eval_gen else "loss")
    if args.select == "rouge" and not args.eval_gen:
        raise UserError("--select rouge needs responses to look at; add --eval-gen.")
    if not 0 <= args.kd_ratio <= 1:
        raise UserError(f"--kd-ratio {args.kd_ratio}: expected 0 to 1.")
    if not 0 <= args.peft_lora_dropout < 1:
        raise UserError(f"--peft-lora-dropout {args.peft_lora_dropout}: expected 0 to below 1.")
    taught = args.teacher or args.teacher_cache
    if args.type == "kd" and not taught:
        raise UserError("--type kd needs a teacher: --teacher MODEL, or --teacher-cache FOLDER.")
    if args.type == "sft" and taught:
        raise UserError("--type sft has no teacher; use --type kd, or leave the teacher out.")
    if args.teacher and args.teacher_cache:
        raise UserError("--teacher and --teacher-cache: give one of the two.")
    if args.align and not args.teacher:
        raise UserError(f"--align {args.align} needs the teacher in memory; give --teacher MODEL.")
    if args.align and args.loss != "forward_kl":
        raise UserError(f"--align {args.align} is a loss of its own; leave --loss {args.loss} out.")
    if args.packing and taught:
        raise UserError("--packing is for training without a teacher; leave it out.")
    if args.eval_batch_size is not None and args.eval_batch_size < 1:
        raise UserError(f"--eval-batch-size {args.eval_batch_size}: at least 1.")


def _objective(args, student, device: str, columns: int | None, dtype, stored) -> Callable:
    """(engine, batch) -> (sum of losses, the sums to report)."""
    if stored:
        rows = losses.ROWS[args.loss]
        return partial(teacher_cache.distillation, rows, args.kd_ratio, stored.vocabulary)
    if args.teacher is None:
        return cross_entropy
    teacher = models.load_teacher(
        args.teacher, device=device, peft_path=args.teacher_peft_path,
        dtype=dtype if dtype == torch.float32 else "auto",
    )  # fmt: skip
    if args.align:
        return partial(align.distillation, teacher, args.kd_ratio)
    fused = from_hidden.fusable(student, args.zero) and from_hidden.fusable(teacher)
    rows = partial(losses.mix_rows, rows=losses.ROWS[args.loss], kd_ratio=args.kd_ratio)
    return partial(distillation, teacher, rows, columns, fused)


def _collate(args, train, rows, tokenizer, longest: int, stored) -> Callable[[list[int]], dict]:
    """Indices -> a micro-batch: of examples (with a cache's rows), of packed rows, or of texts for
    two tokenizers."""
    pad = batching.pad_id(tokenizer)
    if rows:
        return lambda micro: packing.collate([[train[i] for i in rows[n]] for n in micro], pad)
    if not args.align:
        more = stored.rows if stored else lambda micro: {}
        return lambda micro: batching.collate([train[i] for i in micro], pad) | more(micro)
    texts = pairs(args, "train", tokenizer)
    other = load.load_tokenizer(args.teacher)
    pads = (batching.pad_id(other), pad)
    return lambda micro: align.batch(
        [texts[train.sources[i]] for i in micro], other, tokenizer, longest, pads
    )


def cross_entropy(running, batch: dict):
    """Cross entropy of the labels."""
    logits = running(**validation.inputs_of(batch, running.device)).logits
    return validation.cross_entropy(logits, batch["labels"].to(running.device)), {}


def distillation(teacher, rows, columns: int | None, fused: bool, running, batch: dict):
    """``rows`` over teacher and student at every label; reports its parts."""
    inputs = validation.inputs_of(batch, running.device)
    labels = batch["labels"].to(running.device)
    total, ce, divergence = from_hidden.over_models(
        rows, teacher, running, inputs, labels != batching.IGNORED, [labels.clamp_min(0)],
        columns, fused,
    )  # fmt: skip
    return total, {"ce": ce, "kd": divergence}


def _settings(args, training, dtype, longest: int, longest_prompt: int) -> dict:
    kept = {k: v for k, v in vars(args).items() if k not in FREE and v is not None}
    return kept | {
        "lr": training.learning_rate, "steps": training.steps, "dtype": precision.name(dtype),
        "max_length": longest, "max_prompt_length": longest_prompt,
    }  # fmt: skip


def _identity(args, source: Path, training, dtype, train, dev) -> dict:
    settings = _settings(args, training, dtype, 0, 0)
    identity = runs.fingerprint(source, None, settings)
    identity["data"] = {"training": train.key, "validation": dev.key}
    if args.teacher:
        folder = load.resolve(args.teacher)
        identity["teacher"] = hashes.model_files(folder)
    return identity


def _print_plan(args, parameters: int, training, dtype, stored_dtype) -> None:
    """--dry-run: what training takes, activations aside."""
    item, trained = dtype.itemsize, 0 if args.peft else parameters
    cost = training_cost(parameters, trained, item, stored_dtype.itemsize, training.zero)
    memory = cost.memory / 1e9
    if args.teacher:
        folder = load.resolve(args.teacher)
        count = stored_size(folder, load.load_config(folder)).parameters
        memory += count * item / 1e9
    print(
        f"{args.type}: {args.model} ({parameters / 1e6:.2f} M parameters, {precision.name(dtype)}) "
        f"-> {args.out}"
    )
    print(
        f"memory: about {memory:.2f} GB a process, and the activations of {training.micro_batch} "
        f"examples; disk: {cost.result / 1e6:.1f} MB, and while it runs {cost.disk / 1e6:.1f} MB"
    )
