"""MMLU: reading, prompts, shots that do not fit, scoring, averages."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from harness.errors import UserError
from harness.metrics import mmlu_data
from harness.metrics.mmlu import block, fit, header, letter_tokens, mmlu, summary
from harness.metrics.mmlu_data import CATEGORIES, SUBCATEGORIES, Question, Subject, take

SHARED = Path(__file__).resolve().parents[4] / "shared"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and " B" as one token: the letters are one token or two, as in small vocabularies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", *alphabet, "ĠB"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "B")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=400)
    return GPT2LMHeadModel(config).eval()


def subject(name="anatomy", shots=5, questions=7):
    def one(i):
        return Question(f"q{i}?", (f"{i}", "None", "NA", f"x{i}"), "ABCD"[i % 4])

    return Subject(name, tuple(map(one, range(shots))), tuple(map(one, range(10, 10 + questions))))


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_options_are_read_as_text(tmp_path):
    write(tmp_path / "dev", "anatomy_dev.csv", ["q,1,2,3,4,A"])
    write(tmp_path / "test", "anatomy_test.csv", ['"two\nlines, ""so""",None,NA,,1.50,D'])
    (read,) = mmlu_data.read(str(tmp_path))
    assert read.questions == (Question('two\nlines, "so"', ("None", "NA", "", "1.50"), "D"),)
    assert len(read.shots) == 1


def test_a_bad_line_is_named(tmp_path):
    write(tmp_path / "test", "anatomy_test.csv", ["q,1,2,3,4,A", "q,1,2,3,E"])
    with pytest.raises(UserError, match=r"anatomy_test\.csv, line 2.*found 5 columns"):
        mmlu_data.read(str(tmp_path))
    with pytest.raises(UserError, match="not an MMLU folder"):
        mmlu_data.read(str(tmp_path / "test"))


def test_hub_rows_become_the_same_questions(monkeypatch):
    import datasets

    def rows(name, config, split):
        assert (name, config) == ("cais/mmlu", "all")
        row = {"question": split, "choices": ["None", "b", "c", "d"], "answer": 2}
        return [{**row, "subject": "virology"}, {**row, "subject": "anatomy"}]

    monkeypatch.setattr(datasets, "load_dataset", rows)
    first, second = mmlu_data.read()
    assert (first.name, second.name) == ("anatomy", "virology")
    assert first.questions == (Question("test", ("None", "b", "c", "d"), "C"),)
    assert first.shots[0].question == "dev"


def test_prompt_is_the_originals():
    question = Question("Why?", ("a", "b", "c", "d"), "C")
    assert header("high_school_physics") == (
        "The following are multiple choice questions (with answers) about  high school physics.\n\n"
    )
    assert block(question, True) == "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\n"
    assert block(question, False).endswith("Answer:")


def test_shots_are_dropped_until_the_prompt_fits(tokenizer):
    one = subject()
    question = one.questions[0]
    zero = len(fit(tokenizer, one, question, 0, 10**6, "original")[0])
    shot = len(tokenizer(block(one.shots[0], True))["input_ids"])
    assert fit(tokenizer, one, question, 5, zero + 2 * shot, "original")[1:] == (2, False)
    ids, shots, cut = fit(tokenizer, one, question, 5, zero - 1, "original")
    assert (len(ids), shots, cut) == (zero - 1, 0, True)
    assert tokenizer.decode(ids).endswith("D. x10\nAnswer:")


@pytest.mark.parametrize("prompt", ["original", "llmcbench"])
def test_answers_equal_one_forward_per_letter(model, tokenizer, prompt):
    one = subject()
    letters = letter_tokens(tokenizer, prompt)
    assert {len(x) for x in letters} == ({1, 2} if prompt == "original" else {1})
    right = 0
    for question in one.questions:
        ids, k, _ = fit(tokenizer, one, question, 1, 398, prompt)
        assert k == 1
        scores = []
        for letter in letters:
            total = 0.0
            for i, token in enumerate(letter):
                with torch.no_grad():
                    logits = model(torch.tensor([ids + list(letter[:i])])).logits[0, -1]
                total += logits.double().log_softmax(-1)[token].item()
            scores.append(total)
        right += "ABCD"[scores.index(max(scores))] == question.answer
    result = mmlu(model, tokenizer, [one], shots=1, prompt=prompt, window=399, batch_size=3)
    assert result["micro"] == right / len(one.questions)
    assert (result["n"], result["fewer_shots"], result["cut"]) == (7, 0, 0)


def test_micro_macro_and_tables():
    hits = {"anatomy": [True, True, True, False], "virology": [False], "astronomy": [True]}
    result = summary(hits)
    assert result["micro"] == 4 / 6
    assert result["macro"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert result["subcategories"]["health"] == {"acc": 3 / 5, "n": 5}
    assert result["categories"]["STEM"] == {"acc": 1.0, "n": 1}
    assert "humanities" not in result["categories"]


def test_every_subject_has_one_place():
    subjects = [name for members in SUBCATEGORIES.values() for name in members]
    assert len(subjects) == len(set(subjects)) == 57
    assert sorted(p for parts in CATEGORIES.values() for p in parts) == sorted(SUBCATEGORIES)


def test_limit_is_spread_evenly():
    many = [subject("a", questions=10), subject("b", questions=2), subject("c", questions=10)]
    taken = take(many, 11)
    assert [len(s.questions) for s in taken] == [5, 2, 4]
    assert [q.question for q in taken[0].questions] == ["q10?", "q12?", "q14?", "q16?", "q18?"]
    assert take(many, None) == many and take(many, 11) == taken


def test_too_many_shots_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="anatomy has 2 development"):
        mmlu(model, tokenizer, [subject(shots=2)])


@pytest.mark.realdata
def test_the_real_files():
    folder, path = SHARED / "data/mmlu", SHARED / "models/stories260K"
    if not (folder.exists() and path.exists()):
        pytest.skip("needs ../shared/data/mmlu and ../shared/models/stories260K")
    subjects = mmlu_data.read(str(folder))
    assert {s.name for s in subjects} == {n for m in SUBCATEGORIES.values() for n in m}
    assert sum(len(s.questions) for s in subjects) == 14042
    assert sum("None" in q.options for s in subjects for q in s.questions) >= 7
    # A small vocabulary where " B" is one token and " A" two.
    assert len(letter_tokens(AutoTokenizer.from_pretrained(path), "original")) == 4
