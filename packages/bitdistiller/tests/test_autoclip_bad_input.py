"""What a user can get wrong with clipping: exit code 2, one line, nothing half made."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import driving
import families
from bitdistiller import clip_file
from bitdistiller.autoclip import clip, main
from harness.blocks import sequential
from harness.errors import UserError
from harness.quant.grid import Grid
from harness.quant.normal_float import NormalFloat

QUICK = ["--n_samples", "4", "--seqlen", "32", "--q_group_size", "16"]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=2)
    families.save("llama", folder / "other", tokenizer=True, num_hidden_layers=2, seed=1)
    (folder / "text.txt").write_text(families.TEXT * 100)
    words = {"n_samples": 4, "seqlen": 32, "q_group_size": 16}
    clip(str(folder / "model"), str(folder / "text.txt"), out=folder / "clipped", **words)
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A folder of its own, with good and less good things, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


WORDS = {
    "model misspelt": (["tiny-lama", "text.txt"], "Did you mean 'tiny-llama'?"),
    "dataset misspelt": (["model", "pilevall", *QUICK], "Did you mean 'pileval'?"),
    "two datasets": (
        ["model", "text.txt", "--calib_dataset", "pile"],
        "DATASET text.txt contradicts --calib_dataset pile; give one",
    ),
    "too many bits": (["model", "text.txt", "--w_bit", "9"], "bits is 9; expected one of 2, 3"),
    "too few bits": (["model", "text.txt", "--w_bit", "1"], "bits is 1; expected one of 2, 3"),
    "nf3 in two bits": (
        ["model", "text.txt", "--quant_type", "nf3", "--w_bit", "2"],
        "2 bits: nf3 has 3; leave the bits out, or give 3",
    ),
    "nf4 in three bits": (["model", "text.txt", "--quant_type", "nf4", "--w_bit", "3"], "give 4"),
    "levels packed": (
        ["model", "text.txt", "--quant_type", "nf3", "--format", "gptq"],
        "the gptq format holds integers; nf3 needs --format dense",
    ),
    "bits the format lacks": (
        ["model", "text.txt", *QUICK, "--w_bit", "5", "--format", "gptq"],
        "2, 3, 4 or 8 bits, not 5",
    ),
    "groups do not divide": (
        ["model", "text.txt", "--q_group_size", "48"],
        r"48 does not divide the input columns of .*q_proj \(32\).*; try 16",
    ),
    "levels' groups do not divide": (
        ["model", "text.txt", "--q_group_size", "48", "--quant_type", "nf3"],
        r"48 does not divide the input columns of .*q_proj \(32\).*; try 16",
    ),
    "group size of zero": (["model", "text.txt", "--q_group_size", "0"], "group size is 0"),
    "too little text": (
        ["model", "text.txt", "--q_group_size", "16", "--n_samples", "999"],
        r"999 windows of 64 tokens asked for, its \d+ tokens fill \d+; use --nsamples \d+",
    ),
    "window too long": (["model", "text.txt", *QUICK, "--seqlen", "65"], "65 .* context of 64"),
    "packed already": (
        ["clipped", "text.txt", *QUICK],
        "clipped is packed already; give the dense",
    ),
    "dump of another kind": (
        ["model", "text.txt", *QUICK, "--dump_clip", "clip.pt"],
        "--dump_clip clip.pt: expected a name that ends in .safetensors",
    ),
    "dump under a file": (
        ["model", "text.txt", *QUICK, "--dump_clip", "text.txt/clip.safetensors"],
        "text.txt is a file, no folder; choose another --dump_clip",
    ),
    "dump in the way": (
        ["model", "text.txt", *QUICK, "--dump_clip", "clipped/clip.safetensors"],
        "clipped/clip.safetensors exists; choose another --dump_clip",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(case, place, capsys):
    words, message = WORDS[case]
    line = driving.refused(capsys, main, *words)
    assert re.search(message, line), line
    assert {p.name for p in place.iterdir()} == {"model", "other", "text.txt", "clipped"}


def test_damaged_weights(place, capsys):
    tensors = load_file(place / "model" / "model.safetensors")
    tensors[DOWN] = torch.full_like(tensors[DOWN], torch.nan)
    save_file(tensors, place / "model" / "model.safetensors", metadata={"format": "pt"})
    line = driving.refused(capsys, main, "model", "text.txt", *QUICK)
    assert f"{DOWN} holds NaN or infinite" in line and not (place / "out").exists()
    tensors[DOWN] = torch.zeros_like(tensors[DOWN], dtype=torch.int8)
    save_file(tensors, place / "model" / "model.safetensors", metadata={"format": "pt"})
    line = driving.refused(capsys, main, "model", "text.txt", *QUICK, "--no-resume")
    assert f"{DOWN} in model holds no floating values" in line


def test_other_settings_over_an_unfinished_run(place, capsys, monkeypatch):
    real = sequential.work_on

    def stop(decoder, index, *words):
        if index == 1:
            raise KeyboardInterrupt
        return real(decoder, index, *words)

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "work_on", stop)
        assert main(["model", "text.txt", *QUICK, "--out", "out"]) == 130
    line = driving.refused(capsys, main, "model", "text.txt", *QUICK, "--w_bit", "3")
    assert "settings, w_bit: 2 there, 3 now" in line and "--no-resume" in line
    assert main(["model", "text.txt", *QUICK, "--out", "out"]) == 0
    assert (place / "out" / clip_file.FILE).read_bytes() == (
        place / "clipped" / clip_file.FILE
    ).read_bytes()


# -- reading the file again ------------------------------------------------------------------


def test_a_good_file_is_read(place):
    for path in ("clipped", "clipped/clip.safetensors"):
        ranges = clip_file.read(path, Path("model"), Grid(2, 16))
        assert len(ranges) == 2 * 7
        low, high = ranges["model.layers.1.mlp.down_proj"]
        assert low.shape == high.shape == (32, 3) and (low <= 0).all() and (high >= 0).all()


CLIPS = {
    "none": ("nowhere", "model", Grid(2, 16), "nowhere not found; make it with python -m bitd"),
    "folder without": ("model", "model", Grid(2, 16), "model/clip.safetensors not found"),
    "no safetensors": ("text.txt", "model", Grid(2, 16), "text.txt cannot be read"),
    "other safetensors": (
        "model/model.safetensors", "model", Grid(2, 16),
        "model.safetensors holds no clipping ranges; expected the clip.safetensors of",
    ),
    "other bits": (
        "clipped", "model", Grid(3, 16),
        "searched for bits 2, asked for is 3; run .* with --w_bit 3",
    ),
    "other groups": (
        "clipped", "model", Grid(2, -1),
        "for group_size 16, asked for is -1; run .* with --q_group_size -1",
    ),
    "other type": ("clipped", "model", NormalFloat(3, 16), "for quant_type int, asked for is nf3"),
    "other model": (
        "clipped", "other", Grid(2, 16),
        "belongs to another model than other: model.safetensors differs; run python -m",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLIPS)
def test_clip_files(case, place):
    path, model, grid, message = CLIPS[case]
    with pytest.raises(UserError, match=message) as raised:
        clip_file.read(path, Path(model), grid)
    assert "\n" not in str(raised.value)


def test_a_range_with_one_end(place):
    path = place / "clipped" / clip_file.FILE
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.high"]
    save_file(tensors, path, metadata=clip_file.note(Path("model"), Grid(2, 16)))
    with pytest.raises(UserError, match="damaged: some group has one end only"):
        clip_file.read(path, Path("model"), Grid(2, 16))


def test_a_dump_that_cannot_be_written_is_said_when_all_else_is_done(place, capsys, monkeypatch):
    monkeypatch.setattr("harness.paths.check_place", lambda *words: None)
    words = ["model", "text.txt", *QUICK, "--dump_clip", "text.txt/it.safetensors", "--out", "out"]
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "out is complete, but text.txt/it.safetensors could not be written (File exists" in line
    assert (place / "out" / clip_file.FILE).is_file()


def test_type_is_told_apart_at_equal_bits(place):
    clip("model", "text.txt", out="nf3", quant_type="nf3", n_samples=4, seqlen=32, q_group_size=16)
    clip_file.read("nf3", Path("model"), NormalFloat(3, 16))
    with pytest.raises(
        UserError, match=r"for quant_type nf3, asked for is int; .*--quant_type int"
    ):
        clip_file.read("nf3", Path("model"), Grid(3, 16))
