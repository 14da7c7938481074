"""What a user of LLM-Pruner can get wrong: exit code 2, one line, nothing written."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import driving
import families
from sparse.llm_pruner import main

QUICK = ["--num_examples", "2", "--max_seq_len", "32"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=3)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def refused(capsys, *words) -> str:
    return driving.refused(capsys, main, *words)


ATTENTION, MLP = "--block_attention_layer_", "--block_mlp_layer_"
WORDS = {
    "ratio of one": (["--pruning_ratio", "1"], "1.0: expected a share from 0 to below 1"),
    "ratio below zero": (["--pruning_ratio", "-.1"], "-0.1: expected a share"),
    "ratio that is no number": (["--pruning_ratio", "nan"], "nan: expected a share"),
    "no head left": (
        ["--pruning_ratio", ".8"],
        r"0.8 leaves none of the 2 groups of block 1 self_attn.o_proj \(.*nearest to 0.4\)",
    ),
    "no channel left": (["--pruning_ratio", ".6", "--multiple", "48"], "none of the 48 groups"),
    "two levels": (["--block_wise", "--channel_wise"], "--block_wise and --channel_wise exclude"),
    "one threshold for one part": (
        ["--channel_wise", "--global_pruning"],
        "hidden channels are the same in all",
    ),
    "range beyond the model": ([f"{ATTENTION}end", "4"], "0 <= start < end <= 3"),
    "range below it": ([f"{MLP}start", "-1"], "0 <= start < end <= 3"),
    "empty range": ([f"{MLP}start", "2", f"{MLP}end", "2"], "start 2 --block_mlp_layer_end 2:"),
    "all layers kept": (["--layer_wise", "--layer", "3"], "the model has 3 blocks; keep fewer"),
    "no layer kept": (["--layer_wise", "--layer", "0"], "--layer 0: at least 1"),
    "no steps": (["--iterative_steps", "0"], "--iterative_steps 0"),
    "multiple of zero": (["--multiple", "0"], "--multiple 0"),
    "no examples": (["--num_examples", "0"], "--num_examples 0"),
    "window of one token": (["--max_seq_len", "1"], "at least 2 tokens"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(case, place, capsys):
    words, message = WORDS[case]
    line = refused(capsys, "model", "text.txt", *words)
    assert re.search(message, line), line
    assert {p.name for p in place.iterdir()} == {"model", "text.txt"}


def test_missing_things(place, capsys):
    assert "name a dataset" in refused(capsys, "model")
    assert "Did you mean 'wikitext2'?" in refused(capsys, "model", "wikitxt2")
    assert "Did you mean 'tiny-llama'?" in refused(capsys, "tiny-lama", "text.txt")
    assert main(["model", "text.txt", "--overwrite", "--out", "./model"]) == 2
    assert "model is the model itself" in capsys.readouterr().err
    assert {p.name for p in place.iterdir()} == {"model", "text.txt"}


def test_models_that_cannot_be_pruned(place, capsys):
    BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    ).save_pretrained("bert")
    assert "decoder-only" in refused(capsys, "bert", "text.txt")
    families.save("opt", place / "opt", tokenizer=True)
    line = refused(capsys, "opt", "text.txt", "--channel_wise")
    assert "channel-wise on tied sizes: in OPTForCausalLM" in line
    # One key and value head, experts for an MLP: nothing can go alone.
    families.save("mixtral", place / "mixtral", tokenizer=True, num_key_value_heads=1)
    assert "no heads or channels" in refused(capsys, "mixtral", "text.txt")
    assert not list(place.glob("out*"))


@pytest.mark.parametrize("pruner", ["taylor", "l2"])
def test_nan_weights(pruner, place, capsys):
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    down = "model.layers.1.mlp.down_proj.weight"
    tensors[down][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    line = refused(capsys, "model", "text.txt", *QUICK, "--pruner_type", pruner)
    assert f"{down} holds NaN or infinite values" in line
    assert {p.name for p in place.iterdir()} == {"model", "text.txt"}


def test_activations_that_overflow(place, capsys):
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1e38
    tensors["lm_head.weight"] *= 1e3
    save_file(tensors, file, metadata={"format": "pt"})
    line = refused(capsys, "model", "text.txt", *QUICK)
    assert "NaN or infinite" in line
    assert {p.name for p in place.iterdir()} == {"model", "text.txt"}


def test_a_result_in_the_way(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("")
    assert "out exists; choose another --out" in refused(capsys, "model", "text.txt", *QUICK)
    line = refused(capsys, "model", "text.txt", *QUICK, "--overwrite")
    assert "not a checkpoint folder" in line
