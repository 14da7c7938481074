"""What recovery refuses before any work, chooses where nothing is said, and prints as its plan."""

from pathlib import Path

from harness import distributed
from harness.checkpoint import layouts, load, runs
from harness.checkpoint.load import context_length
from harness.data import corpora
from harness.errors import UserError, nearest
from sparse.losses import DIVERGENCES
from sparse.training import Plan, target_count

# LLM-Pruner's published setting is for instructions, LoRA and models 4,096 wide; its code's default
# rate of 3e-4 serves text, where short runs gain by it (measured, as full tuning's rates are). The
# best rate of Adam falls as the width grows (Yang et al., arXiv 2203.03466): others are scaled.
RATES_WIDTH = 4096
INSTRUCTIONS = {
    "batch_size": 64, "cutoff_len": 256, "val_set_size": 2000,
    "rate": {"lora": 1e-4, "full": 2e-5},
}  # fmt: skip
TEXT = {
    "batch_size": 8, "cutoff_len": 1024, "val_set_size": 32,
    "rate": {"lora": 3e-4, "full": 6e-5},
}  # fmt: skip
TEXT_EXAMPLES = 30_000
SELF_TEST = "def f(x):\n    return 'Ünïcode', [x + 1, 2e-3]  # 日本 <s> </s>\n\n\tThe end."


def check_numbers(given: dict) -> None:
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
    for name, known in (("tune", TEXT["rate"]), ("kd_loss", DIVERGENCES)):
        if given[name] not in known:
            hint = nearest(given[name], known)
            raise UserError(f"--{name} {given[name]}: expected one of {', '.join(known)}.{hint}")


def check_source(weights, model: str, out: Path, overwrite: bool, dry_run: bool) -> None:
    """Refuse packed weights and an ``out`` that is in the way."""
    if weights.layout in layouts.PACKED:
        raise UserError(
            f"{model} is quantized ({weights.layout}), and training would undo that; recover the "
            "pruned model first and quantize the result."
        )
    runs.claim(out, weights.folder, overwrite, dry_run)
    if layouts.of(weights.layout).MARK:
        distributed.say(
            f"{model} is stored as {weights.layout}; the result is written dense (harness convert "
            f"--format {weights.layout} packs it again)"
        )


def check_dtype(dtype: str) -> None:
    if dtype == "float16":
        raise UserError(
            "--dtype float16 overflows in training; expected bfloat16 (also for models stored in "
            "float16) or float32."
        )


def length(wanted: int | None, default: int, config) -> int:
    context = context_length(config)
    if wanted is None:
        return min(default, context or default)
    if wanted < 2 or (context and wanted > context):
        raise UserError(
            f"--cutoff_len {wanted}: expected 2 to {context or 'any number of'} tokens, the "
            "model's context."
        )
    return wanted


def check_teacher(teacher: str, tokenizer, config) -> Path:
    """The teacher's folder, if its logits mean the same tokens."""
    folder = load.resolve(teacher)
    theirs = load.load_config(folder).get_text_config().vocab_size
    ours = config.get_text_config().vocab_size
    other = load.load_tokenizer(folder)
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


def check_tokens(data, config) -> None:
    corpora.check_token(max(int(ids.max()) for ids, _ in data), config)


def describe(plan: Plan, data, held, usual: float | None, width: int) -> str:
    """The plan in two lines; ``usual``: the default rate at RATES_WIDTH, if it was taken."""
    tokens = sum(len(ids) for ids, _ in data)
    rate = f"learning rate {plan.rate:.3g}"
    if usual and width != RATES_WIDTH:
        rate += f" ({usual:.0e} at width {RATES_WIDTH}, this model has {width})"
    limit = f" or {plan.minutes:g} minutes" if plan.minutes else ""
    if distributed.world_size() > 1:
        limit += f", dealt to {distributed.world_size()} processes"
    return (
        f"{len(data)} training examples ({tokens} tokens, {target_count(data)} of them predicted), "
        f"{len(held)} held out\n"
        f"{plan.steps} steps of {plan.batch}{limit}, {rate}, {plan.warmup} steps of warm-up"
    )


def print_plan(folder, out, tune, r, stored, whole, teacher) -> None:
    """--dry-run: what training takes, activations aside."""
    from harness.metrics.footprint import linear_shapes, stored_size

    count = stored_size(folder, load.load_config(folder)).parameters
    shapes = [s for n, s in linear_shapes(folder).items() if "embed" not in n and "head" not in n]
    trained = count if tune == "full" else sum(r * (o + i) for o, i in shapes)
    item = 4 if whole else stored.itemsize
    memory = count * item + trained * (12 if tune == "full" else 16)
    if teacher:
        memory += stored_size(teacher, load.load_config(teacher)).parameters * item
    print(f"recover ({tune}): {trained / 1e6:.2f} of {count / 1e6:.2f} M parameters -> {out}")
    print(
        f"memory: about {memory / 1e9:.2f} GB for weights, gradients and moments, and the "
        f"activations of a micro-batch; disk: {count * stored.itemsize / 1e6:.1f} MB, and "
        f"{trained * 16 / 1e6:.1f} MB while it runs"
    )
