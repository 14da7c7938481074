"""The examples of --data: instructions or windows of a text, trained on or held out."""

from collections.abc import Callable

from bitdistiller import flags
from harness.checkpoint.load import context_length, example_length
from harness.data import example_sets
from harness.data.example_sets import Examples
from harness.training import batching

LONGEST = 1024


def length(asked: int | None, config) -> int:
    """--model_max_length, for a model with this transformers config."""
    return example_length("--model_max_length", asked, LONGEST, context_length(config))


def read(settings: flags.Data, tokenizer, longest: int, part: str, alone: bool = False) -> Examples:
    """Part "train" or "validation" of the flags' data, at most ``longest`` tokens each.

    Args:
        alone: the data serves for this part alone (`harness.data.example_sets.pairs`).

    Raises:
        UserError: no such data, a row without prompt and response (with its line), nothing left.
    """
    training = part == "train"
    return example_sets.read(
        tokenizer, settings.data if training else settings.eval_data or settings.data, part,
        length=longest, alone=alone, train_on_inputs=settings.train_on_inputs,
        limit=settings.max_train_samples if training else settings.max_eval_samples,
    )  # fmt: skip


def collate(examples: Examples, tokenizer, per_example: bool, stored=None) -> Callable:
    """Indices -> their micro-batch, with the rows of ``stored``, a teacher's cache, if any.

    Args:
        per_example: the loss is divided by examples, as the original does, not by labels.
    """
    pad = batching.pad_id(tokenizer)

    def batch(indices: list[int]) -> dict:
        collated = batching.collate([examples[i] for i in indices], pad)
        if per_example:
            collated["tokens"] = len(indices)
        return collated | (stored.rows(indices) if stored else {})

    return batch
