"""The recipe of the embedded models: its n-gram baselines, its tokenizer, one short training."""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

RECIPES = Path(__file__).parents[3] / "recipes"
pytestmark = pytest.mark.skipif(not RECIPES.is_dir(), reason="the recipes are not installed")


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kneser_ney_against_counting_by_hand():
    ngram = load("ngram")
    tokens = np.array([0, 1, 0, 1, 2, 0, 2, 1, 0, 1])
    levels = ngram.fit(tokens, base=4, order=2)
    pairs = [tuple(map(int, pair)) for pair in pairwise(tokens)]
    kinds = set(pairs)
    ones = sum(pairs.count(pair) == 1 for pair in kinds)
    twos = sum(pairs.count(pair) == 2 for pair in kinds)
    discount = ones / (ones + 2 * twos)
    predecessors = {w: sum(pair[1] == w for pair in kinds) for w in range(4)}
    single = sum(count == 1 for count in predecessors.values())
    double = sum(count == 2 for count in predecessors.values())
    low = single / (single + 2 * double) if single else 0.5

    def unigram(word):
        seen = sum(count > 0 for count in predecessors.values())
        share = max(predecessors[word] - low, 0) + low * seen / 4
        return share / len(kinds)

    def bigram(first, word):
        after = [pair for pair in pairs if pair[0] == first]
        share = max(after.count((first, word)) - discount, 0)
        return (share + discount * len(set(after)) * unigram(word)) / len(after)

    for first in range(3):
        windows = np.array([[first, word] for word in range(4)])
        found = np.exp(ngram.log_probabilities(levels, windows, 4)[:, 0])
        assert found == pytest.approx([bigram(first, word) for word in range(4)])
        assert found.sum() == pytest.approx(1)


def test_four_grams_sum_to_one_and_beat_unigrams():
    ngram = load("ngram")
    draw = np.random.default_rng(0)
    tokens = np.cumsum(draw.integers(0, 3, 3000)) % 7
    levels = ngram.fit(tokens, 8, 4)
    for context in ([0, 1, 2], [7, 7, 7], [3, 7, 4]):
        windows = np.array([[*context, word] for word in range(8)])
        total = np.exp(ngram.log_probabilities(levels, windows, 8)[:, 2]).sum()
        assert total == pytest.approx(1)
    windows = tokens[-500:].reshape(5, 100)
    four = ngram.log_probabilities(levels, windows, 8).mean()
    assert four > ngram.unigram_log_probabilities(tokens, windows, 8).mean() + 0.5
    assert -four == pytest.approx(math.log(3), abs=0.1)  # the entropy of the source


def test_tokenizer_is_lossless_and_spends_one_token_on_an_indent():
    recipe = load("train_tiny")
    tokenizer = recipe.build_tokenizer(["def f(x):\n        return x\n" * 50])
    text = "def é(x):\n        return  x\t日本\n\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert "Ċ" + "Ġ" * 8 in tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer(recipe.END)["input_ids"] == [tokenizer.eos_token_id] == [0]


def test_training_step_by_step_writes_a_better_checkpoint(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    recipe = load("train_tiny")
    monkeypatch.setattr(recipe, "CONTEXT", 32)
    monkeypatch.setattr(recipe, "VOCABULARY", 300)
    tokens = (np.arange(3000) % 17).astype(np.uint16)
    for split in ("train", "calibration", "test"):
        np.save(tmp_path / f"{split}.npy", tokens)
    tokenizer = recipe.build_tokenizer(["x = 1\n"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe.main(["train", str(tmp_path), "tiny-llama-student", "--epochs", "2", "--lr", "0.01"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-llama-student")
    assert str(model.dtype) == "torch.bfloat16"
    assert recipe.mean_loss(model, recipe.windows(tokens), "cpu") < 0.7 * math.log(17)
