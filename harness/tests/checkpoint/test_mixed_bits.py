"""Other grids for some linears: written, told, measured and read back, here and in transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, Update, compress, per_stage
from harness.checkpoint import quantconfig
from harness.checkpoint.load import load_model
from harness.checkpoint.weights import Weights
from harness.cli import main
from harness.errors import UserError
from harness.modules import get_matrix
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

WIDE, NARROW = Grid(8, -1, True), Grid(3, 16, True)
SCHEME = Scheme(
    NARROW, (("re:.*self_attn", WIDE), ("up_proj", None), ("0.self_attn.o_proj", NARROW))
)


def test_the_last_exception_that_means_a_linear_counts():
    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert [SCHEME.of(name) for name in names] == [NARROW, WIDE]
    assert SCHEME.of("model.layers.1.mlp.up_proj") is None
    assert SCHEME.of("model.layers.1.mlp.down_proj") == NARROW
    assert SCHEME.grids == [NARROW, WIDE]


def test_other_tools_targets_count_as_their_library_counts_them():
    """Names, then patterns in the order of the alphabet, then classes; recorded from
    compressed-tensors 0.20's `match_named_modules` and `match_targets`."""

    def group(bits, *targets):
        weights = {"num_bits": bits, "symmetric": True, "strategy": "channel"}
        return {"weights": weights, "targets": list(targets)}

    groups = [group(2, "re:.*down", "m.0.up"), group(3, "Linear"), group(4, "re:.*do", "re:.*up")]
    told = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {str(number): value for number, value in enumerate(groups)},
    }  # fmt: skip
    scheme = quantconfig.scheme_of(told)
    bits = {name: scheme.of(name).bits for name in ("m.0.up", "m.1.up", "m.0.down", "m.0.gate")}
    assert bits == {"m.0.up": 2, "m.1.up": 4, "m.0.down": 4, "m.0.gate": 3}


def test_a_scheme_is_asked_fast_and_says_what_means_nothing():
    names = [f"model.layers.{n}.mlp.experts.{n % 64}.up_proj" for n in range(20_000)]
    scheme = Scheme(None, tuple((name, WIDE) for name in names))
    assert all(scheme.of(name) is WIDE for name in names)  # minutes, were all names gone through
    assert scheme.of("model.layers.0.mlp.down_proj") is None
    with pytest.raises(UserError, match=r"up_prj: no linear .* Did you mean 'up_proj'"):
        Scheme(WIDE, (("up_prj", NARROW),)).check(names[:9])
    with pytest.raises(ValueError, match="without a grid"):
        Scheme(None, (("up_proj", None),))


def rounded(matrices, statistics, hand):
    grids = {name: SCHEME.of(f"{hand.prefix}.{name}") for name in matrices}
    return {n: Update(nearest(matrices[n], g, torch.float32)) for n, g in grids.items() if g}


def run(source, out, layout="compressed-tensors"):
    method = Method("rtn", {}, [per_stage(rounded)], (), layout=layout, scheme=SCHEME)
    return compress(Decoder(source), method, out, base="m")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mixed_bits_round_trip(family, tmp_path, capsys, monkeypatch):
    model = families.save(family, tmp_path / "model", tokenizer=True)
    if family == "gpt2":  # whose linears have other names, all in the default
        monkeypatch.setattr(f"{__name__}.SCHEME", Scheme(NARROW, (("re:.*attn", WIDE),)))
    run(tmp_path / "model", tmp_path / "out")
    run(tmp_path / "model", tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = quantconfig.scheme_of(config)
    for name, module in model.named_modules():
        if f"{name}.weight" in Weights(tmp_path / "out").names and "h.0" in f"{name} layers.0":
            packed = Weights(tmp_path / "out").is_packed(f"{name}.weight")
            assert packed == (scheme.of(name) is not None)
            assert not packed or scheme.of(name) == SCHEME.of(name)
            assert not packed or get_matrix(module).ndim == 2
    ids = families.windows(2)
    with torch.no_grad():
        ours, dense = (load_model(tmp_path / n)(ids).logits for n in ("out", "dense"))
        assert torch.equal(ours, dense)
        if family == "llama":
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
            torch.testing.assert_close(theirs(ids).logits, ours)
    assert main(["info", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "3 bits, groups of 16, symmetric; 8 bits, one scale per row, symmetric" in shown
    back = tmp_path / "back"
    assert main(["convert", str(tmp_path / "out"), "--format", "dense", "--out", str(back)]) == 0
    expected = load_model(tmp_path / "dense").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in load_model(back).state_dict().items())


def test_what_transformers_does_not_read_is_said(tmp_path, capfd):
    """It asks the first group alone whether there are zero points."""
    families.save("llama", tmp_path / "model")
    scheme = Scheme(Grid(4, 16), (("re:.*self_attn", WIDE),))
    method = Method("rtn", {}, [per_stage(rounded)], (), layout="compressed-tensors", scheme=scheme)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.SCHEME", scheme)
        compress(Decoder(tmp_path / "model"), method, tmp_path / "out", base="m")
    assert "the harness only (transformers:" in capfd.readouterr().err
    assert torch.isfinite(load_model(tmp_path / "out")(families.windows(1)).logits).all()


def test_refusals(tmp_path):
    families.save("llama", tmp_path / "model")
    with pytest.raises(UserError, match="all linears on one grid; use --format compressed-tens"):
        run(tmp_path / "model", tmp_path / "out", "gptq")
    run(tmp_path / "model", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    group = config["quantization_config"]["config_groups"]["group_1"]
    group["targets"] = group["targets"][1:]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="is packed, and quantization_config has no group that"):
        load_model(tmp_path / "out")
    group["targets"] = "Linear"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected lists of names as targets"):
        load_model(tmp_path / "out")
    group["targets"] = ["re:("]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the target 're:\(', no regular expression"):
        load_model(tmp_path / "out")
    dense = Scheme(Grid(4, 16, True), (("up_proj", None),))
    method = Method("rtn", {}, [per_stage(rounded)], (), layout="gptq", scheme=dense)
    with pytest.raises(UserError, match="no place for the names of linears that stay dense"):
        compress(Decoder(tmp_path / "model"), method, tmp_path / "g", base="m")
