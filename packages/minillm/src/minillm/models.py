"""Student and teacher: load them, put LoRA on, and find out which of their logits mean the same."""

from pathlib import Path

import torch

from harness import distributed, precision
from harness.checkpoint import load, quantconfig
from harness.errors import UserError, one_line
from harness.quant import masks
from harness.training import loop
from minillm import flags

SELF_TEST = "def f(x):\n    return 'Ünïcode', [x + 1, 2e-3]  # 日本 <s> </s>\n\n\tThe end."


def load_student(model: str, *, device: str, dtype, peft_path: str | None = None):
    """A causal LM in memory, with the LoRA adapter at ``peft_path``, if any, merged in; ``dtype``
    as for :func:`harness.checkpoint.load.load_model`.

    Raises:
        UserError: it is packed (training would undo that), or the adapter does not fit.
    """
    folder = load.resolve(model)
    if quantconfig.is_packed(folder):
        raise UserError(f"{model} is quantized, and training would undo that; give a dense model.")
    loaded = load.load_model(folder, device=device, dtype=dtype)
    return with_adapter(loaded, peft_path) if peft_path else loaded


def load_teacher(model: str, *, device: str, dtype="auto", peft_path: str | None = None):
    """The teacher, in eval mode and without gradients; packed ones are fine."""
    loaded = load.load_model(model, device=device, dtype=dtype)
    if peft_path:
        loaded = with_adapter(loaded, peft_path)
    return loaded.eval().requires_grad_(False)


def with_adapter(model, folder: str):
    """``model`` with a peft adapter from ``folder`` merged into its weights."""
    from peft import PeftModel

    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter_config.json; expected a peft adapter.")
    try:
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the adapter {folder} does not fit the model: {one_line(error)}"
        ) from error


def add_lora(model, *, r: int, alpha: int, dropout: float, seed: int):
    """A peft model around ``model``: LoRA on the linears that peft chooses for the family (query
    and value in most), the rest frozen. A is drawn with ``seed``, B is zero."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = None if model.config.model_type in KNOWN else "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )  # fmt: skip
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    distributed.say(f"LoRA: {trained / 1e6:.2f} M parameters are trained")
    return adapted


def with_lora(student, settings, dtype: torch.dtype):
    """``student`` as it is trained, in LoRA's adapters where settings (flags.Peft and Shared) want
    them, and what makes a plain model of ``dtype`` of the trained tensors, or None.

    Raises:
        UserError: LoRA would fill the zeros of a pruned model.
    """
    lora = flags.lora(settings)
    if not lora:
        return student, None
    masks.ask_before_merging(student, settings.model, settings.densify)

    def finish(tensors):
        plain = load_student(
            settings.model, device="cpu", dtype=torch.float32, peft_path=settings.peft_path
        )
        return merged(plain, tensors, dtype, **lora)

    return add_lora(student, **lora), finish


def merged(student, tensors: dict[str, torch.Tensor], dtype: torch.dtype, **lora):
    """The plain model of a LoRA student: ``student`` (float32) with trained tensors, by name, put
    in and merged; summed in float32, rounded once."""
    adapted = loop.put_in(add_lora(student, **lora), tensors)
    return precision.cast(adapted.merge_and_unload(), dtype)


def shared_columns(teacher: str, student: str) -> int:
    """How many logits of teacher and student, from the first, are of the same tokens.

    Padding of the embeddings beyond the tokens (Qwen's 151,936 against 152,064) and special tokens
    that only one of the two has are cut. The distributions over the rest are what is compared.

    Raises:
        UserError: the tokenizers differ.
    """
    folders = [load.resolve(name) for name in (teacher, student)]
    sizes = [load.load_config(f).get_text_config().vocab_size for f in folders]
    tokenizers = [load.load_tokenizer(f) for f in folders]
    names = [{i: token for token, i in t.get_vocab().items()} for t in tokenizers]
    differing = [i for i in {*names[0], *names[1]} if names[0].get(i) != names[1].get(i)]
    columns = min([*sizes, *differing])
    # What lies beyond may be special tokens only, which no text turns into.
    beyond = [{i for i in known if i >= columns} for known in names]
    special = [set(t.get_added_vocab().values()) for t in tokenizers]
    same = all(some <= extra for some, extra in zip(beyond, special, strict=True)) and all(
        tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
        for text in (SELF_TEST, "a")
    )
    if not same or not columns:
        raise UserError(
            f"teacher {teacher} ({len(names[0])} tokens) and student {student} ({len(names[1])} "
            "tokens) have different tokenizers, and their logits cannot be compared one by one; "
            "use --align uld, or a teacher with the student's tokenizer."
        )
    if len(set(sizes)) > 1:
        distributed.say(f"logits compared: the first {columns} of {sizes[0]} and {sizes[1]}")
    return columns
