"""What bitdistiller.train refuses: one line, exit code 2, nothing written."""

import json
import shutil

import families
import pytest
import qat_place as qat
import runs
from bitdistiller import train

from harness import checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return qat.make(tmp_path_factory.mktemp("refused"))


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    qat.cache_beside(tmp_path, monkeypatch)
    monkeypatch.chdir(place)


def refused(capsys, *words):
    words = ["model", "--data", "set.jsonl", *qat.QUICK, *words]
    line = runs.refused(capsys, train.main, *map(str, words))
    assert not list(checkpoint.Path(".").glob("out*"))
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "9"], "bits is 9; expected one of 2"),
        (["--bits", "1"], "bits is 1; expected one of 2"),
        (["--q_group_size", "24"], "group size 24 does not divide"),
        (["--quant_type", "nf3", "--bits", "2"], "nf3 has 3;"),
        (["--quant_type", "int2-asym", "--bits", "3"], "int2-asym has 2"),
        (["--quant_type", "nf4", "--learn", "scales"], "no scales to learn"),
        (["--dtype", "float16"], "float16 trains on GPUs only"),
        (["--bf16", "--dtype", "float32"], "--bf16 and --dtype float32"),
        (["--clip", "nowhere"], "nowhere not found; make it with python -m bitdistiller.autoclip"),
        (["--start", "model"], "model holds no grid.safetensors"),
        (["--start", "model", "--clip", "model"], "clip.safetensors not found"),
        (["--beta", "1.5"], "--beta 1.5: expected 0 to 1"),
        (["--kd_loss_type", "ce", "--teacher_cache", "x"], "leave --teacher_cache out"),
        (["--teacher_cache", "nowhere"], "nowhere holds no cache.json"),
        (["--model_max_length", "65"], "--model_max_length 65: expected 2 to 64 tokens"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0: expected a number above 0"),
        (["--learning_rate", "-1"], "learning rate -1"),
        (["--per_device_train_batch_size", "0"], "micro batch 0: at least 1"),
        (["--model_name_or_path", "model"], "give one of the two"),
        (["--data", "stdlip"], "Did you mean 'stdlib'?"),
        (["--ppl", "wikitext3"], "Did you mean 'wikitext2'?"),
    ],
)
def test_settings_that_cannot_be(capsys, words, message):
    assert message in refused(capsys, *words)


def test_rows_without_the_two_fields_are_named_by_line(place, capsys):
    good = json.dumps({"prompt": "a", "response": "b"})
    for bad in ('{"prompt": "def"}', '{"instruction": 3, "output": "x"}', '[["only one"]]'):
        (place / "bad.jsonl").write_text(f"{good}\n\n{bad}\n")
        assert "bad.jsonl, line 3: " in refused(capsys, "--data", "bad.jsonl")
    # Not even where the first row would pass for a text.
    (place / "bad.jsonl").write_text('{"prompt": "def"}\n')
    assert "bad.jsonl, line 1: prompt; expected" in refused(capsys, "--data", "bad.jsonl")
    (place / "bad.jsonl").write_text(f"{good}\n")
    assert "bad.jsonl" in refused(capsys, "--data", "bad.jsonl")


def test_models_that_are_no_teacher(place, capsys):
    folder = place / "packed"
    shutil.copytree(place / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    words = ["packed", "--data", "set.jsonl"]
    line = runs.refused(capsys, train.main, *words)
    assert "packed is packed already; give the dense model" in line
    shutil.rmtree(folder)
    shutil.copytree(place / "model", folder)
    (folder / "grid.safetensors").write_bytes(b"")
    line = runs.refused(capsys, train.main, *words)
    assert "holds quantized values, no teacher" in line and "--start packed" in line
    assert "no model is named" in runs.refused(capsys, train.main, "--data", "set.jsonl")


def test_a_clip_file_of_another_model(place, capsys):
    from bitdistiller import autoclip

    families.save("llama", place / "other", tokenizer=True, num_hidden_layers=2, seed=1)
    words = ["other", "text.txt", "--w_bit", "2", "--q_group_size", "16", "--n_samples", "4"]
    assert autoclip.main([*words, "--seqlen", "16", "--out", "clipped"]) == 0
    assert "belongs to another model" in refused(capsys, "--clip", "clipped")
    assert "was searched for bits 2, asked for is 3" in refused(
        capsys, "--clip", "clipped", "--bits", 3
    )


def test_a_result_is_not_written_over(place, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    qat.run(place, out, code=2)
    assert "choose another --out, or replace it with --overwrite" in capsys.readouterr().err
    qat.run(place, place / "model", "--overwrite", code=2)
    assert "is the model itself" in capsys.readouterr().err


def test_misspelt_losses_are_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit) as done:
        train.main(["model", "--data", "set.jsonl", "--kd_loss_type", "cackld"])
    assert done.value.code == 2 and "invalid choice: 'cackld'" in capsys.readouterr().err


def test_a_dry_run_says_what_it_takes(place, tmp_path, capsys):
    qat.run(place, tmp_path / "out", "--dry-run")
    shown = capsys.readouterr()
    assert "3 steps of 8 examples, 0.444 epochs" in shown.err
    assert "to 2 bits in groups of 16" in shown.out and "memory: about" in shown.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]
    qat.run(place, tmp_path / "out", "--dry-run", "--q_group_size", 24, code=2)
