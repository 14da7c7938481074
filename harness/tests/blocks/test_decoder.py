"""Block by block gives the model's own logits, for every family; stages are what they should be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.blocks.stages import find_stages
from harness.blocks.streams import stream_logits
from harness.checkpoint import load
from harness.errors import UserError
from harness.quant import grid
from harness.quant.scheme import Scheme

SHARED = Path(__file__).resolve().parents[4] / "shared"

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATED = [QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
UP_DOWN = [["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]]
BLOOM = [["self_attention.query_key_value"], ["self_attention.dense"], *UP_DOWN]
STAGES = {
    "opt": [QKV, ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    "llama": GATED,
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "bloom": BLOOM,
    # Attention and MLP side by side: one layer norm feeds both.
    "falcon": [
        ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
        ["self_attention.dense"],
        ["mlp.dense_4h_to_h"],
    ],
    # The newer architecture has a layer norm for each.
    "falcon-new": BLOOM,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": GATED,
    "gemma2": GATED,
    "phi3": [
        ["self_attn.qkv_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_up_proj"],
        ["mlp.down_proj"],
    ],
    "starcoder2": [QKV, ["self_attn.o_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    # The experts are no linear layers but two tensors.
    "mixtral": GATED[:2],
    "neox": [["attention.query_key_value"], ["attention.dense"], *UP_DOWN],
}


def streamed(folder, ids, **options):
    return torch.cat([logits for _, logits in stream_logits(folder, ids, **options)])


@torch.no_grad()
def whole(model, ids, batch_size):
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(batch_size)])


@pytest.fixture(scope="module", params=families.FAMILIES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, families.save(request.param, folder)


def test_streamed_logits_are_the_models_own(saved):
    _, folder, model = saved
    ids = families.windows(5)
    parts = list(stream_logits(folder, ids, batch_size=2))
    assert [start for start, _ in parts] == [0, 2, 4]
    assert torch.equal(torch.cat([logits for _, logits in parts]), whole(model, ids, 2))


def test_linears_are_grouped_by_the_tensor_that_feeds_them(saved):
    family, folder, _ = saved
    decoder = Decoder(folder)
    hidden = decoder.embed(families.windows(1))
    for index in (0, len(decoder) - 1):
        block = decoder.load(index)
        assert find_stages(block, lambda i=index: decoder.forward(i, hidden)) == STAGES[family]


def test_bfloat16_and_sharded_files(tmp_path):
    families.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = families.windows(3)
    assert torch.equal(
        streamed(tmp_path, ids, batch_size=3, dtype=model.dtype), whole(model, ids, 3)
    )
    full = streamed(tmp_path, ids, batch_size=3, dtype=torch.float32)
    assert full.dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(full, whole(model, ids, 3))


def test_names_without_the_models_prefix_are_found(tmp_path):
    # openai-community/gpt2 on the hub names its tensors "h.0...", not "transformer.h.0...".
    model = families.save("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    assert any(name.startswith("h.0.") for name in bare)
    ids = families.windows(2)
    assert torch.equal(streamed(tmp_path, ids, batch_size=2), whole(model, ids, 2))


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_checkpoints_stream_like_they_load(family, layout, tmp_path):
    families.save(family, tmp_path / "dense", hidden_size=64, intermediate_size=96)
    packed = pack(tmp_path / "dense", tmp_path / "packed", grid.Grid(4, 32, True), layout)
    ids = families.windows(3)
    loaded = load.load_model(packed)
    assert torch.equal(streamed(packed, ids, batch_size=3), whole(loaded, ids, 3))


def pack(source, out, a_grid, layout):
    """Round to nearest without gptq: the harness knows no method."""
    decoder = Decoder(source)

    def update(matrices, statistics, hand):
        return {n: sequential.Update(grid.nearest(w, a_grid, torch.float16 if layout == "gptq"
                else decoder.dtype)) for n, w in matrices.items()}  # fmt: skip

    method = sequential.Method(
        "nearest", {}, [sequential.per_stage(update)], (), layout=layout, scheme=Scheme(a_grid)
    )
    sequential.compress(decoder, method, out, base=str(source))
    return out


def test_reading_a_block_again_gives_the_file_again(tmp_path):
    families.save("llama", tmp_path)
    decoder = Decoder(tmp_path)
    before = {n: t.clone() for n, t in decoder.block_tensors(0).items()}
    for parameter in decoder.load(0).parameters():
        parameter.data.zero_()
    decoder.release(0)
    after = decoder.block_tensors(0)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.device.type == "meta" for p in decoder.blocks[0].parameters())


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the repository")
def test_a_trained_model_streams():
    folder = SHARED / "models" / "stories260K"
    text = "Once upon a time, there was a little girl named Lily. She liked to play outside. " * 20
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    ids = ids[: len(ids) // 128 * 128].view(-1, 128)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = streamed(folder, ids, batch_size=2)
    assert torch.equal(logits, whole(model, ids, 2))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss < 3.5  # of ln 512 = 6.2 for a model that knows nothing


def test_windows_longer_than_the_context(tmp_path):
    families.save("llama", tmp_path)
    assert next(stream_logits(tmp_path, families.windows(1, 64)))[1].shape == (1, 64, 288)
    with pytest.raises(UserError, match=r"65 .* context of 64"):
        next(stream_logits(tmp_path, families.windows(1, 65)))


def test_damaged_checkpoints_are_named(tmp_path):
    families.save("llama", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"

    def damaged(name, change):
        folder = shutil.copytree(tmp_path / "a", tmp_path / name)
        changed = {n: t.clone() for n, t in tensors.items()}
        change(changed)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    cases = {
        "NaN or infinite": lambda t: t[down].__setitem__((0, 0), torch.nan),
        "asks for": lambda t: t.__setitem__(down, t[down][:, :7].contiguous()),
        "lacks 1 tensors": lambda t: t.pop(down),
    }
    for number, (message, change) in enumerate(cases.items()):
        folder = damaged(f"case{number}", change)
        with pytest.raises(UserError, match=message) as caught:
            streamed(folder, families.windows(1))
        assert down in str(caught.value)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["num_hidden_layers"] = 7
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks 18 tensors"):
        streamed(tmp_path / "a", families.windows(1))
