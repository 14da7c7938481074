"""Cards promise what was tried; what is left dense is listed; odd families are equal or refused."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import families
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.blocks.streams import stream_logits
from harness.checkpoint import load, readers
from harness.commands.info import info
from harness.errors import UserError
from harness.modules import linears
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

TEXT = families.GQA | {"num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
       "mamba_chunk_size": 8}  # fmt: skip
# family -> (config class, its arguments, what stays dense in a block)
ODD = {
    "phimoe": ("PhimoeConfig", TEXT | EXPERTS, {"mlp.router", "mlp.experts"}),
    "llama4": ("Llama4TextConfig", TEXT | EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48},
               {"feed_forward.router", "feed_forward.experts"}),
    "bamba": ("BambaConfig", TEXT | SSM | {"attn_layer_indices": [1]}, set()),
    "falcon-h1": ("FalconH1Config", TEXT | SSM | {"mamba_d_ssm": 64, "head_dim": 8}, set()),
    "granite-4-h": ("GraniteMoeHybridConfig", TEXT | SSM | EXPERTS | {
        "shared_intermediate_size": 32, "layers_block_type": ["mamba", "attention"],
        "mamba_expand": 2}, set()),
    "mamba2": ("Mamba2Config", families.ANY | {
        "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "expand": 2,
        "state_size": 8, "n_groups": 1, "chunk_size": 8}, set()),
    "falcon": ("FalconConfig", families.SHARED | {"num_hidden_layers": 2}, set()),
}  # fmt: skip


@pytest.fixture(scope="module", params=ODD)
def saved(request, tmp_path_factory):
    kind, arguments, dense = ODD[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    families.save_tokenizer(folder)
    return folder, model, dense


def test_odd_families_are_equal_and_their_cards_true(saved, tmp_path):
    folder, model, dense = saved
    ids = families.windows(2)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    assert torch.equal(torch.cat([x for _, x in stream_logits(folder, ids)]), wanted)

    def round_all(matrices, statistics, hand):
        return {n: sequential.Update(nearest(w, Grid(4, 16), torch.float32))
                for n, w in matrices.items()}  # fmt: skip

    decoder, out = Decoder(folder), tmp_path / "out"
    names = {n for block in decoder.blocks for n in linears(block)}
    assert not names & dense
    method = sequential.Method(
        "rtn",
        {},
        [sequential.per_stage(round_all)],
        (),
        layout="compressed-tensors",
        scheme=Scheme(Grid(4, 16)),
    )
    sequential.compress(decoder, method, out, base="model")
    ignored = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    for name in dense:
        assert any(
            entry.endswith(f".1.{name}") or entry.endswith(f".0.{name}") for entry in ignored
        )
    card, ours = (out / "README.md").read_text(), load.load_model(out)
    with torch.no_grad():
        found = ours(ids, use_cache=False).logits
    streamed = torch.cat([x for _, x in stream_logits(out, ids)])
    assert (streamed - found).abs().max() < 1e-4
    assert "vLLM" not in card.split("read by")[1].splitlines()[0]
    assert f"read by       {readers.of_folder(out, decoder.config)}" in info(out)
    if "harness only" in card:
        with pytest.raises(AssertionError):
            check_transformers(out, ids, found)
    else:
        check_transformers(out, ids, found)


def check_transformers(out, ids, wanted):
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        assert (model.eval()(ids, use_cache=False).logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["RwkvConfig", "XLMConfig"])
def test_models_that_do_more_between_their_blocks_are_refused(tmp_path, kind):
    """XLM's feed-forward networks are in another list, RWKV's blocks hand on a state: block by
    block both were other models, without a word."""
    sizes = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 32,
             "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"between its blocks|hands on more"):
        Decoder(tmp_path).embed(families.windows(1))


def test_code_in_the_folder_is_never_run(tmp_path):
    """transformers asks on stdin whether it may; `yes | harness info` said so."""
    families.save("llama", tmp_path / "model", tokenizer=True, num_hidden_layers=1)
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    (tmp_path / "model" / "code.py").write_text(code)
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        path = tmp_path / "model" / name
        config = json.loads(path.read_text())
        target = ["code.X", None] if key == "AutoTokenizer" else "code.X"
        config["auto_map"] = {key: target, "AutoModelForCausalLM": "code.X"}
        config["model_type"] = "unheard-of"
        path.write_text(json.dumps(config))
    for words in (["info"], ["eval", "--ppl", "stdlib"]):
        command = [sys.executable, "-m", "harness", words[0], "model", *words[1:]]
        done = subprocess.run(
            command, cwd=tmp_path, input="y\n" * 99, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and done.stderr.count("\n") <= 2, done.stderr
    assert not marker.exists()
