"""What a user can get wrong when pruning: exit code 2, one line that says what to do, nothing made.

What the harness refuses for every method (damaged files, full disks, ...) is in packages/gptq.
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import driving
import families
from harness.errors import UserError
from sparse import magnitude, prune, sparsegpt, wanda

QUICK = ["--nsamples", "4", "--seqlen", "32"]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 100}
    families.save("llama", folder / "model", tokenizer=True, **sizes)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A folder of its own, with a good model and text, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, command, *words) -> str:
    return driving.refused(capsys, command.main, *words)


def nothing_made(place):
    return {p.name for p in place.iterdir()} <= {"model", "text.txt"}


GOOD = ["model", "text.txt"]
HALF = ["--sparsity", ".5"]
EVERY = {
    "no amount": (GOOD, "how much is to go\\? Give --sparsity .5, or --prunen 2 --prunem 4"),
    "all": ([*GOOD, "--sparsity", "1"], "sparsity is 1.0; expected a share of at least 0"),
    "per cent": ([*GOOD, "--sparsity_ratio", "50"], "sparsity is 50.0"),
    "negative": ([*GOOD, "--sparsity", "-.1"], "sparsity is -0.1"),
    "not a number": ([*GOOD, "--sparsity", "nan"], "sparsity is nan"),
    "n without m": ([*GOOD, "--prunen", "2"], "prunen 2, prunem 0: expected prunen below prunem"),
    "n above m": ([*GOOD, "--prunen", "5", "--prunem", "4"], "prunen 5, prunem 4"),
    "all of m": ([*GOOD, "--prunen", "4", "--prunem", "4"], "expected prunen below prunem"),
    "negative n": ([*GOOD, "--prunen", "-1", "--prunem", "4"], "prunen -1"),
    "m does not divide": (
        [*GOOD, "--sparsity_type", "4:8"],
        r"4:8 does not divide the input columns of mlp.down_proj \(100\); use another prunem",
    ),
    "two amounts": (
        [*GOOD, "--sparsity", ".6", "--prunen", "2", "--prunem", "4"],
        "sparsity 0.6 contradicts 2:4, which drops 0.5",
    ),
    "two patterns": (
        [*GOOD, "--prunen", "1", "--prunem", "4", "--sparsity_type", "2:4"],
        "--sparsity_type 2:4 contradicts --prunen 1 --prunem 4",
    ),
    "pattern and none": (
        [*GOOD, "--prunen", "1", "--prunem", "4", "--sparsity_type", "unstructured"],
        "--sparsity_type unstructured contradicts",
    ),
    "owl with a pattern": (
        [*GOOD, "--prunen", "2", "--prunem", "4", "--ratios", "owl"],
        "owl is for unstructured sparsity",
    ),
    "owl's lambda": ([*GOOD, *HALF, "--ratios", "owl", "--owl_lambda", "-1"], "owl_lambda is -1"),
    "owl's m": ([*GOOD, *HALF, "--ratios", "owl", "--owl_m", "0"], "owl_m 0.0"),
    "owl leaves the range": (
        [*GOOD, "--sparsity", ".98", "--ratios", "owl", "--owl_m", "3", *QUICK],
        "OWL would give sparsities from",
    ),
    "unknown part": (
        [*GOOD, *HALF, "--prune_only", "dwn_proj"],
        "no linear's name holds it; they are mlp.down_proj, .* Did you mean 'down_proj'",
    ),
    "no block left": ([*GOOD, *HALF, "--minlayer", "2"], "nothing to prune: --minlayer 2"),
    "all inverted": ([*GOOD, *HALF, "--invert"], "nothing to prune"),
    "model unknown": (["tiny-lama", "text.txt", *HALF], "Did you mean 'tiny-llama'?"),
    "device": ([*GOOD, *HALF, "--device", "gpu"], "expected auto, cpu, cuda"),
}


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("command", [sparsegpt, wanda, magnitude], ids=lambda c: c.__name__)
def test_words(command, case, place, capsys):
    words, message = EVERY[case]
    line = refused(capsys, command, *words)
    assert re.search(message, line), line
    assert nothing_made(place)


SOME = {
    "no dataset": (wanda, ["model", *HALF], "no calibration dataset given; .* sparse.magnitude"),
    "no dataset for owl": (magnitude, ["model", *HALF, "--ratios", "owl"], "no calibration"),
    "dataset misspelt": (sparsegpt, ["model", "wikitxt2", *HALF], "Did you mean 'wikitext2'?"),
    "dataset missing": (wanda, ["model", "no/such.txt", *HALF], "'no/such.txt' is neither a file"),
    "too little text": (
        wanda,
        [*GOOD, *HALF, "--nsamples", "999"],
        r"999 windows of 64 tokens asked for, its \d+ tokens fill \d+; use --nsamples \d+",
    ),
    "no windows": (sparsegpt, [*GOOD, *HALF, "--nsamples", "0"], "at least 1 window"),
    "window too long": (wanda, [*GOOD, *HALF, "--seqlen", "65"], "65 .* context of 64"),
    "damping": (
        sparsegpt,
        [*GOOD, *HALF, "--percdamp", "0"],
        "--percdamp 0.0: expected",
    ),
    "block size": (
        sparsegpt,
        [*GOOD, *HALF, "--blocksize", "0"],
        "--blocksize 0: expected",
    ),
    "unknown bits": (sparsegpt, [*GOOD, *HALF, "--wbits", "9"], "bits is 9; expected one of 2, 3"),
    "bits of the baseline": (sparsegpt, [*GOOD, *HALF, "--gmp", "--wbits", "4"], "wbits is 4"),
    "packed without bits": (
        sparsegpt,
        [*GOOD, *HALF, "--format", "compressed-tensors"],
        "holds integers; quantize too",
    ),
    "groups do not divide": (
        sparsegpt,
        [*GOOD, *HALF, "--wbits", "4", "--groupsize", "64"],
        r"64 does not divide the input columns of .*down_proj \(100\)",
    ),
    "some in the gptq format": (
        sparsegpt,
        [*GOOD, *HALF, "--wbits", "4", "--format", "gptq", "--prune_only", "attn"],
        "has no place for the names",
    ),
    "variant with a pattern": (
        wanda,
        [*GOOD, "--use_variant", "--prunen", "2", "--prunem", "4"],
        "--use_variant is for unstructured",
    ),
}


@pytest.mark.parametrize("case", SOME)
def test_words_of_one_method(case, place, capsys):
    command, words, message = SOME[case]
    line = refused(capsys, command, *words)
    assert re.search(message, line), line
    assert nothing_made(place)


def test_unknown_names_in_python(place):
    for options, message in {
        "method": ({"method": "wandr"}, "Did you mean 'wanda'"),
        "ratios": ({"ratios": "owls"}, "Did you mean 'owl'"),
        "format": ({"format": "bitmsk"}, "Did you mean 'bitmask'"),
    }.values():
        with pytest.raises(UserError, match=message):
            prune("model", "text.txt", out="out", sparsity=0.5, **options)
    assert nothing_made(place)


def test_existing_output(place, capsys):
    (place / "out").mkdir()
    line = refused(capsys, wanda, *GOOD, *HALF, *QUICK)
    assert "out exists; choose another --out, or replace it with --overwrite" in line


@pytest.mark.parametrize("command", [sparsegpt, wanda, magnitude], ids=lambda c: c.__name__)
def test_nan_in_the_weights(command, place, capsys):
    file = place / "model" / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    tensors[DOWN][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    line = refused(capsys, command, *GOOD, *HALF, *QUICK)
    assert f"{DOWN} holds NaN or infinite values" in line
    assert not (place / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--true-sequential"], ["--ratios", "owl"]])
@pytest.mark.parametrize("command", [sparsegpt, wanda], ids=lambda c: c.__name__)
def test_activations_that_overflow(command, flags, place, capsys):
    file = place / "model" / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    tensors["model.layers.0.mlp.up_proj.weight"] *= 3e4
    save_file(tensors, file, metadata={"format": "pt"})
    line = refused(capsys, command, *GOOD, *HALF, *QUICK, *flags, "--dtype", "float16")
    assert re.search("block 0.* NaN or infinite .*--dtype bfloat16 or float32", line), line
    assert not (place / "out").exists()
