"""What the command ``minillm.generate`` does: prompts in, a file of responses out, resumable."""

from pathlib import Path

from harness import distributed
from harness.checkpoint import load
from harness.checkpoint.load import context_length
from harness.data import example_sets
from harness.errors import UserError
from harness.generation import response_file, responses
from harness.generation.vllm_loading import dtype_for
from minillm import flags

BATCH = {"transformers": 16, "vllm": 1024}
# What does not change what is said, but for rounding.
FREE = ("model", "out", "resume", "overwrite", "dry_run", "device", "local_rank", "batch_size")


def generate(args) -> dict[str, int] | None:
    """Run the command with its parsed arguments, on every rank.

    Returns:
        Counts of what was written and left out, by name; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    device = distributed.start(load.pick_device(args.device))
    source, out = load.resolve(args.model), Path(args.out)
    response_file.claim(out, args.overwrite, args.dry_run)
    if args.gen_num is not None and args.gen_num < 1:
        raise UserError(f"--gen-num {args.gen_num}: at least 1.")
    args.dtype = dtype_for(args.engine, args.dtype, source, device, args.model)
    tokenizer = load.load_tokenizer(source)
    pairs = example_sets.pairs(args.data, "train", tokenizer=tokenizer)[: args.gen_num]
    sampling, longest = how(args, source)
    texts = [pair["prompt"] for pair in pairs]
    kept, prompts = short(args, args.data, tokenizer, texts)
    texts = [texts[index] for index in kept]
    groups = responses.batches(prompts, args.batch_size)
    distributed.say(
        f"{args.data}: {len(prompts)} prompts, responses of at most {sampling.new_tokens} tokens"
        + left_out(len(pairs) - len(prompts), args)
    )
    if args.dry_run:
        print(f"{len(groups)} batches of at most {args.batch_size} -> {out}")
        return None
    settings = {k: v for k, v in vars(args).items() if k not in FREE and v is not None}
    said = response_file.write(
        out,
        lambda: responses.open_engine(args, source, device, tokenizer, sampling, longest),
        tokenizer, prompts, groups, sampling.new_tokens,
        lambda index, said: {"prompt": texts[index], "response": said.text},
        run=response_file.identity(source, settings, texts), seed=args.seed, resume=args.resume,
        overwrite=args.overwrite,
    )  # fmt: skip
    return {
        "responses": len(said),
        "tokens": sum(s.tokens for s in said),
        "empty": sum(not s.text.strip() for s in said),
        "not ended at the limit": sum(not s.ended for s in said),
    }


def how(args, source: Path) -> tuple[responses.Sampling, int]:
    """How to sample, and the longest prompt with its response, in tokens, from the flags; fills in
    --batch-size and --max-prompt-length."""
    context = context_length(load.load_config(source))
    longest, args.max_prompt_length = flags.lengths(args, context)
    if args.max_prompt_length >= longest:
        raise UserError(
            f"--max-prompt-length {args.max_prompt_length}: expected less than --max-length "
            f"{longest}, which holds prompt and response."
        )
    if args.batch_size is None:
        args.batch_size = BATCH[args.engine]
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1.")
    sampling = responses.Sampling(
        longest - args.max_prompt_length, args.temperature, args.top_p, args.top_k,
        args.no_repeat_ngram_size,
    )  # fmt: skip
    return sampling, longest


def short(args, name: str, tokenizer, texts: list[str]) -> tuple[list[int], list[list[int]]]:
    """Which of the prompts have 1 to --max-prompt-length tokens, and these as token ids."""
    ids = example_sets.prompt_ids(tokenizer, texts) if texts else []
    kept = [i for i, some in enumerate(ids) if 0 < len(some) <= args.max_prompt_length]
    if not kept:
        raise UserError(
            f"{name}: of {len(texts)} prompts none has at most {args.max_prompt_length} tokens; "
            "raise --max-prompt-length."
        )
    prompts = [ids[i] for i in kept]
    responses.check_tokens(tokenizer, prompts, load.load_config(load.resolve(args.model)))
    return kept, prompts


def left_out(count: int, args) -> str:
    return f"; {count} left out, their prompt has more than {args.max_prompt_length}" * bool(count)
