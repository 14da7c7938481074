"""Clipping from the command to the checkpoint, against what the finished model's own inputs say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import driving
import families
from bitdistiller import autoclip, clip_file, student
from bitdistiller.autoclip import clip
from bitdistiller.autoclip_run import UNCLIPPED, make_grid
from harness import precision
from harness.blocks import decoder as decoder_module
from harness.checkpoint import load
from harness.data import corpora
from harness.metrics import perplexity
from harness.modules import get_matrix, linears
from harness.quant.clip_search import clamp, full_range, search
from harness.quant.grid import Grid, nearest
from harness.quant.hessian import GroupMoments
from harness.quant.normal_float import nearest as nearest_level

SETTINGS = {"n_samples": 5, "seqlen": 24, "q_group_size": 16, "bos": "none"}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(decoder_module, "TOKENS_PER_BATCH", 2 * 24)


def make(family, folder, **changes):
    families.save(family, folder / "model", tokenizer=True, **changes)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return str(folder / "model"), str(folder / "text.txt")


def blocks_of(folder):
    """Block prefix -> block, and a function that runs the whole model over the calibration."""
    decoder = decoder_module.Decoder(Path(folder))
    model = load.load_model(folder)
    blocks = enumerate(model.get_submodule(decoder.prefix))
    return model, {f"{decoder.prefix}.{index}": block for index, block in blocks}


@torch.no_grad()
def inputs_of(model, blocks, windows):
    """Linear's full name -> its inputs [N, I] in the batches of the pass."""
    found = {}
    for prefix, block in blocks.items():
        for name, module in linears(block).items():
            seen = found.setdefault(f"{prefix}.{name}", [])
            module.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
    for part in windows.split(2):
        model(part, use_cache=False)
    return found


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("llama", "int", torch.bfloat16), ("llama", "nf3", torch.bfloat16),
        ("gpt2", "int", torch.float32), ("bloom", "nf4", torch.float32),
    ],
)  # fmt: skip
def test_ranges_are_those_of_the_inputs_that_the_result_itself_gives(family, kind, dtype, tmp_path):
    """Each stage was searched on the effect of all before it, which is what the result shows."""
    layers = {"n_layer": 2} if family in ("gpt2", "bloom") else {"num_hidden_layers": 2}
    model, text = make(family, tmp_path, dtype=dtype, **layers)
    out = tmp_path / "out"
    clip(model, text, out=out, quant_type=kind, w_bit=None, format="dense", **SETTINGS)
    grid = make_grid(None, 16, kind)
    ranges = clip_file.read(out, Path(model), grid)
    windows = corpora.calibration(load.load_tokenizer(model), text, nsamples=5, seqlen=24, seed=0)
    result, blocks = blocks_of(out)
    _, dense = blocks_of(model)
    inputs = inputs_of(result, blocks, windows)
    assert set(ranges) == set(inputs)
    clipped = 0
    for name, (low, high) in ranges.items():
        prefix = next(prefix for prefix in blocks if name.startswith(f"{prefix}."))
        linear = name.removeprefix(f"{prefix}.")
        weight = get_matrix(dense[prefix].get_submodule(linear)).float()
        moments = GroupMoments(weight.shape[1], "cpu", grid.group_size)
        for batch in inputs[name]:
            moments.add(batch)
        expected = full_range(weight, grid)
        if not UNCLIPPED.search(linear):
            expected = search(weight, moments.mean(), grid, dtype)
            clipped += not torch.equal(expected[0], full_range(weight, grid)[0])
        assert low.dtype == high.dtype == dtype
        assert torch.equal(low.float(), expected[0]) and torch.equal(high.float(), expected[1])
        clamped = clamp(weight, low.float(), high.float())
        rounded = (
            nearest(clamped, grid, dtype).dequantize(dtype)
            if kind == "int"
            else nearest_level(clamped, grid, dtype).to(dtype)
        )
        stored = get_matrix(blocks[prefix].get_submodule(linear))
        assert torch.equal(stored, rounded)
    assert clipped >= 6  # all but the attention's inputs


@pytest.mark.parametrize(
    ("kind", "stored"), [("int", torch.bfloat16), ("nf3", torch.bfloat16), ("int", torch.float16)]
)
@pytest.mark.parametrize("units", [True, False])
@torch.no_grad()
def test_training_starts_at_the_clipped_checkpoint(
    kind, stored, units, tmp_path, capsys, monkeypatch
):
    """On CPUs with and without units for short dtypes."""
    monkeypatch.setattr(precision, "cpu_has_units", lambda dtype: units)
    model, text = make("llama", tmp_path, dtype=stored, num_hidden_layers=2)
    clip(model, text, out=tmp_path / "out", quant_type=kind, **SETTINGS)
    grid = make_grid(None, 16, kind)
    ranges = clip_file.read(tmp_path / "out", Path(model), grid)
    assert ("as float16 overflows" in capsys.readouterr().err) == (
        units and stored == torch.float16
    )
    computed = precision.choose_for_training("auto", stored, "cpu", model)
    assert computed == (torch.bfloat16 if units else torch.float32)
    dense = load.load_model(model, dtype=computed)
    built = student.build(dense, grid, ranges=ranges, dtype=stored)
    tokens = families.windows(2)
    rounded = load.load_model(tmp_path / "out", dtype=computed)
    assert torch.equal(built(tokens).logits, rounded(tokens).logits)


def test_queries_and_keys_are_told_by_name():
    left = ["self_attn.q_proj", "attn.k_proj", "attention.query_key_value", "qkv_proj", "c_attn"]
    assert all(UNCLIPPED.search(name) for name in left)
    others = ["self_attn.v_proj", "o_proj", "mlp.gate_proj", "mlp.dense_4h_to_h", "attn.c_proj"]
    assert not any(UNCLIPPED.search(name) for name in others)


def test_the_command(tmp_path, monkeypatch, capsys):
    make("llama", tmp_path, num_hidden_layers=2)
    monkeypatch.chdir(tmp_path)
    words = ["model", "--calib_dataset", "text.txt", "--n_samples", "4", "--seqlen", "24"]
    words += ["--q_group_size", "16", "--run_clip", "--dump_clip", "cache/it.safetensors"]
    assert autoclip.main([*words, "--dry-run"]) == 0
    assert "autoclip: 2 blocks -> model-clip-w2 (compressed-tensors" in capsys.readouterr().out
    assert not (tmp_path / "model-clip-w2").exists()
    assert autoclip.main(words) == 0
    shown = capsys.readouterr().out
    assert "| self_attn.q_proj | " in shown and "written to model-clip-w2" in shown
    out = tmp_path / "model-clip-w2"
    copy = tmp_path / "cache/it.safetensors"
    copy.unlink()  # as a kill just before it leaves it
    for _ in range(2):
        assert autoclip.main(words) == 0
        assert "model-clip-w2 is finished already." in capsys.readouterr().err
        assert copy.read_bytes() == (out / clip_file.FILE).read_bytes()
    rows = json.loads((out / "compression_log.json").read_text())["layers"]
    for row in rows:
        kept = "q_proj" in row["name"] or "k_proj" in row["name"]
        assert (row["range_kept"] == 1) == kept
        assert (
            row["error"] == row["error_unclipped"]
            if kept
            else row["error"] < row["error_unclipped"]
        )
    # Packed and dense hold the same model.
    assert autoclip.main([*words[:-2], "--format", "dense", "--out", "dense"]) == 0
    tokens = families.windows(2)
    with torch.no_grad():
        packed, dense = (load.load_model(name)(tokens).logits for name in (out, "dense"))
    assert torch.equal(packed, dense)
    assert load_file(out / clip_file.FILE).keys() == load_file("dense/clip.safetensors").keys()


def test_two_ranks_clip_as_one(tmp_path):
    # Sizes that divide neither by the ranks nor by the width of a vector register.
    model, text = make("llama", tmp_path, num_hidden_layers=2, intermediate_size=80)
    driver = Path(__file__).with_name("clip_ranks_driver.py")
    made = driving.two_ranks_equal_one(tmp_path, driver, model, text)
    assert made == {"int", "levels", "cli"}


def test_killed_runs_resume_to_the_same_bytes(tmp_path):
    model, text = make("llama", tmp_path / "inputs", num_hidden_layers=2)
    driver, folder = Path(__file__).with_name("clip_resume_driver.py"), tmp_path / "runs"
    folder.mkdir()
    driving.killed_runs_equal_the_straight_one(folder, 2 + 2 + 3, driver, model, text, folder, 2, 0)
    assert (folder / "time0" / clip_file.FILE).is_file()


@pytest.mark.slow
def test_clipped_rounding_beats_rounding_on_the_embedded_model(tmp_path):
    tokenizer = load.load_tokenizer("tiny-llama")
    windows = corpora.evaluation(tokenizer, "stdlib", seqlen=512, limit=40)

    def loss(model):
        return perplexity.perplexity(model, windows, batch_size=8).value

    for bits, gain in ((2, 0.8), (3, 0.98)):
        grid, model = Grid(bits, 128), load.load_model("tiny-llama")
        prefix = decoder_module.Decoder(load.resolve("tiny-llama")).prefix
        for module in linears(model.get_submodule(prefix)).values():
            weight = nearest(module.weight.data.float(), grid, module.weight.dtype)
            module.weight.data = weight.dequantize(module.weight.dtype)
        out = tmp_path / str(bits)
        clip("tiny-llama", "stdlib", out=out, w_bit=bits, n_samples=16, seqlen=256)
        assert loss(load.load_model(out)) < gain * loss(model)
