"""`harness generate`: greedy texts against a loop of whole forwards; columns; bad input."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from harness.cli import main
from harness.commands import generate


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    for seed, name in enumerate(("one", "two")):
        families.save("llama", name, tokenizer=True, seed=seed)
    return "one", "two"


@torch.no_grad()
def greedy(folder, prompt, count):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1)[None]], dim=1)
        if ids[0, -1] == 0:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_texts_are_greedy(models, capsys):
    prompts = ["def add(", "for number in"]
    words = ["generate", *models, "--max_new_tokens", "8"]
    assert main([*words, "--prompt", prompts[0], "--prompt", prompts[1]]) == 0
    output = capsys.readouterr().out
    assert output.count("tokens/s)") == 4
    for part, prompt in zip(output.split("=== ")[1:], prompts, strict=True):
        assert part.startswith(prompt)
        for model in models:
            assert greedy(model, prompt, 8).rstrip() in part


def test_columns_where_there_is_room():
    answers = [("a (1.0 tokens/s)", "if x:\n    return " + "y" * 50), ("b", "z\n\nz")]
    wide = generate.layout(answers, 80).splitlines()
    assert wide[0] == "a (1.0 tokens/s)".ljust(41) + "b"
    assert wide[2] == "if x:".ljust(41) + "z"
    assert wide[4].startswith("y") and wide[4].endswith(" z")
    assert max(map(len, wide)) <= 80
    assert generate.layout(answers, 60) == (
        f"--- a (1.0 tokens/s)\n{answers[0][1]}\n--- b\n{answers[1][1]}"
    )


def test_default_prompts_are_function_heads():
    prompts = generate.default_prompts()
    assert len(set(prompts)) == 3
    for prompt in prompts:
        assert prompt.startswith(("def ", "async def ")) and prompt.endswith('"""')


def test_bad_input_is_one_line(models, capsys):
    for words, line in (
        (["none"], "none"),
        (["one", "--max-new-tokens", "0"], "expected 1 or more"),
        (["one", "--max-new-tokens", "64", "--prompt", "x"], "context of one, 64"),
        (["one", "--prompt", ""], "empty prompt"),
        (["one", "--dtype", "auto", "--device", "gpu"], "device gpu"),
    ):
        assert main(["generate", *words]) == 2
        *said, error = capsys.readouterr().err.strip().splitlines()
        assert line in error and all("computing in" in line for line in said)
