"""Block-AP: against plain autograd, against rounding, resumed, refused."""

import math
import re
from pathlib import Path

import pytest
import torch
from test_student import logits, make_ranges, rounded
from transformers import AutoModelForCausalLM

import driving
import families
from bitdistiller import blockwise, clip_file, export, result, student, train
from harness import paths
from harness.checkpoint import load
from harness.data import corpora
from harness.modules import block_linears, find_blocks, get_matrix
from harness.quant.grid import Grid, nearest
from naive_rounding import learned, through

FLAGS = "--q_group_size 16 --nsamples 6 --val_size 2 --seqlen 16"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    families.save("llama", folder / "model", tokenizer=True, num_hidden_layers=3)
    dtype = torch.bfloat16
    families.save("llama", folder / "short", tokenizer=True, num_hidden_layers=3, dtype=dtype)
    (folder / "text.txt").write_text(families.TEXT * 40)
    return folder / "model", folder / "text.txt"


def run(inputs, out, *words):
    return blockwise.main([*map(str, inputs), *FLAGS.split(), "--out", str(out), *words])


def plain(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_training_it_is_rounding(clipped, dtype, inputs, tmp_path):
    """Of a bfloat16 model, whatever is computed in."""
    words, grid = ["--epochs", "0", "--dtype", dtype], Grid(2, 16)
    inputs = inputs[0].with_name("short"), inputs[1]
    dense = plain(inputs[0], torch.bfloat16)
    ranges = make_ranges(dense)
    if clipped:
        ends = {f"{n}.low": r[0] for n, r in ranges.items()}
        ends |= {f"{n}.high": r[1] for n, r in ranges.items()}
        paths.save_tensors(tmp_path / clip_file.FILE, ends, clip_file.note(inputs[0], grid))
        words += ["--clip", str(tmp_path)]
    else:
        ranges = {n: (low * 2, high * 2) for n, (low, high) in ranges.items()}
    assert run(inputs, tmp_path / "out", *words) == 0
    expected = logits(rounded(dense, ranges))
    assert torch.equal(logits(plain(tmp_path / "out")), expected)


def test_a_block_is_trained_as_plain_autograd_does(inputs, tmp_path):
    rate, grid_rate, grid = 2e-3, 1e-3, Grid(3, 16)
    words = ["--bits", "3", "--epochs", "2", "--batch_size", "3"]
    words += ["--weight_lr", str(rate), "--quant_lr", str(grid_rate)]
    assert run(inputs, tmp_path / "out", *words) == 0

    model = plain(inputs[0]).requires_grad_(False)
    tokenizer = load.load_tokenizer(inputs[0])
    windows = corpora.calibration(tokenizer, str(inputs[1]), nsamples=8, seqlen=16, seed=0)
    first, seen = model.model.layers[0], []
    first.register_forward_hook(lambda m, a, k, y: seen.append((a, k, y)), with_kwargs=True)
    batches = windows[:6].split(3)
    for ids in batches:
        model(ids, use_cache=False)
    calls, seen = seen, None
    first._forward_hooks.clear()
    names = [n for n, m in first.named_modules() if isinstance(m, torch.nn.Linear)]
    trained = {}
    for name in names:
        weight = first.get_submodule(name).weight
        begin = nearest(weight, grid, torch.float32)
        parts = (weight, begin.scale, begin.zero.float())
        trained[name] = [t.detach().clone().requires_grad_() for t in parts]
    optimizer = torch.optim.AdamW(
        [
            {"params": [t for _, *ts in trained.values() for t in ts], "lr": grid_rate},
            {"params": [w for w, *_ in trained.values()], "lr": rate},
        ],
        weight_decay=0,
    )
    cosine = [0.05 + 0.475 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine.__getitem__)

    def value(weight, scale, zero):
        zero = through(zero, zero.round().clamp(0, grid.max_code))
        groups = weight.view(-1, 16)
        return learned(groups, scale.view(-1, 1), zero.view(-1, 1), grid).view_as(weight)

    for args, kwargs, target in calls * 2:
        weights = {f"{n}.weight": value(*parts) for n, parts in trained.items()}
        output = torch.func.functional_call(first, weights, args, kwargs)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(output, target).backward()
        optimizer.step()
        rates.step()

    got = plain(tmp_path / "out").model.layers[0]
    grids = result.Grids(tmp_path / "out")
    for name, parts in trained.items():
        scale, zero = grids.read(f"model.layers.0.{name}")
        assert torch.allclose(scale, parts[1], atol=1e-5)
        assert not torch.allclose(
            scale, nearest(first.get_submodule(name).weight, grid, torch.float32).scale, atol=1e-4
        )
        assert torch.equal(zero, parts[2].round().clamp(0, 7).to(torch.uint8))
        near = (got.get_submodule(name).weight - value(*parts)).abs() < 1e-3
        assert near.float().mean() > 0.99, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_helps_and_goes_on_to_training_and_packing(dtype, inputs, tmp_path, capsys):
    words = ["--epochs", "2", "--weight_lr", "2e-3", "--quant_lr", "2e-3", "--dtype", dtype]
    words += ["--nsamples", "32"]
    assert run(inputs, tmp_path / "out", *words) == 0
    table = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if "|" in line]
    errors = [(float(before), float(after)) for _, before, after in table[2:]]
    assert len(errors) == 3 and all(after < 0.9 * before for before, after in errors)
    expected = logits(plain(tmp_path / "out"))
    for learn in ("scales", "all"):
        dense = plain(inputs[0], expected.dtype)
        built = student.build(dense, Grid(2, 16), learn=learn, start=tmp_path / "out")
        assert torch.equal(logits(built), expected)
    assert export.main([str(tmp_path / "out"), "--out", str(tmp_path / "packed")]) == 0
    assert torch.equal(logits(plain(tmp_path / "packed")), expected)


def test_conv1d(tmp_path, inputs):
    families.save("gpt2", tmp_path / "model", tokenizer=True, n_layer=2)
    assert run((tmp_path / "model", inputs[1]), tmp_path / "out", "--epochs", "1") == 0
    model, codes = result.read(tmp_path / "out")
    for name, module in block_linears(*find_blocks(model)).items():
        assert torch.equal(codes[name].dequantize(torch.float32), get_matrix(module))


def test_killed_runs_resume_to_the_same_bytes(inputs, tmp_path):
    driver = Path(__file__).with_name("blockwise_driver.py")
    driving.killed_runs_equal_the_straight_one(tmp_path, 2 + 2 + 5, driver, *inputs, tmp_path, 2, 0)


def test_refusals(inputs, tmp_path, capsys, monkeypatch):
    def refused(*words, of=inputs):
        assert run(of, tmp_path / "out", *words) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "expected one of 2" in refused("--bits", "9")
    assert "does not divide" in refused("--group_size", "24")
    assert "--val_size 0: at least 1" in refused("--val_size", "0")
    assert "bitdistiller.autoclip" in refused("--clip", str(tmp_path / "nothing"))
    assert "--weight_lr -1.0: expected 0 or more" in refused("--weight-lr", "-1")
    # Windows that are held out are not what --nsamples asks for.
    counted = re.search(r"use --nsamples (\d+)", refused("--nsamples", "9999"))[1]
    assert run(inputs, tmp_path / "out", "--nsamples", counted, "--dry-run") == 0
    huge = plain(inputs[0])
    huge.model.layers[0].mlp.down_proj.weight.data *= 1e25
    huge.save_pretrained(tmp_path / "huge")
    families.save_tokenizer(tmp_path / "huge")
    assert "lower --weight_lr" in refused(of=(tmp_path / "huge", inputs[1]))
    assert run(inputs, tmp_path / "out", "--dry-run") == 0 and not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused()


def test_linears_left_dense_go_through_training_and_export(inputs, tmp_path):
    """--ignore in block-wise training, in train, and in what both are packed to."""
    name = "model.layers.1.mlp.down_proj.weight"
    dense = plain(inputs[0]).state_dict()[name]
    ignore = ["--ignore", "layers.1.mlp.down_proj"]
    assert run(inputs, tmp_path / "ap", "--epochs", "1", "--dtype", "float32", *ignore) == 0
    (tmp_path / "set.jsonl").write_text('{"prompt": "a", "response": "def add"}\n' * 60)
    words = [inputs[0], "--data", tmp_path / "set.jsonl", "--bits", 2, "--q_group_size", 16]
    words += ["--model_max_length", 32, "--max_steps", 2, "--train_kd", "False", "--eval_steps", 2]
    words += ["--out", tmp_path / "qat", "--dtype", "float32", *ignore]
    assert train.main([str(word) for word in words]) == 0
    for made in ("ap", "qat"):
        assert torch.equal(plain(tmp_path / made).state_dict()[name], dense)
        out = tmp_path / f"{made}-packed"
        assert export.main([str(tmp_path / made), "--out", str(out)]) == 0
        config = (out / "config.json").read_text()
        assert '"model.layers.1.mlp.down_proj"' in config
        whole = load.load_model(out).state_dict()
        assert torch.equal(whole[name], dense)
