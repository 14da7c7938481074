"""A packed file and its config say the same, or are refused; what is not read says what it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.checkpoint import load, quantconfig
from harness.checkpoint.weights import Weights
from harness.commands.info import info
from harness.errors import UserError
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

NAME = "model.layers.1.mlp.down_proj"


def make(tmp_path, layout, grid):
    families.save("llama", tmp_path / "dense", num_hidden_layers=2, hidden_size=64)

    def round_all(matrices, statistics, hand):
        return {n: sequential.Update(nearest(w, grid, torch.float16)) for n, w in matrices.items()}

    decoder, out = Decoder(tmp_path / "dense"), tmp_path / "packed"
    method = sequential.Method(
        "rtn", {}, [sequential.per_stage(round_all)], (), layout=layout, scheme=Scheme(grid)
    )
    sequential.compress(decoder, method, out, base="dense")
    return out


def configure(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def weights_of(config, **changes):
    group = config["config_groups"]["group_0"]
    return {"group_0": group | {"weights": group["weights"] | changes}}


def edit(folder, change):
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{NAME}.bias" in tensors or any(n.startswith(NAME) for n in tensors):
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    whole = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, message):
    """By the reader of whole models, block by block and by info (which reads headers alone)."""
    for read in (load.load_model, lambda f: Decoder(f).stored(f"{NAME}.weight")):
        with pytest.raises(UserError, match=message):
            read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_format": "gptq_v3"}, "checkpoint_format 'gptq_v3'; known are"),
        ({"checkpoint_format": "gptq_v2"}, "other zero points than a symmetric grid of 4 bits"),
        ({"bits": 8}, r"scales has shape \[3, 64\]; 8 bits in groups of 16"),
        ({"bits": 3}, "3 bits in groups of 16"),
        ({"bits": "4"}, "has '4' for bits; expected a whole number"),
        ({"group_size": 32}, "4 bits in groups of 32"),
        ({"group_size": None}, "has None for group_size"),
        ({"sym": None}, "has None for sym; expected true or false"),
        ({"dynamic": {"-:.*mlp.*": {}}}, "gptq with dynamic"),
        ({"is_marlin_format": True}, "gptq with is_marlin_format"),
        ({"quant_method": "awq"}, r"awq \(AWQ's own packing\), which is not read here"),
        ({"quant_method": None}, "expected an object with quant_method"),
    ],
)
def test_gptq_that_contradicts_its_config(tmp_path, changes, message):
    folder = make(tmp_path, "gptq", Grid(4, 16, True))
    configure(folder, **changes)
    refused(folder, message)


def test_gptq_in_any_order_of_columns(tmp_path):
    """desc_act with g_idx in order is read as without; out of order as its g_idx says."""
    folder = make(tmp_path, "gptq", Grid(4, 16, True))
    before = load.load_model(folder).state_dict()[f"{NAME}.weight"]
    configure(folder, desc_act=True)
    assert torch.equal(load.load_model(folder).state_dict()[f"{NAME}.weight"], before)
    columns = before.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))

    def shuffle(tensors):
        from harness.checkpoint.layouts.packing import pack_bits, unpack_bits

        codes = unpack_bits(tensors[f"{NAME}.qweight"].T, 4)
        tensors[f"{NAME}.qweight"] = pack_bits(codes[:, order], 4).T.contiguous()
        tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"][order]

    edit(folder, shuffle)
    after = load.load_model(folder).state_dict()[f"{NAME}.weight"]
    assert torch.equal(after, before[:, order])


CT = "compressed-tensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda c: {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "with kv_cache_scheme"),
        (lambda c: {"transform_config": {"config_groups": {"R1": {}}}}, "with transform_config"),
        (lambda c: {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity_config"),
        (
            lambda c: {"config_groups": {"group_0": c["config_groups"]["group_0"] | {
                "input_activations": {"num_bits": 8}}}},
            "group_0 quantizes input_activations too",
        ),
        (
            lambda c: {"config_groups": {"group_0": c["config_groups"]["group_0"] | {
                "output_activations": {"num_bits": 8}}}},
            "group_0 quantizes output_activations too",
        ),
        (lambda c: {"format": "float-quantized"}, "in the format 'float-quantized'"),
        (lambda c: {"quantization_status": "initialized"}, "of the status 'initialized'"),
        (lambda c: {"config_groups": weights_of(c, symmetric=True)}, "weight_zero_point is there"),
        (lambda c: {"config_groups": weights_of(c, num_bits=3)}, "words a row"),
        (lambda c: {"config_groups": weights_of(c, num_bits=8)}, "words a row"),
        (lambda c: {"config_groups": weights_of(c, num_bits=None)}, "has None for num_bits"),
        (lambda c: {"config_groups": weights_of(c, type="float")}, "numbers of type 'float'"),
        (lambda c: {"config_groups": weights_of(c, group_size=32)}, "in groups of 32"),
        (lambda c: {"config_groups": weights_of(c, strategy="tensor")}, "the strategy 'tensor'"),
        (lambda c: {"config_groups": {}}, "expected one object or more in config_groups"),
        (lambda c: {"config_groups": None}, "expected one object or more in config_groups"),
        (lambda c: {"config_groups": {"a": 1}}, "expected an object under weights"),
        (lambda c: {"config_groups": {"a": {}, "b": {}}}, "expected an object under weights"),
    ],
)  # fmt: skip
def test_compressed_tensors_that_contradicts_its_config(tmp_path, changes, message):
    folder = make(tmp_path, CT, Grid(4, 16, False))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder, **changes(config))
    refused(folder, message)


def test_the_old_packing_tells_a_wrong_width(tmp_path):
    """7 bits of the old packing take as many words as 8 bits: the free bits tell."""
    folder = make(tmp_path, CT, Grid(8, 16, True))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder, config_groups=weights_of(config, num_bits=7))
    refused(folder, "wider than the 7 bits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{NAME}.weight_shape": torch.zeros(2, dtype=torch.int64)}), "0 x 0"),
        (lambda t: t.pop(f"{NAME}.weight_scale"), "lacks weight_scale"),
        (lambda t: t.pop(f"{NAME}.weight_zero_point"), "weight_zero_point is missing"),
        (lambda t: t.update({f"{NAME}.input_scale": torch.ones(1)}), "input_scale stands beside"),
        (
            lambda t: t.update({f"{NAME}.weight_packed": t[f"{NAME}.weight_packed"].flatten()}),
            "expected two dimensions",
        ),
        (
            lambda t: t.update({f"{NAME}.weight_g_idx": torch.full((48,), 9, dtype=torch.int32)}),
            "names groups 9 to 9 for 48 columns; there are 3",
        ),
    ],
)
def test_tensors_of_a_packed_linear(tmp_path, change, message):
    folder = make(tmp_path, CT, Grid(4, 16, False))
    edit(folder, change)
    refused(folder, message)


def test_zero_points_that_are_not_packed_are_read(tmp_path):
    """Older versions of the library stored them as int8, less the middle of the grid."""
    folder = make(tmp_path, CT, Grid(4, 16, False))
    before = load.load_model(folder).state_dict()[f"{NAME}.weight"]

    def unpack(tensors):
        from harness.checkpoint.layouts.packing import unpack_bits

        packed = tensors[f"{NAME}.weight_zero_point"]
        zero = unpack_bits(packed.T.contiguous(), 4).T.to(torch.int8) - 8
        tensors[f"{NAME}.weight_zero_point"] = zero.contiguous()

    edit(folder, unpack)
    assert torch.equal(load.load_model(folder).state_dict()[f"{NAME}.weight"], before)


def test_unknown_fields_are_named(tmp_path, capfd):
    folder = make(tmp_path, "gptq", Grid(4, 16, True))
    configure(folder, damp_percent=0.01, some_new_field=3)
    Weights(folder)
    said = capfd.readouterr().err
    assert "quantization_config says some_new_field: 3, unknown here" in said


def test_packed_tensors_without_a_config(tmp_path):
    folder = make(tmp_path, CT, Grid(4, 16, True))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "is a packed tensor, and config.json has no quantization_config")


def test_others_folders_say_what_they_are(tmp_path):
    folder = make(tmp_path, "gptq", Grid(4, 16, True))
    configure(folder, quant_method="awq")
    assert "awq (AWQ's own packing) (another library's, not read here)" in info(folder)
    edit(folder, lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    configure(folder, quant_method="gptq")
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(UserError, match="AutoGPTQ's first versions"):
        Weights(folder)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(UserError, match="is a LoRA adapter of some/base, no model"):
        load.resolve(lora)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"is a \.gguf file, which is not read yet"):
        load.resolve(tmp_path / "x.gguf")
    tokens = tmp_path / "dense"
    (tokens / "tokenizer.model").write_bytes(b"\x0a\x0bnonsense")
    with pytest.raises(UserError, match=r"tokenizer\.model alone.*pip install sentencepiece"):
        load.load_tokenizer(tokens)


def test_the_layouts():
    assert quantconfig.layout_of(None) == "dense"
    assert quantconfig.layout_of({"quant_method": "bitsandbytes"}) == "other"
    assert quantconfig.layout_of({"quant_method": "gptq", "desc_act": True}) == "gptq"
