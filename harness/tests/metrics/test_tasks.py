"""lm-evaluation-harness on a task of our own, offline; and Rouge-L by hand."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.errors import UserError
from harness.metrics import tasks
from harness.metrics.multiple_choice import score
from harness.metrics.rouge import rouge_l

STORIES = Path(__file__).resolve().parents[4] / "shared/models/stories260K"
QUESTIONS = [
    {"question": "Once upon a", "choices": ["time there was", "mile", "fox of"], "answer": 0},
    {"question": "Lily wanted to", "choices": ["integral", "play", "because"], "answer": 1},
    {"question": "The dog was very", "choices": ["of", "mayor", "happy and ran"], "answer": 2},
    {"question": "He said,", "choices": ['"Thank you!"', "zebra"], "answer": 0},
]
YAML = """
task: our_quiz
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 3}
"""


def test_only_the_folders_asked_for(tmp_path):
    for name in ("piqa", "arc", "arc/deep"):
        (tmp_path / name).mkdir()
    (tmp_path / "piqa/piqa.yaml").write_text("task: piqa\n")
    (tmp_path / "arc/deep/easy.yaml").write_text("tag: x\ntask: arc_easy\n")
    assert tasks.task_folders(["arc_easy"], tmp_path) == [tmp_path / "arc"]
    with pytest.raises(UserError, match=r"no task 'pica'\. Did you mean 'piqa'\?"):
        tasks.task_folders(["piqa", "pica"], tmp_path)


def test_missing_lm_eval_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install"):
        tasks.check(["piqa"])


@pytest.mark.slow
@pytest.mark.realdata
def test_lm_eval_and_our_choice_agree(tmp_path, monkeypatch):
    """Two independent implementations of likelihood-scored multiple choice."""
    pytest.importorskip("lm_eval")
    if not STORIES.exists():
        pytest.skip("needs ../shared/models/stories260K")
    data = tmp_path / "quiz.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "quiz.yaml").write_text(YAML.replace("FILE", str(data)))
    monkeypatch.setattr(tasks, "check", lambda _: [folder])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    theirs = tasks.zero_shot(model, tokenizer, ["our_quiz"])["our_quiz"]
    ours = score(model, tokenizer, QUESTIONS)
    assert theirs["acc"] == ours["acc"] and theirs["acc_norm"] == ours["acc_norm"]
    assert (theirs["n"], theirs["version"]) == (4, 3)


def test_rouge_takes_the_best_reference_and_stems():
    # "cats sat" against "a cat sat": LCS 2 after stemming, P 1, R 2/3, F 0.8.
    assert rouge_l(["cats sat"], ["a cat sat"]) == pytest.approx(80.0)
    assert rouge_l(["cats sat"], [["nothing here", "a cat sat"]]) == pytest.approx(80.0)
    assert rouge_l(["a b", "c"], [["a b"], ["d"]]) == pytest.approx(50.0)
    with pytest.raises(UserError, match="one reference list per prediction"):
        rouge_l(["a"], [])
