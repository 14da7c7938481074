"""What every command that makes something does with its --out: one run at a time, nothing left
beside it after a kill, and its own result known again."""

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import driving
import families

HOLD = """import sys
from pathlib import Path
from harness.checkpoint.runs import RunFolder
for name in sys.argv[1:]:
    RunFolder(Path(name)).hold()
print("held", flush=True)
input()
"""
FEW = "--nsamples 4 --seqlen 32"
SHORT = "--max-length 32 --max-prompt-length 16"
# Module, words, and what makes another run of them.
COMMANDS = {
    "convert": ("harness.cli", "convert thin --format dense", "--format bitmask"),
    "gptq": ("gptq.cli", f"model text.txt --wbits 4 --groupsize 16 {FEW}", "--wbits 3"),
    "sparsegpt": ("sparse.sparsegpt", f"model text.txt --sparsity .5 {FEW}", "--sparsity .6"),
    "wanda": ("sparse.wanda", f"model text.txt --sparsity .5 {FEW}", "--sparsity .6"),
    "magnitude": ("sparse.magnitude", "model --sparsity .5", "--sparsity .6"),
    "llm_pruner": (
        "sparse.llm_pruner",
        "model text.txt --pruning_ratio .5 --num_examples 2 --max_seq_len 32",
        "--pruning_ratio .25",
    ),
    "recover": (
        "sparse.recover",
        "model --dataset text.txt --cutoff_len 32 --max_steps 1",
        "--max_steps 2",
    ),
    "autoclip": (
        "bitdistiller.autoclip",
        "model text.txt --seqlen 32 --n_samples 4 --q_group_size 16",
        "--w_bit 3",
    ),
    "blockwise": (
        "bitdistiller.blockwise",
        "model text.txt --q_group_size 16 --nsamples 4 --val_size 2 --seqlen 16 --epochs 1",
        "--bits 3",
    ),
    "export": ("bitdistiller.export", "trained", "--format dense"),
    "train": (
        "bitdistiller.train",
        "model --data set.jsonl --q_group_size 16 --model_max_length 32 --max_steps 1",
        "--max_steps 2",
    ),
    "cache": ("bitdistiller.cache_teacher", "model --data set.jsonl --topk 4", "--topk 5"),
    "answers.jsonl": (
        "bitdistiller.generate",
        "model --dataset set.jsonl --max_sample 3 --engine transformers --max_new_tokens 4",
        "--seed 1",
    ),
    "mix.jsonl": ("bitdistiller.mix", "set.jsonl", "--seed 1"),
    "finetune": (
        "minillm.finetune",
        f"model --data set.jsonl --total-iters 1 {SHORT}",
        "--total-iters 2",
    ),
    "minillm": (
        "minillm.train_minillm",
        "model --teacher model --data set.jsonl --total-iters 1 --num-rollouts 2 --chunk-size 2 "
        f"--batch-size 2 {SHORT}",
        "--total-iters 2",
    ),
    "kept": ("minillm.cache_teacher", f"model --data set.jsonl --topk 4 {SHORT}", "--topk 5"),
    "said.jsonl": (
        "minillm.generate",
        f"model --data set.jsonl --gen-num 3 --batch-size 2 {SHORT}",
        "--seed 1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=2)
    (folder / "text.txt").write_text(families.TEXT * 40)
    words = families.TEXT.split()
    rows = [{"prompt": f"{words[i]}:", "response": " ".join(words[i : i + 3])} for i in range(12)]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(folder):
        for name, out in (("blockwise", "trained"), ("magnitude", "thin")):
            assert run(name, "--out", out) == 0
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(inputs / "tokens"))
    return tmp_path


def run(name, *more):
    module, line, _ = COMMANDS[name]
    return importlib.import_module(module).main([*line.split(), "--out", name, *more])


def test_a_place_that_another_run_holds_is_refused_in_one_line(place, capsys):
    before = {path.name for path in place.iterdir()}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, *COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    for name in COMMANDS:
        capsys.readouterr()
        assert run(name) == 2, name
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert lines == [
            f"error: another run is writing {name}; wait for its end, or choose another --out."
        ]
    holder.communicate(b"\n")
    assert {p.name for p in place.iterdir() if not p.name.endswith(".lock")} == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_result_is_known_again(name, place, capsys):
    before = {path.name for path in place.iterdir()}
    if name != "mix.jsonl":  # which has none
        assert run(name, "--dry-run") == 0
    assert {path.name for path in place.iterdir()} == before
    assert run(name) == 0
    made = driving.contents(place / name)
    capsys.readouterr()
    assert run(name) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"{name} is finished already."
    assert run(name, *COMMANDS[name][2].split()) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {name} exists; choose another --out, or replace it with")
    assert driving.contents(place / name) == made
    assert {path.name for path in place.iterdir()} == {*before, name}


# The others: tests of their packages with drivers of their own.
KILLED = ["convert", "export", "cache", "answers.jsonl", "mix.jsonl", "kept", "said.jsonl"]


def test_killed_commands_leave_nothing_beside_their_results(place):
    commands = {}
    for name in KILLED:
        module, line, _ = COMMANDS[name]
        commands[f"runs of {name}"] = [Path(name).suffix, module, line.split()]
    done = driving.python(Path(__file__).with_name("command_driver.py"), json.dumps(commands))
    assert done.returncode == 0, done.stderr
    for folder in commands:
        assert driving.results_are_equal(place / folder) > 4
