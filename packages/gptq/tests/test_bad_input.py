"""What a user can get wrong: exit code 2, one line that says what to do, nothing half made."""

import errno
import json
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForMaskedLM, T5Config

import driving
import families
from gptq.cli import main
from harness.blocks import sequential

QUICK = ["--nsamples", "4", "--seqlen", "32"]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    families.save("llama", folder / "model", tokenizer=True, **sizes)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A folder of its own, with a good model and text, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *words, code=2) -> str:
    return driving.refused(capsys, main, *words, code=code)


def nothing_made(place):
    return {p.name for p in place.iterdir()} <= {"model", "text.txt"}


# -- the command's words ---------------------------------------------------------------------

WORDS = {
    "model path missing": (["no/such/folder", "text.txt"], "model folder no/such/folder not found"),
    "model unknown": (["tiny-lama", "text.txt"], "Did you mean 'tiny-llama'?"),
    "model is a file": (["text.txt", "text.txt"], "is a file; expected the folder"),
    "folder without config": ([".", "text.txt"], "holds no config.json"),
    "dataset misspelt": (["model", "wikitxt2"], "Did you mean 'wikitext2'?"),
    "dataset path missing": (["model", "no/such.txt"], "'no/such.txt' is neither a file"),
    "no dataset": (["model"], "no calibration dataset given"),
    "window too long": (["model", "text.txt", "--seqlen", "65"], "65 .* context of 64"),
    "window too short": (["model", "text.txt", "--seqlen", "1"], "at least 2 tokens"),
    "too few windows": (
        ["model", "text.txt", "--nsamples", "999"],
        r"999 windows of 64 tokens asked for, its \d+ tokens fill \d+; use --nsamples \d+",
    ),
    "no windows": (["model", "text.txt", "--nsamples", "0"], "at least 1 window"),
    "groups do not divide": (
        ["model", "text.txt", "--groupsize", "48"],
        r"48 does not divide the input columns of .*q_proj \(64\), .*gate_proj \(64\).*; try 32",
    ),
    "group size of zero": (["model", "text.txt", "--groupsize", "0"], "group size is 0"),
    "unknown bits": (["model", "text.txt", "--wbits", "9"], "bits is 9; expected one of 2, 3"),
    "sixteen bits": (["model", "text.txt", "--wbits", "16"], "quantizes nothing"),
    "bits the format lacks": (
        ["model", "text.txt", "--wbits", "5", "--format", "gptq"],
        "2, 3, 4 or 8 bits, not 5",
    ),
    "damping": (
        ["model", "text.txt", "--percdamp", "0"],
        "--percdamp 0.0: expected a fraction",
    ),
    "device": (["model", "text.txt", "--device", "gpu"], "expected auto, cpu, cuda"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(case, place, capsys):
    words, message = WORDS[case]
    line = refused(capsys, *words)
    assert re.search(message, line), line
    assert nothing_made(place)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu(place, capsys):
    assert "no CUDA device here" in refused(capsys, "model", "text.txt", "--device", "cuda")


def test_existing_output(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("")
    line = refused(capsys, "model", "text.txt", *QUICK)
    assert "out exists; choose another --out, or replace it with --overwrite" in line
    line = refused(capsys, "model", "text.txt", *QUICK, "--overwrite")
    assert "not a checkpoint folder" in line
    assert [p.name for p in (place / "out").iterdir()] == ["thesis.tex"]


def test_the_model_is_not_its_own_output(place, capsys):
    words = ["model", "text.txt", *QUICK, "--overwrite", "--out", "./model"]
    assert main(words) == 2
    assert "model is the model itself" in capsys.readouterr().err.splitlines()[-1]
    assert nothing_made(place)


def test_other_settings_over_an_unfinished_run(place, capsys, monkeypatch):
    real = sequential.work_on

    def stop(decoder, index, *words):
        if index == 1:
            raise KeyboardInterrupt
        return real(decoder, index, *words)

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "work_on", stop)
        assert main(["model", "text.txt", *QUICK, "--out", "out"]) == 130
    line = refused(capsys, "model", "text.txt", *QUICK, "--wbits", "3")
    assert "settings, wbits: 4 there, 3 now" in line and "--no-resume" in line
    line = refused(capsys, "model", "text.txt", *QUICK, "--seed", "1")
    assert "settings, seed: 0 there, 1 now" in line
    assert main(["model", "text.txt", *QUICK, "--out", "out"]) == 0
    line = refused(capsys, "model", "text.txt", *QUICK, "--no-resume")
    assert "out exists" in line


# -- the model's files -----------------------------------------------------------------------


def damage(change):
    """A case that changes the tensors."""

    def apply(model):
        file = model / "model.safetensors"
        tensors = {n: t.clone() for n, t in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


def configured(**values):
    """A case that changes config.json."""

    def apply(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | values))

    return apply


def weights(content):
    """A case that makes the weight file from its old bytes."""

    def apply(model):
        file = model / "model.safetensors"
        file.write_bytes(content(file.read_bytes()))

    return apply


def other_model(make):
    def apply(model):
        torch.manual_seed(0)
        made = make()
        (model / "model.safetensors").unlink()
        made.save_pretrained(model)

    return apply


def no_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()


BERT = {
    "vocab_size": families.VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
T5 = {"vocab_size": families.VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
      "num_heads": 4}  # fmt: skip

FILES = {
    "corrupt header": (weights(lambda b: b"\xff" * 999), "model.safetensors is corrupt or trunc"),
    "truncated": (weights(lambda b: b[: len(b) // 2]), "model.safetensors is corrupt or truncated"),
    "empty": (weights(lambda b: b""), "model.safetensors is corrupt or truncated"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "holds no model.safetensors"),
    "NaN": (damage(lambda t: t[DOWN].fill_(torch.nan)), f"{DOWN} holds NaN or infinite"),
    "infinity outside the blocks": (
        damage(lambda t: t["model.norm.weight"].fill_(torch.inf)),
        "model.norm.weight holds NaN or infinite",
    ),
    "missing tensor": (damage(lambda t: t.pop(DOWN)), f"lacks 1 tensors .*{DOWN}"),
    "shape": (
        configured(intermediate_size=100),
        r"_proj.weight has shape \[64, 96\] in .* config.json asks for \[64, 100\]",
    ),
    "more layers": (configured(num_hidden_layers=3), "lacks 9 tensors that config.json asks for"),
    "vocabulary": (configured(vocab_size=100), r"config.json asks for \[100, 64\]"),
    "broken config": (
        lambda m: (m / "config.json").write_text('{"model_type": "llama", '),
        "config.json cannot be read: .* line 1",
    ),
    "config of another kind": (lambda m: (m / "config.json").write_text("[]"), "no JSON object"),
    "no model type": (lambda m: (m / "config.json").write_text("{}"), "model_type"),
    "unknown model type": (configured(model_type="lama"), "model type `lama`"),
    "impossible value": (configured(hidden_size="big"), "'hidden_size' expected int"),
    "heads": (configured(num_attention_heads=7), "not a multiple of the number of attention heads"),
    "activation": (configured(hidden_act="swoosh"), "KeyError 'swoosh'"),
    "someone else's packing": (
        configured(quantization_config={"quant_method": "awq", "bits": 4}),
        "stored as awq",
    ),
    "no tokenizer": (no_tokenizer, r"model holds no tokenizer \(tokenizer.json\)"),
    "broken tokenizer": (
        lambda m: (m / "tokenizer.json").write_text("{"),
        "no usable tokenizer in model",
    ),
    "encoder": (
        other_model(lambda: BertForMaskedLM(BertConfig(**BERT))),
        r"is a bert model \(BertForMaskedLM\); expected a decoder-only",
    ),
    "encoder and decoder": (
        other_model(lambda: AutoModel.from_config(T5Config(**T5))),
        "is a t5 model .* expected a decoder-only causal language model",
    ),
}
FOUND_WHILE_WORKING = {"NaN", "infinity outside the blocks"}


@pytest.mark.parametrize("case", FILES)
def test_files(case, place, capsys):
    change, message = FILES[case]
    change(place / "model")
    line = refused(capsys, "model", "text.txt", *QUICK)
    assert re.search(message, line), line
    assert not (place / "out").exists()
    if case not in FOUND_WHILE_WORKING:
        assert nothing_made(place)


def test_half_of_a_sharded_model(place, capsys):
    families.build("llama").save_pretrained(place / "sharded", max_shard_size="60KB")
    families.save_tokenizer(place / "sharded")
    gone = sorted((place / "sharded").glob("*.safetensors"))[1]
    gone.unlink()
    line = refused(capsys, "sharded", "text.txt", *QUICK)
    assert f"names {gone.name}, which is not there" in line


# -- the disk --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["safetensors.torch.save_file", "shutil.copyfile", "pathlib.Path.write_text"]
)
def test_full_disk(where, place, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "out.partial/x")

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        line = refused(capsys, "model", "text.txt", *QUICK)
    assert "the disk is full" in line and "free some space" in line
    assert not (place / "out").exists()
    assert main(["model", "text.txt", *QUICK, "--out", "out"]) == 0


def test_truly_full_disk(place, capsys):
    small = place / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        assert main(["model", "text.txt", *QUICK, "--wbits", "8", "--out", "small/out"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: the disk is full at ")
        assert {p.name for p in small.iterdir()} == {"out.partial", "out.partial.json"}
        assert not list(small.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        assert main(["model", "text.txt", *QUICK, "--wbits", "8", "--out", "small/out"]) == 0
        assert {p.name for p in small.iterdir()} == {"out"}
    finally:
        subprocess.run(["umount", str(small)], check=True)
