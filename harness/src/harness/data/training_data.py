"""Texts and instruction sets as training and validation examples.

An example is (ids, first): token ids int32 [T], and the first position that is predicted; those
before it (the prompt) are read only. Shapes: T tokens per example, at most `seqlen`.
"""

import random
from pathlib import Path

import torch

from harness.data import corpora, files, stdlib
from harness.errors import UserError

Example = tuple[torch.Tensor, int]


def is_instructions(dataset: str) -> bool:
    """Whether `dataset` has prompts and responses (else it is a text)."""
    if dataset in corpora.DATASETS or not Path(dataset).exists():
        return dataset in corpora.INSTRUCTIONS
    chosen, _ = files.select(Path(dataset), "train")
    first = next((names for path in chosen for _, names, _ in corpora.read(path)), None)
    return first is not None and first.kind != "text"


def load(
    tokenizer,
    dataset: str,
    *,
    seqlen: int,
    held_out: int,
    limit: int | None = None,
    train_on_inputs: bool = False,
    seed: int = 0,
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples of `dataset`, disjoint, equal per seed.

    A text is cut into non-overlapping windows of `seqlen` tokens, the tail dropped. `stdlib` trains
    on its train split and is validated on its calibration split, which the embedded models were not
    trained on; of other texts a part of the train split is held out. The test split is never read.

    Args:
        held_out: at most so many validation examples, and at most a tenth of what there is.
        limit: at most so many training examples, drawn at random.
        train_on_inputs: predict the prompt of instructions too.

    Raises:
        UserError: no such dataset, or fewer than two examples.
    """
    if is_instructions(dataset):
        train = _instructions(tokenizer, dataset, "train", seqlen, train_on_inputs)
        held = _instructions(tokenizer, dataset, "validation", seqlen, train_on_inputs)
    elif dataset == "stdlib":
        train = _windows(_encode(tokenizer, stdlib.text("train")), seqlen)
        held = _windows(_encode(tokenizer, stdlib.text("calibration")), seqlen)
    else:
        wanted = None if limit is None else (limit + held_out) * seqlen
        ids = _text_ids(tokenizer, dataset, wanted, seed)
        train = _windows(ids, seqlen)
        held = None
        if len(train) < 2:
            raise UserError(
                f"{dataset}: its {len(ids)} tokens fill {len(train)} windows of {seqlen}, and two "
                "are the least (one to train on, one held out); use a shorter --cutoff_len or more "
                "text"
            )
    random.Random(seed).shuffle(train)
    if held is None:
        count = max(1, min(held_out, len(train) // 10))
        train, held = train[count:], train[:count]
    random.Random(seed).shuffle(held)
    train, held = train[:limit], held[:held_out]
    if not train or not held:
        raise UserError(
            f"{dataset}: {len(train)} training and {len(held)} validation examples of at most "
            f"{seqlen} tokens; use more data or a longer --cutoff_len"
        )
    return train, held


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def _windows(ids: list[int], seqlen: int) -> list[Example]:
    whole = torch.tensor(ids[: len(ids) // seqlen * seqlen], dtype=torch.int32)
    return [(window, 1) for window in whole.view(-1, seqlen)]


def _text_ids(tokenizer, dataset: str, wanted: int | None, seed: int) -> list[int]:
    """Tokens of the train split; of c4 and pileval, of random documents, `wanted` at least."""
    if dataset not in ("c4", "pileval"):
        return _encode(tokenizer, corpora.corpus_text(dataset, "train", tokenizer=tokenizer))
    documents = corpora.corpus_documents(dataset, "train")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    for index in order:
        ids += _encode(tokenizer, documents[index])
        if wanted is not None and len(ids) >= wanted:
            break
    return ids


def _instructions(tokenizer, dataset, split, seqlen, train_on_inputs) -> list[Example]:
    """Prompt, response and end token, cut at `seqlen`; none of whose response nothing is left."""
    examples = []
    for pair in corpora.instructions(dataset, split, tokenizer):
        prompt = _encode(tokenizer, pair["prompt"])
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            prompt.pop()
        # Together, as a model will read it: the border may fall inside a token.
        ids = _encode(tokenizer, pair["prompt"] + pair["response"])
        if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        ids = ids[:seqlen]
        first = 1 if train_on_inputs else max(1, len(prompt))
        if first < len(ids):
            examples.append((torch.tensor(ids, dtype=torch.int32), first))
    return examples
