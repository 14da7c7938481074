"""Both readers take the same tensors in the same dtypes as transformers, and name what is left."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
from harness import distributed
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.blocks.streams import stream_logits
from harness.checkpoint import load
from harness.commands.info import info
from harness.errors import UserError
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

SHARED = families.GQA | {"num_hidden_layers": 2}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
           "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
          "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
ROUTED = {
    "DeepseekV3Config": SHARED | EXPERTS | LATENT,
    "Glm4MoeConfig": SHARED | EXPERTS | {"head_dim": 16},
}


def save(model, folder):
    model.save_pretrained(folder)
    families.save_tokenizer(folder)
    return folder


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def streamed(folder, ids, **options):
    return torch.cat([logits for _, logits in stream_logits(folder, ids, **options)])


def keep(matrices, statistics, hand):
    return {name: sequential.Update(matrix) for name, matrix in matrices.items()}


@pytest.mark.parametrize("kind", ROUTED)
def test_what_transformers_keeps_in_float32_stays_so(tmp_path, kind):
    """Corrections of the routing of 34.5 +- 0.1: in bfloat16 they are multiples of 1/4."""
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**ROUTED[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = save(model, tmp_path / "model")

    def correct(tensors):
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape) * 0.1
            if name.endswith("e_score_correction_bias"):
                tensors[name] = 34.5 + noise
            elif tensor.ndim > 1:
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)

    change(folder, correct)
    ids = families.windows(2)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        wanted = theirs(ids, use_cache=False).logits
        found = load.load_model(folder, dtype=torch.bfloat16)(ids, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert torch.equal(streamed(folder, ids, dtype=torch.bfloat16), wanted)
    # What is written keeps the digits too.
    decoder = Decoder(folder, dtype=torch.bfloat16)
    sequential.compress(
        decoder,
        sequential.Method("keep", {}, [sequential.per_stage(keep)], ()),
        tmp_path / "out",
        base="m",
    )
    before, after = Decoder(folder), Decoder(tmp_path / "out")
    names = [n for n in before.names.plain if n.endswith("e_score_correction_bias")]
    assert names and all(torch.equal(before.stored(n), after.stored(n)) for n in names)
    assert all(after.stored(n).dtype == torch.float32 for n in names)


def test_a_packed_result_keeps_float32_tensors_too(tmp_path):
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(**ROUTED["Glm4MoeConfig"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = save(model, tmp_path / "model")
    biases = [n for n in load_file(folder / "model.safetensors") if n.endswith("correction_bias")]
    change(folder, lambda t: t.update({n: 34.5 + torch.randn(4) * 0.1 for n in biases}))

    def round_all(matrices, statistics, hand):
        return {n: sequential.Update(nearest(w, Grid(4, 16), torch.bfloat16))
                for n, w in matrices.items()}  # fmt: skip

    method = sequential.Method(
        "rtn",
        {},
        [sequential.per_stage(round_all)],
        (),
        layout="compressed-tensors",
        scheme=Scheme(Grid(4, 16)),
    )
    sequential.compress(Decoder(folder), method, tmp_path / "out", base="m")
    ids = families.windows(2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    ours = load.load_model(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = theirs(ids, use_cache=False).logits
        assert torch.equal(ours(ids, use_cache=False).logits, wanted)
    assert torch.equal(streamed(tmp_path / "out", ids, dtype=torch.bfloat16), wanted)


def biases(tensors):
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj"
        tensors[f"{name}.bias"] = torch.ones(len(tensors[f"{name}.weight"]))


def third_block(tensors):
    for name in [n for n in tensors if n.startswith("model.layers.1.")]:
        tensors[name.replace(".1.", ".2.", 1)] = tensors[name] + 1


@pytest.mark.parametrize(
    ("edit", "count", "pattern"),
    [
        (biases, 3, r"1 x model\.layers\.\*\.self_attn\.q_proj\.bias"),
        (third_block, 9, r"1 x model\.layers\.\*\.mlp\.up_proj\.weight"),
    ],
    ids=["biases", "a third block"],
)
def test_tensors_without_a_place_are_named_and_kept(tmp_path, capfd, edit, count, pattern):
    """Multi-token predictors are such blocks: they take no part, and must not vanish."""
    families.save("llama", tmp_path / "model", tokenizer=True, num_hidden_layers=2)
    change(tmp_path / "model", edit)
    before = load_file(tmp_path / "model" / "model.safetensors")
    for read in (load.load_model, info):
        distributed.say_once.cache_clear()
        read(tmp_path / "model")
        said = capfd.readouterr().err
        assert f"{count} tensors have no place" in said and re.search(pattern, said)
    sequential.compress(
        Decoder(tmp_path / "model"),
        sequential.Method("keep", {}, [sequential.per_stage(keep)], ()),
        tmp_path / "out",
        base="m",
    )
    after = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(path)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_a_model_makes_itself_is_not_worth_a_word(tmp_path, capfd):
    families.save("llama", tmp_path / "model", num_hidden_layers=2)
    change(tmp_path / "model", lambda t: t.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))  # fmt: skip
    Decoder(tmp_path / "model")
    assert "no place" not in capfd.readouterr().err


def test_a_head_that_differs_from_the_embedding_is_not_tied(tmp_path):
    """transformers unties the two whatever the config says; block by block they were one."""
    families.save("llama", tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=False)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    ids = families.windows(2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        wanted = theirs(ids, use_cache=False).logits
    assert torch.equal(streamed(tmp_path / "model", ids), wanted)
    sequential.compress(
        Decoder(tmp_path / "model"),
        sequential.Method("keep", {}, [sequential.per_stage(keep)], ()),
        tmp_path / "out",
        base="m",
    )
    assert torch.equal(streamed(tmp_path / "out", ids), wanted)
    change(tmp_path / "model", lambda t: t.pop("model.embed_tokens.weight"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():  # the one that is there stands for both
        assert torch.equal(streamed(tmp_path / "model", ids), theirs(ids, use_cache=False).logits)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    families.save("llama", tmp_path / "model", num_hidden_layers=2)
    change(tmp_path / "model", lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1}))
    for read in (Decoder, load.load_model):
        with pytest.raises(UserError, match=r"holds model\.norm\.weight twice"):
            read(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_quantized_without_a_word_are_refused(tmp_path, dtype):
    families.save("llama", tmp_path / "model", num_hidden_layers=2)
    name = "model.layers.0.mlp.down_proj.weight"
    change(tmp_path / "model", lambda t: t.update({name: t[name].to(dtype)}))
    for read in (Decoder, load.load_model, info):
        with pytest.raises(UserError, match=f"{name} .* holds no floating values"):
            read(tmp_path / "model")
