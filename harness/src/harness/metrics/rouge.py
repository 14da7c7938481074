"""Rouge-L as the distillation papers report it (MiniLLM, arXiv 2306.08543, section 3.1)."""

from collections.abc import Sequence

from harness.errors import UserError


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str] | str]) -> float:
    """Mean Rouge-L F measure x 100: stemmed words, the best of each prediction's references.

    `references[i]` is one text or several. Raises UserError when the lengths differ, when there
    is nothing to score or when a prediction has no reference.
    """
    if len(predictions) != len(references) or not predictions:
        raise UserError(
            f"Rouge-L needs one reference list per prediction, got {len(references)} for "
            f"{len(predictions)} predictions"
        )
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    total = 0.0
    for number, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError(f"prediction {number + 1} has no reference")
        total += max(scorer.score(text, prediction)["rougeL"].fmeasure for text in texts)
    return 100 * total / len(predictions)
