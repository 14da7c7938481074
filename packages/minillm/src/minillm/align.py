"""Distillation across tokenizers: universal logit distillation at aligned places of the text.

Two tokenizers cut a text at different places. Where both end a token at the same character, both
models have read the same text and predict what follows: those places are compared, the others are
not. Tokens mean nothing to each other, so the two distributions are compared as what they are
without names: sorted by probability, the smaller vocabulary padded with zeros (Boizard et al.,
arXiv 2402.12030, eq. 3, where positions are paired by their number instead).

Letters: B examples, T positions of the teacher, S of the student, V and W their vocabularies.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.losses import from_hidden
from harness.losses.divergence import LOG_ZERO, sum_over_rows

Side = tuple[list[int], list[int], int]


def uld_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """L1 distance of the sorted probabilities per row, 0 to 2: a row function (losses.py)."""
    p, q = (logs.exp().sort(-1, descending=True).values for logs in (log_p, log_q))
    return (p - q).abs().sum(-1)


def uld_loss(
    teacher_logits: Tensor, student_logits: Tensor, masks: tuple[Tensor, Tensor]
) -> Tensor:
    """Sum of `uld_rows` over the places that pair up, in order; gradients reach the student.

    Args:
        teacher_logits, student_logits: [B, T, V] and [B, S, W], any float dtype.
        masks: bool [B, T] and [B, S], equally many places of each example.
    """
    theirs, ours = masks
    if not torch.equal(theirs.sum(1), ours.sum(1)):
        raise ValueError("each example needs as many places of the teacher as of the student")
    p, q = teacher_logits[theirs], student_logits[ours]
    wide = max(p.shape[-1], q.shape[-1])
    # A token that the other side lacks has probability 0 there.
    p, q = (F.pad(x, (0, wide - x.shape[-1]), value=LOG_ZERO) for x in (p, q))
    return sum_over_rows(uld_rows, p, q)


def encode(tokenizer, prompt: str, response: str) -> Side:
    """(ids with the end token, ends, first): ``ends[i]`` is how many of the response's characters
    token ``first + i`` and those before it spell, and ``first`` the number of prompt tokens.

    Prompt and response are encoded apart, so that both tokenizers have a token end between them.
    The tokenizer must be a fast one, which tells where its tokens lie.
    """
    head = tokenizer(prompt, verbose=False)["input_ids"]
    if head[-1:] == [tokenizer.eos_token_id] and len(head) > 1:
        head = head[:-1]  # some tokenizers end every text
    encoded = tokenizer(
        response, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    return [*head, *ids, tokenizer.eos_token_id], [*ends, len(response)], len(head)


def places(teacher: Side, student: Side, longest: int) -> tuple[list[int], list[int]]:
    """Positions of teacher and student, as many, after which both have read the same text.

    The prompt's last token is the first of them; of tokens that end at the same character (pieces
    of one letter, the end token's place) the last counts. None is beyond ``longest`` tokens.
    """
    where = []
    for ids, ends, first in (teacher, student):
        # The end token itself is predicted, never read: its position predicts nothing.
        read = {0: first - 1} | {end: first + i for i, end in enumerate(ends[:-1])}
        where.append({end: at for end, at in read.items() if at + 1 < min(len(ids), longest)})
    common = sorted(where[0].keys() & where[1].keys())
    return [where[0][end] for end in common], [where[1][end] for end in common]


def batch(
    pairs: list[dict], teacher_tokenizer, student_tokenizer, longest: int, pads: tuple[int, int]
) -> dict:
    """A micro-batch of {"prompt", "response"} for both models, padded on the right.

    Returns:
        `training.batching.collate` of the student's side (labels: all of the response's tokens),
        its places under "places", bool [B, S], and the teacher's "teacher_ids", "teacher_attention"
        and "teacher_places" [B, T].
    """
    from harness.training.batching import collate

    aligned = []
    for pair in pairs:
        sides = [
            encode(tokenizer, pair["prompt"], pair["response"])
            for tokenizer in (teacher_tokenizer, student_tokenizer)
        ]
        aligned.append((*sides, *places(*sides, longest)))
    teacher = collate([_row(side, longest) for side, _, _, _ in aligned], pads[0])
    student = collate([_row(side, longest) for _, side, _, _ in aligned], pads[1])
    theirs, ours = (torch.zeros_like(some["labels"]).bool() for some in (teacher, student))
    for row, (_, _, at, mine) in enumerate(aligned):
        theirs[row, at] = True
        ours[row, mine] = True
    return student | {
        "places": ours, "teacher_ids": teacher["input_ids"],
        "teacher_attention": teacher["attention_mask"], "teacher_places": theirs,
    }  # fmt: skip


def _row(side: Side, longest: int) -> tuple[Tensor, int]:
    return torch.tensor(side[0][:longest]), side[2]


def distillation(teacher, kd_ratio: float, running, some: dict):
    """(1 - kd_ratio) cross entropy + kd_ratio ULD: (its sum over a `batch`, its parts).

    ULD's mean over the aligned places counts as one of every response token.
    """
    from harness.training.batching import IGNORED

    device = running.device
    with torch.no_grad():
        p = teacher(
            input_ids=some["teacher_ids"].to(device),
            attention_mask=some["teacher_attention"].to(device),
            use_cache=False,
        ).logits
    q = running(
        input_ids=some["input_ids"].to(device),
        attention_mask=some["attention_mask"].to(device),
        use_cache=False,
    ).logits
    labels = some["labels"].to(device)
    mask = labels != IGNORED
    ce = sum_over_rows(from_hidden.cross_entropy_rows, q, q, mask, extras=[labels.clamp_min(0)])
    masks = some["teacher_places"].to(device), some["places"].to(device)
    share = some["tokens"] / max(1, int(masks[1].sum()))
    uld = uld_loss(p, q, masks) * share
    return (1 - kd_ratio) * ce + kd_ratio * uld, {"ce": ce, "uld": uld}
