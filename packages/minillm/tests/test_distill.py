"""The chain: every step in its order, what is finished kept, and a failure the end of it."""

import json

import pytest
import yaml

import families
import minillm
from harness.errors import UserError
from minillm import finetune, train_minillm
from minillm.chain import StepFailed
from minillm.distill import main

SHORT = "--max-length 32 --max-prompt-length 16 --total-iters 2 --batch-size 4 --lr 1e-3"
WORDS = [
    "teacher", "student", "--data", "pairs", "--out", "out", "--enable-sft-teacher",
    f"--all={SHORT}", "--minillm=--num-rollouts 8 --gradient-accumulation-steps 1",
    "--evaluate=--max-length 32 --max-prompt-length 16 --seeds 10 20",
]  # fmt: skip
MADE = ["minillm", "results-minillm.json", "results-sft.json", "results-teacher.json", "sft",
        "teacher"]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    families.save("llama", tmp_path / "teacher", tokenizer=True)
    families.save("llama", tmp_path / "student", tokenizer=True, seed=1)
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [
        {"prompt": families.TEXT[i : i + 5], "response": families.TEXT[2 * i : 3 * i + 4]}
        for i in range(12)
    ]
    for name, some in (("train", rows), ("valid", rows[:2]), ("test", rows[2:6])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(place):
    return sorted(path.name for path in (place / "out").iterdir())


def steps_of(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())["steps"]


def counting(monkeypatch, module, code=None):
    real, calls = module.main, []

    def counted(words):
        calls.append(words)
        return real(words) if code is None else code

    monkeypatch.setattr(module, "main", counted)
    return calls


def test_the_chain_runs_once_and_stays(place, monkeypatch, capsys):
    tuned, distilled = counting(monkeypatch, finetune), counting(monkeypatch, train_minillm)
    assert main(WORDS) == 0
    shown = capsys.readouterr()
    assert listed(place) == MADE and len(tuned) == 2 and len(distilled) == 1
    assert tuned[0][0] == "teacher" and tuned[1][0] == "student"
    assert distilled[0][:3] == ["out/sft", "--teacher", "out/teacher"]
    steps = steps_of(place / "out/minillm")
    assert [step["method"] for step in steps] == ["sft", "minillm"]
    assert steps[0]["command"].startswith("python -m minillm.finetune student --data pairs")
    rows = [line for line in shown.out.splitlines() if line.startswith("| ")]
    names = [row.split("|")[1].strip() for row in rows[-3:]]
    assert names == ["teacher", "sft", "minillm"] and "Rouge-L pairs" in shown.out
    results = json.loads((place / "out/results-sft.json").read_text())
    assert list(results["metrics"]["rouge-l pairs"]["details"]["seeds"]) == ["10", "20"]
    assert main(WORDS) == 0
    again = capsys.readouterr()
    assert again.err.count("made before, kept") == 3 and len(tuned + distilled) == 3
    assert [row for row in again.out.splitlines() if row.startswith("| ")][-3:] == rows[-3:]
    # Other settings are not taken for these.
    assert main([*WORDS, "--sft=--epochs 1"]) == 2
    assert "out/sft is there, made by `python -m minillm.finetune" in capsys.readouterr().err
    assert main([*WORDS, "--seed", "1", "--overwrite"]) == 0
    assert steps_of(place / "out/sft")[-1]["settings"]["seed"] == 1


def test_a_failure_stops_the_chain_with_its_reason(place, capsys):
    assert main([*WORDS, "--minillm=--lr -1"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    reason = "learning rate -1.0: expected a number above 0."
    assert shown[-1] == f"distill: MiniLLM ended with exit code 2: {reason}"
    assert shown[-2] == f"error: {reason}"
    assert listed(place) == ["sft", "teacher"]
    kept = (place / "out/sft/model.safetensors").stat().st_mtime_ns
    assert main(WORDS) == 0
    assert capsys.readouterr().err.count("made before, kept") == 2
    assert listed(place) == MADE
    assert (place / "out/sft/model.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_steps_exit_code_is_the_chains(place, monkeypatch, capsys, code):
    tuned = counting(monkeypatch, finetune, code)
    assert main(WORDS) == code
    assert len(tuned) == 1
    assert f"SFT of the teacher ended with exit code {code}" in capsys.readouterr().err


def test_flags_that_a_step_does_not_know_are_found_before_it_all(place, monkeypatch, capsys):
    tuned = counting(monkeypatch, finetune)
    assert main([*WORDS, "--evaluate=--nonsense 1"]) == 2
    error = capsys.readouterr().err
    assert "evaluation of the teacher ended with exit code 2" in error
    assert "unrecognized arguments: --nonsense 1" in error and not tuned


def test_from_python(place, monkeypatch):
    settings = {
        "data": "pairs", "out": "out", "all": SHORT, "enable_sft_teacher": True,
        "minillm": "--num-rollouts 8 --gradient-accumulation-steps 1", "device": None,
        "evaluate": "--max-length 32 --max-prompt-length 16 --seeds 10",
    }  # fmt: skip
    results = minillm.Distiller("teacher", "student", **settings).distill()
    assert [found["model"]["name"] for found in results] == ["teacher", "sft", "minillm"]
    assert listed(place) == MADE
    counting(monkeypatch, finetune, 1)
    with pytest.raises(StepFailed, match="SFT of the teacher") as failed:
        minillm.Distiller("teacher", "student", **settings | {"out": "other"}).distill()
    assert failed.value.code == 1
    with pytest.raises(UserError, match="learning: no flag"):
        minillm.Distiller("teacher", "student", learning=1)


def test_embedded_models_come_with_settings_for_a_small_machine(capsys):
    words = ["tiny-llama", "tiny-llama-student", "--data", "stdlib-doc", "--lm-data", "stdlib"]
    assert main([*words, "--dry-run", "--sft", "--total-iters 7"]) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 5 and "--total-iters 400" in lines[0] and lines[0].endswith(
        "--total-iters 7 --out tiny-llama-student-distilled/sft"
    )  # fmt: skip
    assert "--num-rollouts 64" in lines[1] and "--lm-data stdlib" in lines[1]
    assert all("--dev-num 200" in line for line in lines[2:])
    published = ["gpt2-xl", "gpt2", "--data", "dolly", "--preset", "gpt2-base", "--dry-run"]
    assert main(published) == 0
    assert "--batch-size 2 --max-length 512" in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_pair_as_it_is_shipped(tmp_path, monkeypatch, capsys):
    """A shorter form of the chain with its printed settings."""
    monkeypatch.chdir(tmp_path)
    words = ["tiny-llama", "tiny-llama-student", "--data", "stdlib-doc", "--lm-data", "stdlib"]
    words += ["--all", "--train-num 400 --total-iters 8 --dev-num 16"]
    assert main([*words, "--evaluate", "--seeds 10 20 --dev-num 20"]) == 0
    table = capsys.readouterr().out
    assert "| tiny-llama " in table and "| minillm " in table
