"""What bitdistiller.train refuses: one line, exit code 2, nothing written."""

import json
import shutil

import pytest
import qat_place as qat
from safetensors.torch import load_file, save_file

import driving
import families
from bitdistiller import train, train_examples
from harness.checkpoint import load
from harness.quant.grid import Grid


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return qat.make(tmp_path_factory.mktemp("refused"))


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    qat.cache_beside(tmp_path, monkeypatch)
    monkeypatch.chdir(place)


def refused(capsys, *words, model="model"):
    words = [model, "--data", "set.jsonl", *qat.QUICK, *words]
    line = driving.refused(capsys, train.main, *map(str, words))
    assert not list(load.Path(".").glob("out*"))
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
        (["--model_max_length", "0"], "--model_max_length 0: expected 2 to 64 tokens"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0: expected a number above 0"),
        (["--num_train_epochs", "inf"], "--num_train_epochs inf: expected a number above 0"),
        (["--warmup_steps", "-1"], "--warmup_steps -1: expected 0 or more"),
        (["--weight_decay", "nan"], "--weight_decay nan: expected 0 or more"),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1.0: expected 0 or more"),
        (["--max_grad_norm", "nan"], "--max_grad_norm nan: expected 0 or more"),
        (["--beta", ".5", "--kd_loss_type", "jsd"], "jsd has no beta"),
        (["--ppl_limit", "4"], "--ppl_limit counts windows of --ppl"),
        (["--ppl", "text.txt", "--eval_data", "set.jsonl"], "--ppl and --eval_data"),
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
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    words = ["packed", "--data", "set.jsonl"]
    line = driving.refused(capsys, train.main, *words)
    assert "packed is packed already; give the dense model" in line
    shutil.rmtree(folder)
    shutil.copytree(place / "model", folder)
    (folder / "grid.safetensors").write_bytes(b"")
    line = driving.refused(capsys, train.main, *words)
    assert "holds quantized values, no teacher" in line and "--start packed" in line
    assert "no model is named" in driving.refused(capsys, train.main, "--data", "set.jsonl")


def test_a_clip_file_of_another_model(place, capsys):
    from bitdistiller import autoclip

    families.save("llama", place / "other", tokenizer=True, num_hidden_layers=2, seed=1)
    words = ["other", "text.txt", "--w_bit", "2", "--q_group_size", "16", "--n_samples", "4"]
    assert autoclip.main([*words, "--seqlen", "16", "--out", "clipped"]) == 0
    assert "belongs to another model" in refused(capsys, "--clip", "clipped")
    assert "was searched for bits 2, asked for is 3" in refused(
        capsys, "--clip", "clipped", "--bits", 3
    )


def damaged(place, change):
    """clip.safetensors of the model in bad.safetensors, with the ranges of one linear changed."""
    from bitdistiller import autoclip, clip_file
    from harness import paths

    if not (place / "own").exists():
        words = ["model", "text.txt", "--w_bit", "2", "--q_group_size", "16", "--n_samples", "4"]
        assert autoclip.main([*words, "--seqlen", "16", "--out", "own", "--format", "dense"]) == 0
    tensors = load_file("own/clip.safetensors")
    key = "model.layers.1.mlp.up_proj.low"
    tensors[key] = change(tensors[key])
    note = clip_file.note(place / "model", Grid(2, 16))
    paths.save_tensors(place / "bad.safetensors", tensors, note)


@pytest.fixture
def nothing_read(monkeypatch):
    """Data is not looked at: it may take an hour."""
    monkeypatch.setattr(train_examples, "read", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda low: low[:, :1], "have shape [48, 1]; [48, 2] is expected"),
        (lambda low: low * float("nan"), "up_proj are damaged (not finite"),
        (lambda low: low + 9, "the low end above the high one"),
    ],
)
def test_damaged_clip_files_are_refused_before_data_is_read(
    place, capsys, nothing_read, change, message
):
    damaged(place, change)
    for dry in ([], ["--dry-run"]):
        line = refused(capsys, "--clip", "bad.safetensors", *dry)
        assert message in line and "clip ranges of model.layers.1.mlp.up_proj" in line


def test_what_the_student_cannot_be_is_refused_before_data_is_read(
    place, tmp_path, capsys, monkeypatch
):
    trained = qat.run(place, tmp_path / "trained", steps=1)
    damaged(place, lambda low: low)
    families.save("llama", place / "wide", tokenizer=True, num_hidden_layers=2, hidden_size=64)
    monkeypatch.setattr(train_examples, "read", None)
    begun = ["--start", trained]
    for words, message in (
        (["--quant_type", "nf3", "--learn", "all"], "no scales to learn"),
        ([*begun, "--clip", "bad.safetensors"], "give it without clip ranges"),
        (["--start", "nosuch"], "nosuch holds no grid.safetensors"),
        ([*begun, "--learn", "weights"], "learn scales or all"),
        ([*begun, "--bits", 3], "has 2 bits in groups of 16; asked for are 3"),
        (["--q_group_size", 100], "divide the input columns of self_attn.q_proj (32), self_attn.k"),
    ):
        assert message in refused(capsys, "--dry-run", *words)
    assert "made from another model" in refused(capsys, *begun, model="wide")


def test_bad_weights_leave_nothing(place, tmp_path, capsys):
    shutil.copytree(place / "model", place / "nan")
    tensors = load_file("nan/model.safetensors")
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, "nan/model.safetensors", metadata={"format": "pt"})
    qat.run(place, tmp_path / "o", "--beta", 0.5, model="nan", code=2)
    assert "holds NaN or infinite values" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


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
