"""What the command ``minillm.cache_teacher`` does (harness.training.cache_writer)."""

from pathlib import Path

from harness import distributed, precision
from harness.checkpoint import load
from harness.checkpoint.load import context_length
from harness.checkpoint.weights import Weights
from harness.data import example_sets
from harness.errors import UserError
from harness.training import batching, cache_writer
from minillm import finetune_run, flags, models


def cache(args) -> dict | None:
    """Run the command with its parsed arguments, on every rank.

    Returns:
        What is in cache.json; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    device = distributed.start(load.pick_device(args.device))
    source, out = load.resolve(args.model), Path(args.out)
    cache_writer.check(out, args.overwrite or args.dry_run, args.batch_size, args.dry_run)
    if args.train_num is not None and args.train_num < 1:
        raise UserError(f"--train-num {args.train_num}: at least 1.")
    configs = [load.load_config(source)]
    tokenizer = load.load_tokenizer(args.student or source)
    vocabulary = configs[0].get_text_config().vocab_size
    if args.student:
        configs.append(load.load_config(load.resolve(args.student)))
        vocabulary = models.shared_columns(args.model, args.student)
    longest, longest_prompt = flags.lengths(args, *map(context_length, configs))
    examples = example_sets.examples(
        tokenizer, finetune_run.pairs(args, "train", tokenizer), max_length=longest,
        max_prompt_length=longest_prompt, name=f"{args.data}, train",
    )  # fmt: skip
    example_sets.check_tokens([examples], configs[0])

    dtype = precision.choose(args.dtype, Weights(source).dtype, device, args.model)

    def teacher():
        return models.load_teacher(
            args.model, device=device, dtype=dtype, peft_path=args.teacher_peft_path
        )

    return cache_writer.cache(
        teacher, examples, out, teacher=args.model, source=source, data=args.data,
        settings={"dtype": precision.name(dtype), "teacher_peft_path": args.teacher_peft_path},
        top_k=args.topk, vocabulary=vocabulary, batch=args.batch_size,
        pad=batching.pad_id(tokenizer), overwrite=args.overwrite,
        resume=args.resume, dry_run=args.dry_run,
    )  # fmt: skip
