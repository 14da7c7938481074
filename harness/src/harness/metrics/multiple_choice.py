"""Multiple choice scored by likelihood, as HellaSwag is: no letter, the most likely text wins.

The score of a choice is the log-probability of its tokens after the question; the normalised one
is divided by the choice's length in characters (lm-evaluation-harness's `acc` and `acc_norm`).
"""

import math
from collections.abc import Sequence

import torch

from harness.checkpoint.load import context_length
from harness.errors import UserError
from harness.metrics.position_logits import encode, position_logits

PROTOCOL = "likelihood of each choice after the question, 0-shot; norm: per character"


def encode_pair(tokenizer, question: str, choice: str) -> tuple[list[int], list[int]]:
    """Token ids of the question and of the choice after it, split as lm-evaluation-harness does.

    A space joins the two where neither side brings white space. White space that ends the
    question goes to the choice; the whole text is encoded at once and cut after as many tokens as
    the question alone has. An empty question becomes the tokenizer's BOS (else EOS) token.
    """
    body = question.rstrip()
    joint = question[len(body) :]
    if body and not joint and not choice[:1].isspace():
        joint = " "
    if not body:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise UserError("an empty question needs a tokenizer with a BOS or EOS token")
        return [start], encode(tokenizer, joint + choice, special=False)
    context = encode(tokenizer, body)
    continuation = encode(tokenizer, body + joint + choice)[len(context) :]
    # Some tokenizer merges the choice's start into the question's last token.
    return context, continuation or encode(tokenizer, joint + choice, special=False)


def choice_scores(
    model, tokenizer, questions: Sequence[dict], batch_size: int = 16
) -> tuple[list[list[float]], int]:
    """Log-probability in nats of every choice of every question, and how many were cut.

    A text beyond the model's context loses its beginning; cut counts such choices.
    """
    limit = context_length(model.config)
    sequences, positions, targets, owners = [], [], [], []
    # The choices of a question follow the same text, which runs once.
    groups: list[list[int]] = [[] for _ in questions]
    cut = 0
    for number, question in enumerate(questions):
        for slot, choice in enumerate(question["choices"]):
            context, continuation = encode_pair(tokenizer, question["question"], choice)
            if not continuation:
                raise UserError(f"question {number + 1}: choice {slot + 1} is empty")
            whole = context + continuation
            if limit is not None and len(whole) > limit + 1:
                whole = whole[-(limit + 1) :]
                continuation = continuation[-limit:]
                cut += 1
            groups[number].append(len(sequences))
            # The last token is only a target: it need not be fed.
            sequences.append(whole[:-1])
            positions.append(range(len(whole) - 1 - len(continuation), len(whole) - 1))
            targets.append(continuation)
            owners.append((number, slot))
    scores = [[0.0] * len(q["choices"]) for q in questions]
    for index, logits in position_logits(model, sequences, positions, batch_size, "choice", groups):
        target = torch.tensor(targets[index], device=logits.device)
        nll = torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        if math.isnan(nll):
            raise UserError(
                "the model's logits contain NaN: the weights are damaged, or the dtype "
                "overflows (try --dtype bfloat16 or float32)"
            )
        number, slot = owners[index]
        scores[number][slot] = -nll
    return scores, cut


def score(model, tokenizer, questions: Sequence[dict], batch_size: int = 16) -> dict:
    """Accuracy on questions of the form {"question": str, "choices": [str], "answer": int}.

    Returns acc and acc_norm in [0, 1] with their standard errors, n, chance (expected accuracy of
    a guess) and cut (choices that lost their beginning). The first of equal scores wins.
    """
    if not questions:
        raise UserError("the question set is empty")
    scores, cut = choice_scores(model, tokenizer, questions, batch_size)
    right = right_norm = 0
    for question, row in zip(questions, scores, strict=True):
        norm = [s / max(len(c), 1) for s, c in zip(row, question["choices"], strict=True)]
        right += row.index(max(row)) == question["answer"]
        right_norm += norm.index(max(norm)) == question["answer"]
    n = len(questions)
    acc, acc_norm = right / n, right_norm / n
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "acc_stderr": math.sqrt(acc * (1 - acc) / n),
        "acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / n),
        "n": n,
        "chance": sum(1 / len(q["choices"]) for q in questions) / n,
        "cut": cut,
    }
