"""Of image-text models the language blocks are the subject, and the rest passes byte for byte."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import families
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.blocks.streams import stream_logits
from harness.checkpoint import load
from harness.commands.info import info
from harness.errors import UserError
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
TEXT = families.GQA | {"num_hidden_layers": 2}
IMAGE = {"image_token_id": 280, "image_token_index": 280}
# Vision towers with more blocks than the text part, of whose lists of blocks they come first.
FAMILIES = {
    "gemma3": ("Gemma3Config", {"text_config": TEXT | {"head_dim": 8}, "vision_config": VISION
               | {"vision_use_head": False}, "mm_tokens_per_image": 4} | IMAGE),
    "llava": ("LlavaConfig", {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION
              | {"model_type": "clip_vision_model", "projection_dim": 16}} | IMAGE),
    "mistral3": ("Mistral3Config", {"text_config": TEXT | {"model_type": "mistral"},
                 "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}} | IMAGE),
    "llama4": ("Llama4Config", {
        "text_config": TEXT | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "vision_config": VISION | {"vision_output_dim": 32, "projector_input_dim": 32,
                                   "projector_output_dim": 32}}),
    "qwen2-vl": ("Qwen2VLConfig", {
        "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                   "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 3, "embed_dim": 16, "num_heads": 2, "hidden_size": 32,
                          "mlp_ratio": 2}}),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    kind, arguments = FAMILIES[request.param]
    config = getattr(transformers, kind)(**arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    folder = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(folder)
    families.save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder, model


def tensors_of(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_the_language_part_is_walked_and_compressed(saved, tmp_path):
    folder, model = saved
    ids = families.windows(2)
    whole = load.load_model(folder)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(whole(ids, use_cache=False).logits, wanted)
    assert torch.equal(torch.cat([x for _, x in stream_logits(folder, ids)]), wanted)
    assert "2 blocks of width 32" in info(folder)

    def round_all(matrices, statistics, hand):
        assert statistics is not None and len(statistics.seen)
        return {n: sequential.Update(nearest(w, Grid(4, 16), torch.float32))
                for n, w in matrices.items()}  # fmt: skip

    decoder, out = Decoder(folder), tmp_path / "out"
    assert len(decoder) == 2 and "vision" not in decoder.prefix
    method = sequential.Method(
        "rtn",
        {},
        [sequential.per_stage(round_all, Seen)],
        layout="compressed-tensors",
        scheme=Scheme(Grid(4, 16)),
    )
    rows = sequential.compress(decoder, method, out, base="model", windows=ids)
    assert all(row["name"].startswith(f"{decoder.prefix}.") for row in rows) and len(rows) >= 8
    before, after = Decoder(folder), Decoder(out)
    outside = [n for n in before.names.plain if not n.startswith(f"{before.prefix}.")]
    assert any("vision" in n or "visual" in n for n in outside)
    assert all(torch.equal(before.stored(n), after.stored(n)) for n in outside)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    card = (out / "README.md").read_text()
    if "harness only" in card:  # transformers unpacks no experts of Llama 4
        assert "llama4" in config["model_type"]
        return
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(out).eval()
    assert type(theirs) is type(model)
    with torch.no_grad():
        packed = theirs(input_ids=ids, use_cache=False).logits
    streamed = torch.cat([x for _, x in stream_logits(out, ids)])
    assert (streamed - packed).abs().max() < 1e-4  # float32, another order of sums
    ours = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        if not name.startswith(f"{decoder.prefix}."):
            assert torch.equal(parameter, ours[name]), name


class Seen:
    """Statistics that count what they are given."""

    def __init__(self, columns, device):
        self.seen = []

    def add(self, inputs):
        self.seen.append(inputs.shape)

    def reduce(self):
        pass


def test_blocks_that_only_an_image_reaches_are_refused_before_the_work(tmp_path):
    text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = transformers.MllamaConfig(text_config=text, vision_config=VISION | {
        "num_global_layers": 1, "attention_heads": 2, "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0], "vision_output_dim": 32})  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not call its blocks one after another"):
        Decoder(tmp_path).embed(families.windows(1))
