"""The file of responses: what a response's text is, and what an interrupted file goes on from.

That a killed command ends with the same bytes: `packages/minillm/tests/test_minillm_generate.py`.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.errors import UserError
from harness.generation.response_file import continuations, write

WORDS = ["<s>", "▁a", "▁cat", "s", "▁sat", "▁on", "it"]


@pytest.fixture
def tokenizer():
    """Marks where words begin, as LLaMA's does."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def test_a_response_begins_with_its_space(tokenizer):
    assert tokenizer.decode([4, 5]) == "sat on"
    prompts, said = [[0, 1, 2], [0, 1, 2], [0]], [[4, 5], [3, 4, 0], []]
    assert continuations(tokenizer, prompts, said) == [" sat on", "s sat", ""]


def test_an_error_before_the_first_response_leaves_nothing(tokenizer, tmp_path):
    def broken(*asked):
        raise UserError("no")

    for start in (broken, lambda: broken):
        with pytest.raises(UserError, match="no"):
            write(
                tmp_path / "made.jsonl", start, tokenizer, [[1]], [[0]], 3, None, run={}, seed=0,
                resume=True,
            )  # fmt: skip
        assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_asked_again(tokenizer, tmp_path):
    prompts = [[1] * (1 + index % 3) for index in range(7)]
    asked = []

    def ask(some, seeds):
        asked.extend(seeds)
        if len(asked) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[2] * (seed % 4) for seed in seeds]

    def whole(some, seeds):
        asked.extend(seeds)
        return [[2] * (seed % 4) for seed in seeds]

    def run(name, engine, size, identity):
        groups = [list(range(start, min(7, start + size))) for start in range(0, 7, size)]
        return write(
            tmp_path / name, lambda: engine, tokenizer, prompts, groups, 3,
            lambda index, said: {"index": index, **said._asdict()},
            run={"settings": identity}, seed=0, resume=True,
        )  # fmt: skip

    with pytest.raises(UserError, match=r"2 prompts at a time.*smaller --batch-size"):
        run("made.jsonl", ask, 2, "one")
    with pytest.raises(UserError, match="begun by another run"):
        run("made.jsonl", whole, 2, "two")
    asked.clear()
    said = run("made.jsonl", whole, 1, "one")
    assert asked == [2, 3, 4, 5, 6]
    assert [s.tokens for s in said] == [0, 1, 2, 3, 0, 1, 2]
    assert [s.ended for s in said] == [True, True, True, False, True, True, True]
    asked.clear()
    run("straight.jsonl", whole, 3, "one")
    text = (tmp_path / "made.jsonl").read_text()
    assert text == (tmp_path / "straight.jsonl").read_text()
    assert json.loads(text.splitlines()[2]) == {
        "index": 2, "text": " cat cat", "tokens": 2, "ended": True,
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.jsonl", "straight.jsonl"]
