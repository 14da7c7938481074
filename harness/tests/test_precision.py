"""The dtype of the computation is asked of the device; what is written keeps the checkpoint's."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import families
from harness import cli, precision
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.checkpoint import layouts, load
from harness.checkpoint.weights import Weights
from harness.errors import UserError
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

HALF = (torch.bfloat16, torch.float16)
PROBE = """
import torch
from harness import precision
for stored in (torch.bfloat16, torch.float16):
    print(precision.name(precision.choose("auto", stored, "cpu", "m")))
"""


@pytest.fixture(params=[True, False], ids=["units", "no-units"])
def units(request, monkeypatch):
    """A CPU with units for both short dtypes, and one without."""
    monkeypatch.setattr(precision, "cpu_has_units", lambda dtype: request.param)
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for dtype in (torch.float32, *HALF):
        folder = root / precision.name(dtype)
        families.save("llama", folder, tokenizer=True, dtype=dtype, num_hidden_layers=2)
    return root


@torch.no_grad()
def logits(model):
    return model(families.windows(2), use_cache=False).logits


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("stored", [torch.float32, *HALF])
def test_auto_is_the_stored_dtype_where_it_is_fast_and_float32_elsewhere(stored, units, capsys):
    chosen = precision.choose("auto", stored, "cpu", "tiny")
    assert chosen == (stored if units else torch.float32)
    said = capsys.readouterr().err
    assert said.startswith(f"tiny: computing in {precision.name(chosen)}, ")
    assert said.count("\n") == 1
    slow = not units and stored != torch.float32
    assert (f"no fast {precision.name(stored)}" in said) == slow
    assert precision.choose("bfloat16", stored, "cpu", "tiny") == torch.bfloat16
    with pytest.raises(UserError, match="Did you mean 'bfloat16'"):
        precision.choose("bfloat", stored, "cpu", "tiny")


def test_training_never_chooses_float16(units, capsys):
    chosen = {d: precision.choose_for_training("auto", d, "cpu", "m") for d in HALF}
    assert set(chosen.values()) == {torch.bfloat16 if units else torch.float32}
    assert precision.choose_for_training("auto", torch.float32, "cpu", "m") == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="GPUs only"):
            precision.choose_for_training("float16", torch.float16, "cpu", "m")


def test_the_processor_is_asked(monkeypatch):
    """Flags of processors with and without units, and oneDNN's own limit, which beats them."""
    flags = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    assert not any(precision.cpu_has_units(dtype) for dtype in HALF)
    flags["avx512_bf16"] = True
    assert [precision.cpu_has_units(dtype) for dtype in HALF] == [True, False]
    flags["amx_fp16"] = True
    assert all(precision.cpu_has_units(dtype) for dtype in HALF)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16")
    assert [precision.cpu_has_units(dtype) for dtype in HALF] == [True, False]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not any(precision.cpu_has_units(dtype) for dtype in HALF)


def test_onednns_limit_holds_on_any_machine():
    """In a process of its own, as a user sets it."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["float32", "float32"]


@pytest.mark.parametrize("layout", layouts.QUANTIZED)
@pytest.mark.parametrize("stored", HALF)
def test_what_is_written_does_not_follow_what_is_computed_in(layout, stored, models, tmp_path):
    """Sizes, dtypes, and bits of all that was not quantized; the values that the file holds, at any
    dtype, are those that were computed with; transformers reads the same, bit for bit."""
    source = models / precision.name(stored)
    grid, scales = Grid(4, 16, True), layouts.of(layout).scale_dtype(stored)

    def update(matrices, statistics, hand):
        return {n: sequential.Update(nearest(w, grid, scales)) for n, w in matrices.items()}

    method = sequential.Method(
        "nearest", {}, [sequential.per_stage(update)], (), layout=layout, scheme=Scheme(grid)
    )
    made = {}
    for computed in (stored, torch.float32):
        out = tmp_path / precision.name(computed)
        sequential.compress(Decoder(source, dtype=computed), method, out, base=str(source))
        made[computed] = tensors_of(out)
    short, wide = made.values()
    assert short.keys() == wide.keys()
    assert all(torch.equal(bits(short[n]), bits(wide[n])) for n in short)
    before = tensors_of(source)
    untouched = before.keys() & wide.keys()
    if layout == "dense":
        untouched = {name for name in untouched if "_proj" not in name}
    assert "model.embed_tokens.weight" in untouched
    assert all(torch.equal(bits(before[n]), bits(wide[n])) for n in untouched)
    assert all(before[n].dtype == wide[n].dtype for n in untouched)

    out = tmp_path / "float32"
    assert json.loads((out / "config.json").read_text())["dtype"] == precision.name(stored)
    card = (out / "README.md").read_text()
    assert "| computed in | float32 |" in card
    assert f"| stored in | {precision.name(stored)} |" in card
    for computed in (stored, torch.float32):
        ours = load.load_model(out, dtype=computed)
        blocks = Decoder(out, dtype=computed)
        name = f"{blocks.prefix}.1.mlp.down_proj.weight"
        loaded = blocks.load(1).mlp.down_proj.weight
        assert torch.equal(loaded, ours.get_parameter(name))
        if layout != "gptq":  # transformers wants other libraries for it
            plain = AutoModelForCausalLM.from_pretrained(out, dtype=computed).eval()
            assert torch.equal(logits(plain), logits(ours))


def test_survivors_keep_their_digits_when_fewer_are_computed_with(models, tmp_path):
    """Pruning a float32 model in bfloat16 must not round what stays."""

    def update(matrices, statistics, hand):
        return {n: sequential.Update(w * (w.abs() > 0.05)) for n, w in matrices.items()}

    out, source = tmp_path / "out", models / "float32"
    decoder = Decoder(source, dtype=torch.bfloat16)
    sequential.compress(
        decoder, sequential.Method("drop", {}, [sequential.per_stage(update)], ()), out, base="b"
    )
    before, after = tensors_of(source), tensors_of(out)
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept]), name


def test_evaluation_records_both_dtypes_and_measures_again_when_one_changes(
    models, tmp_path, units, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(families.TEXT * 40)
    words = ["eval", str(models / "bfloat16"), "--ppl", "text.txt", "--limit", "2"]
    assert cli.main(words) == 0
    computed = "bfloat16" if units else "float32"
    metric = json.loads((tmp_path / "results" / "bfloat16.json").read_text())["metrics"]
    assert metric["ppl:text.txt"]["settings"]["dtype"] == {
        "computed": computed, "stored": "bfloat16",
    }  # fmt: skip
    capsys.readouterr()
    assert cli.main([*words, "--dtype", computed]) == 0
    assert "ppl:text.txt: measured before, kept" in capsys.readouterr().err
    other = "float32" if units else "bfloat16"
    assert cli.main([*words, "--dtype", other]) == 0
    assert "kept" not in capsys.readouterr().err


def test_a_run_that_was_begun_in_another_dtype_is_refused_with_the_way_on(models, tmp_path):
    def failing(matrices, statistics, hand):
        if hand.index:
            raise KeyboardInterrupt
        return {name: sequential.Update(matrix) for name, matrix in matrices.items()}

    source, method = (
        models / "bfloat16",
        sequential.Method("same", {}, [sequential.per_stage(failing)], ()),
    )
    with pytest.raises(KeyboardInterrupt):
        sequential.compress(
            Decoder(source, dtype=torch.bfloat16), method, tmp_path / "out", base="b"
        )
    with pytest.raises(UserError, match=r"bfloat16 there, float32 now.*add --dtype bfloat16"):
        sequential.compress(
            Decoder(source, dtype=torch.float32), method, tmp_path / "out", base="b"
        )


def test_weights_know_the_dtype_of_the_checkpoint(models):
    for dtype in (torch.float32, *HALF):
        assert Weights(models / precision.name(dtype)).dtype == dtype
