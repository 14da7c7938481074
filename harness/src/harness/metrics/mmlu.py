"""MMLU (Hendrycks et al., arXiv 2009.03300): which of the letters A to D does the model put next?

Two prompts. They share their text and differ in how it meets the tokenizer:

- "original": 5 shots; the tokenizer's own special tokens; the letters as they follow "Answer:",
  with their space (the token " A"; where a tokenizer splits that, the probability of its pieces).
- "llmcbench" (NeurIPS 2024 D&B, LLMCBench): 0 shots unless asked; no special tokens; the letters
  encoded alone (the last token of "A").

A prompt beyond the window loses shots from the end until it fits, as both do; one that does not
fit even without shots loses its beginning. Both are counted in the result.
"""

import math
from collections.abc import Sequence

from harness.errors import UserError
from harness.metrics.mmlu_data import CATEGORIES, LETTERS, SUBCATEGORIES, Question, Subject
from harness.metrics.position_logits import encode, position_logits

PROMPTS = {"original": 5, "llmcbench": 0}  # default number of shots
WINDOW = 2048  # tokens; both originals cut there


def header(subject: str) -> str:
    """First line of the prompt. The doubled space is the original's: its scores were made so."""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about  {name}.\n\n"


def block(question: Question, answered: bool) -> str:
    """One question as both prompts show it, with its answer where it is a shot."""
    options = zip(LETTERS, question.options, strict=True)
    lines = [question.question, *(f"{letter}. {text}" for letter, text in options), "Answer:"]
    return "\n".join(lines) + (f" {question.answer}\n\n" if answered else "")


def letter_tokens(tokenizer, prompt: str) -> list[tuple[int, ...]]:
    """The token ids that stand for the four letters after "Answer:", mostly one each.

    Raises UserError when the tokenizer cannot tell the letters apart.
    """
    if prompt == "llmcbench":
        letters = [tuple(encode(tokenizer, x, special=False)[-1:]) for x in LETTERS]
    else:
        stub = len(encode(tokenizer, "Answer:"))
        letters = [tuple(encode(tokenizer, f"Answer: {x}")[stub:]) for x in LETTERS]
    if len(set(letters)) < len(LETTERS) or not all(letters):
        raise UserError("this model's tokenizer has no separate tokens for the letters A to D")
    return letters


def fit(tokenizer, subject: Subject, question: Question, shots: int, window: int, prompt: str):
    """(token ids, shots left, whether the question itself was cut) of one prompt."""
    special = prompt == "original"
    for k in range(min(shots, len(subject.shots)), -1, -1):
        examples = "".join(block(shot, answered=True) for shot in subject.shots[:k])
        text = header(subject.name) + examples + block(question, answered=False)
        ids = encode(tokenizer, text, special=special)
        if len(ids) <= window:
            return ids, k, False
    return ids[-window:], 0, True


# The protocol in its order.
def mmlu(  # noqa: C901
    model,
    tokenizer,
    subjects: Sequence[Subject],
    *,
    shots: int | None = None,
    prompt: str = "original",
    window: int = WINDOW,
    batch_size: int = 8,
) -> dict:
    """Accuracy in [0, 1] on `subjects` (see `mmlu_data.read`, `mmlu_data.take`).

    `shots` None is the prompt's default; `window` in tokens, at most the model's context. Returns
    micro (over questions) with its standard error, macro (over subjects), n, shots, fewer_shots
    and cut (numbers of questions), and the tables subjects, subcategories and categories (micro
    averages, {"acc", "n"} each; the last two only of the benchmark's own subjects).
    """
    shots = PROMPTS[prompt] if shots is None else shots
    for subject in subjects:
        if len(subject.shots) < shots:
            raise UserError(
                f"{shots} shots asked, but {subject.name} has {len(subject.shots)} development "
                "questions; use fewer shots"
            )
    letters = letter_tokens(tokenizer, prompt)
    # What must be fed after the prompt: nothing, unless a tokenizer splits a letter's text.
    fed = sorted({letter[:-1] for letter in letters})
    room = window - max(len(tokens) for tokens in fed)
    asked = [(subject, question) for subject in subjects for question in subject.questions]
    if not asked:
        raise UserError("MMLU has no questions to ask")
    sequences, positions = [], []
    alike: dict[tuple[str, int], list[int]] = {}  # same header and shots
    fewer = cut = 0
    for subject, question in asked:
        ids, k, was_cut = fit(tokenizer, subject, question, shots, room, prompt)
        fewer += k < shots
        cut += was_cut
        for tokens in fed:
            alike.setdefault((subject.name, -1 if was_cut else k), []).append(len(sequences))
            sequences.append(ids + list(tokens))
            positions.append(range(len(ids) - 1, len(ids) + len(tokens)))
    scores = [[0.0] * len(LETTERS) for _ in asked]
    for index, logits in position_logits(
        model, sequences, positions, batch_size, "mmlu", list(alike.values())
    ):
        number, tokens = index // len(fed), fed[index % len(fed)]
        log_p = logits.log_softmax(-1)
        if log_p.isnan().any():
            raise UserError(
                "the model's logits contain NaN: the weights are damaged, or the dtype "
                "overflows (try --dtype bfloat16 or float32)"
            )
        for slot, letter in enumerate(letters):
            if letter[:-1] == tokens:
                scores[number][slot] = sum(log_p[i, t].item() for i, t in enumerate(letter))
    hits: dict[str, list[bool]] = {subject.name: [] for subject in subjects}
    for (subject, question), row in zip(asked, scores, strict=True):
        hits[subject.name].append(LETTERS[row.index(max(row))] == question.answer)
    return {**summary(hits), "shots": shots, "prompt": prompt, "fewer_shots": fewer, "cut": cut}


def summary(hits: dict[str, list[bool]]) -> dict:
    """Averages and tables of right and wrong answers by subject."""

    def row(names: Sequence[str]) -> dict:
        answers = [hit for name in names for hit in hits.get(name, ())]
        return {"acc": sum(answers) / len(answers), "n": len(answers)} if answers else {}

    subjects = {name: row([name]) for name in hits if hits[name]}
    subcategories = {name: row(members) for name, members in SUBCATEGORIES.items()}
    categories = {
        name: row([subject for part in parts for subject in SUBCATEGORIES[part]])
        for name, parts in CATEGORIES.items()
    }
    micro = row(list(hits))
    return {
        "micro": micro["acc"],
        "micro_stderr": math.sqrt(micro["acc"] * (1 - micro["acc"]) / micro["n"]),
        "macro": sum(r["acc"] for r in subjects.values()) / len(subjects),
        "n": micro["n"],
        "subjects": subjects,
        "subcategories": {k: v for k, v in subcategories.items() if v},
        "categories": {k: v for k, v in categories.items() if v},
    }
