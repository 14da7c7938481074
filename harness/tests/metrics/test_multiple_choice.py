"""Likelihood-scored multiple choice against a direct sum of log-probabilities."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from harness.errors import UserError
from harness.metrics.multiple_choice import choice_scores, encode_pair, score


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", *alphabet])}
    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner = Tokenizer(models.BPE(vocab={**vocab, "Ġa": len(vocab)}, merges=[("Ġ", "a")]))
    inner.pre_tokenizer = space
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=40)
    return GPT2LMHeadModel(config).eval()


QUESTIONS = [
    {"question": "def f(x):\n", "choices": ["    return x", "    pass", "a"], "answer": 1},
    {"question": "the sky is", "choices": ["blue", "a", "green or so"], "answer": 0},
    {"question": "", "choices": ["abc", "b"], "answer": 1},
]


def log_probability(model, context, continuation) -> float:
    """One token at a time, one forward each."""
    total = 0.0
    for i, token in enumerate(continuation):
        ids = torch.tensor([context + continuation[:i]])
        with torch.no_grad():
            total += model(ids).logits[0, -1].double().log_softmax(-1)[token].item()
    return total


def test_white_space_goes_to_the_choice(tokenizer):
    question, choice = encode_pair(tokenizer, "x \n", "  y")
    assert tokenizer.decode(question) == "x"
    assert tokenizer.decode(choice) == " \n  y"
    # The missing space is supplied, and merges with the word as it would in running text.
    assert tokenizer.convert_ids_to_tokens(encode_pair(tokenizer, "is", "a")[1]) == ["Ġa"]
    assert encode_pair(tokenizer, "", "b")[0] == [0]


def test_scores_equal_token_by_token(model, tokenizer):
    scores, cut = choice_scores(model, tokenizer, QUESTIONS, batch_size=3)
    assert cut == 0
    for question, row in zip(QUESTIONS, scores, strict=True):
        for choice, value in zip(question["choices"], row, strict=True):
            pair = encode_pair(tokenizer, question["question"], choice)
            assert value == pytest.approx(log_probability(model, *pair), abs=1e-4)


def test_raw_and_normalised_accuracy(model, tokenizer):
    scores, _ = choice_scores(model, tokenizer, QUESTIONS)
    raw = [max(range(len(row)), key=row.__getitem__) for row in scores]
    questions = [{**q, "answer": best} for q, best in zip(QUESTIONS, raw, strict=True)]
    result = score(model, tokenizer, questions)
    assert result["acc"] == 1.0 and result["n"] == 3
    # "a" wins by raw likelihood because it is short; per character a longer choice does.
    assert result["acc_norm"] < 1.0
    assert result["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)


def test_a_long_question_loses_its_beginning(model, tokenizer):
    tail = "z" * 30
    questions = [{"question": "q" * 50 + tail, "choices": [" aaaaaaaaa", " b"], "answer": 0}]
    scores, cut = choice_scores(model, tokenizer, questions)
    assert cut == 2
    context, continuation = encode_pair(tokenizer, questions[0]["question"], " aaaaaaaaa")
    kept = (context + continuation)[-41:]
    expected = log_probability(model, kept[: -len(continuation)], continuation)
    assert scores[0][0] == pytest.approx(expected, abs=1e-4)


def test_empty_set_is_the_users_to_mend(model, tokenizer):
    with pytest.raises(UserError, match="empty"):
        score(model, tokenizer, [])
