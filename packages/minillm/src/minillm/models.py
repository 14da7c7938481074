"""Student and teacher: load them, and put LoRA on."""

from pathlib import Path

import torch

from harness.checkpoint import load, quantconfig
from harness.errors import UserError, one_line
from harness.quant import masks
from harness.training import lora
from minillm import flags


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


def with_lora(student, settings, dtype: torch.dtype):
    """``student`` as it is trained, in LoRA's adapters where settings (flags.Peft and Shared) want
    them, and what makes a plain model of ``dtype`` of the trained tensors, or None.

    Raises:
        UserError: LoRA would fill the zeros of a pruned model.
    """
    options = flags.lora(settings)
    if not options:
        return student, None
    masks.ask_before_merging(student, settings.model, settings.densify, "leave --peft out")

    def finish(tensors):
        plain = load_student(
            settings.model, device="cpu", dtype=torch.float32, peft_path=settings.peft_path
        )
        return lora.merged(plain, tensors, dtype, **options)

    return lora.add(student, **options), finish
