"""A teacher in memory: which of its logits mean what the student's mean, and the loss towards it.

Legend: B examples in a micro-batch, T tokens of the longest of them.
"""

from harness import distributed
from harness.checkpoint import load
from harness.errors import UserError
from harness.losses import from_hidden
from harness.losses.divergence import RowFunction
from harness.training import validation
from harness.training.batching import IGNORED

SELF_TEST = "def f(x):\n    return 'Ünïcode', [x + 1, 2e-3]  # 日本 <s> </s>\n\n\tThe end."


def shared_columns(teacher: str, student: str, otherwise: str = "") -> int:
    """How many logits of teacher and student, from the first, are of the same tokens.

    Padding of the embeddings beyond the tokens (Qwen's 151,936 against 152,064) and special tokens
    that only one of the two has are cut. The distributions over the rest are what is compared.

    Args:
        otherwise: what else the user may do where the tokenizers differ.

    Raises:
        UserError: they differ.
    """
    folders = [load.resolve(name) for name in (teacher, student)]
    sizes = [load.load_config(f).get_text_config().vocab_size for f in folders]
    tokenizers = [load.load_tokenizer(f) for f in folders]
    names = [{i: token for token, i in t.get_vocab().items()} for t in tokenizers]
    differing = [i for i in {*names[0], *names[1]} if names[0].get(i) != names[1].get(i)]
    columns = min([*sizes, *differing])
    # What lies beyond may be special tokens only, which no text turns into.
    beyond = [{i for i in tokens if i >= columns} for tokens in names]
    special = [set(t.get_added_vocab().values()) for t in tokenizers]
    same = all(ids <= added for ids, added in zip(beyond, special, strict=True)) and all(
        tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
        for text in (SELF_TEST, "a")
    )
    if not same or not columns:
        raise UserError(
            f"teacher {teacher} ({len(names[0])} tokens) and student {student} ({len(names[1])} "
            "tokens) have different tokenizers, and their logits cannot be compared one by one; "
            f"use {otherwise}a teacher with the student's tokenizer."
        )
    if len(set(sizes)) > 1:
        distributed.say(f"logits compared: the first {columns} of {sizes[0]} and {sizes[1]}")
    return columns


def over_labels(teacher, rows: RowFunction, columns: int | None, fused: bool, running, batch: dict):
    """``rows`` over teacher and student at every label of a batch: a loss of
    `training.loop.train` once its first four arguments are given.

    Args:
        teacher: a causal LM in eval mode. columns: of both models' logits, the first so many.
        rows: log-probabilities of both [R, V] and labels [R] -> [R, 3]: the loss, and of what cross
            entropy and divergence it is made (:func:`harness.losses.from_hidden.mix_rows`).
        fused: as in :func:`harness.losses.from_hidden.over_models`.
        running: an engine. batch: input_ids, attention_mask and labels, [B, T].
    """
    inputs = validation.inputs_of(batch, running.device)
    labels = batch["labels"].to(running.device)
    total, ce, divergence = from_hidden.over_models(
        rows, teacher, running, inputs, labels != IGNORED, [labels.clamp_min(0)], columns, fused
    )
    return total, {"ce": ce, "kd": divergence}
