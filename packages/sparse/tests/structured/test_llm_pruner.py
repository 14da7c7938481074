"""The command: what it makes loads where it says, and is smaller, faster and better than chance."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

import families
from harness import paths
from harness.blocks.streams import stream_logits
from harness.checkpoint import load, nonuniform
from harness.checkpoint.nonuniform import skeleton
from harness.checkpoint.weights import Weights
from harness.data import corpora
from harness.metrics import speed
from harness.metrics.footprint import stored_size
from harness.metrics.macs import macs_per_token
from harness.metrics.perplexity import perplexity
from sparse.llm_pruner import main, prune

EVERYWHERE = [
    "--block_attention_layer_start", "0", "--block_attention_layer_end", "5",
    "--block_mlp_layer_start", "0", "--block_mlp_layer_end", "5",
]  # fmt: skip
QUICK = ["--num_examples", "4", "--max_seq_len", "32"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    families.save("llama", tmp_path / "model", tokenizer=True)
    (tmp_path / "text.txt").write_text(families.TEXT * 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def same_in_plain_transformers(folder) -> str:
    """Model type of ``folder``, of which transformers gives the harness's logits."""
    ids = families.windows(2)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(plain, ids), logits(load.load_model(folder), ids))
    return plain.config.model_type


def test_uniform_results_are_ordinary(place, capsys):
    words = ["model", "text.txt", *QUICK, "--pruning_ratio", ".5", *EVERYWHERE]
    assert main([*words, "--multiple", "4", "--out", "half"]) == 0
    assert same_in_plain_transformers("half") == "llama"
    assert "an ordinary llama checkpoint" in capsys.readouterr().out
    config = load.load_config(place / "half")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.intermediate_size == 24


def test_heads_that_do_not_divide_become_mistral(tmp_path, capsys):
    families.save("llama", tmp_path / "model", num_key_value_heads=4)
    words = [str(tmp_path / "model"), "--pruner_type", "l1", "--pruning_ratio", ".25", *EVERYWHERE]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert same_in_plain_transformers(tmp_path / "out") == "mistral"
    assert "as an ordinary mistral checkpoint: the same computation as llama" in (
        capsys.readouterr().out
    )


def test_layers_and_hidden_channels_are_ordinary(place):
    assert main(["model", "--layer_wise", "--layer", "2", "--out", "short"]) == 0
    same_in_plain_transformers("short")
    dense = AutoModelForCausalLM.from_pretrained("model").eval()
    dense.model.layers = dense.model.layers[:2]
    ids = families.windows(2)
    assert torch.equal(logits(load.load_model("short"), ids), logits(dense, ids))
    words = ["--channel_wise", "--pruning_ratio", ".25", "--out", "narrow"]
    assert main(["model", "text.txt", *QUICK, *words]) == 0
    same_in_plain_transformers("narrow")
    config = load.load_config(place / "narrow")
    assert (config.hidden_size, config.intermediate_size) == (24, 48)
    assert config.rms_norm_eps == pytest.approx(1e-6 * 32 / 24)


def test_qwens_layer_types_are_cut_with_its_layers(tmp_path):
    families.save("qwen2", tmp_path / "model")
    words = [str(tmp_path / "model"), "--layer_wise", "--layer", "3"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert same_in_plain_transformers(tmp_path / "out") == "qwen2"


def test_sizes_per_block_are_recorded_and_told(place, capsys):
    words = ["model", "text.txt", *QUICK, "--pruning_ratio", ".5", "--out", "out"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "--block_mlp_layer_start 1 --block_mlp_layer_end 4" in captured.err
    assert "| 0 | 4 | 2 | 48 |\n| 1 | 4 -> 2 | 2 -> 1 | 48 -> 24 |" in captured.out
    assert "loads in the harness" in captured.out
    config = load.load_config(place / "out")
    assert getattr(config, nonuniform.KEY)[1]["heads"] == 2
    log = json.loads((place / "out" / "compression_log.json").read_text())
    size = stored_size(place / "out", config)
    assert log["parameters"][1] == size.parameters < log["parameters"][0]
    assert log["macs"][1] == macs_per_token(skeleton(config), 32)["total"] < log["macs"][0]
    (step,) = yaml.safe_load((place / "out" / "recipe.yaml").read_text())["steps"]
    assert step["method"] == "llm_pruner"
    assert (
        step["settings"] | {"pruning_ratio": 0.5, "level": "block", "taylor": "param_first"}
        == (step["settings"])
    )
    assert "the harness only" in (place / "out" / "README.md").read_text()


def test_for_32_blocks_the_ranges_are_the_originals(tmp_path, capsys):
    sized = {"num_hidden_layers": 32, "hidden_size": 16, "intermediate_size": 16}
    families.save("llama", tmp_path / "model", **sized)
    words = [str(tmp_path / "model"), "--pruner_type", "l2", "--dry-run"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "--block_attention_layer_start 3 --block_attention_layer_end 31" in captured.err
    assert "in all: at most about" in captured.out
    changed = [i for i in range(32) if f"| {i} | 4 -> 2" in captured.out]
    assert changed == list(range(3, 31))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_was_pruned_can_be_pruned_again(tmp_path):
    families.save("bloom", tmp_path / "a", num_attention_heads=8, n_head=8)
    common = {
        "pruner_type": "random",
        "block_mlp_layer_start": 1,
        "block_mlp_layer_end": 4,
        "multiple": 1,
    }
    prune(tmp_path / "a", out=tmp_path / "b", pruning_ratio=0.5, **common)
    again = prune(tmp_path / "b", out=tmp_path / "c", pruning_ratio=0.5, seed=1, **common)
    assert again["rows"][2]["heads"] == [4, 2] and again["rows"][0]["heads"] == [8, 8]
    first, second = (
        paths.read_json(tmp_path / name / "config.json")[nonuniform.KEY][2]["kept_heads"]
        for name in "bc"
    )
    assert len(second) == 2 and set(second) < set(first)
    steps = yaml.safe_load((tmp_path / "c" / "recipe.yaml").read_text())["steps"]
    assert [step["base"] for step in steps] == [str(tmp_path / "a"), str(tmp_path / "b")]
    # Only heads of the dense model's that stayed: the rest at zero gives the same.
    dense = load.load_model(tmp_path / "b")
    ids = families.windows(2)
    small = logits(load.load_model(tmp_path / "c"), ids)
    assert not torch.allclose(small, logits(dense, ids))


def test_steps_and_one_threshold(place):
    options = {
        "num_examples": 4,
        "max_seq_len": 32,
        "block_mlp_layer_start": 0,
        "block_mlp_layer_end": 5,
        "multiple": 4,
    }
    rows = prune(
        "model", "text.txt", out="a", pruning_ratio=0.5, global_pruning=True, iterative_steps=2,
        **options,
    )["rows"]  # fmt: skip
    assert all(row["heads"][1] in (2, 4) and row["channels"][1] % 4 == 0 for row in rows)
    assert len({row["channels"][1] for row in rows}) > 1
    assert all(row["channels"][1] >= 4 for row in rows)
    kept = sum(row["channels"][1] for row in rows)
    assert 100 <= kept <= 140


def test_float16_gives_finite_scores(place):
    families.build("llama", dtype=torch.float16).save_pretrained("half")
    (place / "half" / "tokenizer.json").write_bytes((place / "model/tokenizer.json").read_bytes())
    result = prune("half", "text.txt", out="out", num_examples=2, max_seq_len=16)
    assert result["rows"][2]["channels"] == [48, 24]
    assert Weights(Path("out")).dtype == torch.float16


def test_perplexity_before_and_after(place, capsys):
    words = ["model", "text.txt", *QUICK, "--test_before_train", "--test_after_train"]
    assert main([*words, "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "perplexity before pruning" in out and "perplexity after pruning" in out


@pytest.mark.slow
@pytest.mark.parametrize("level", ["block", "channel"])
def test_taylor_beats_random_and_l2_on_tiny_llama(level, tmp_path):
    tokenizer = load.load_tokenizer("tiny-llama")
    windows = corpora.evaluation(tokenizer, "stdlib", seqlen=512, limit=30)
    options = {"pruning_ratio": 0.2, f"{level}_wise": True}
    options |= {
        "block_attention_layer_start": 0,
        "block_attention_layer_end": 6,
        "block_mlp_layer_start": 0,
        "block_mlp_layer_end": 6,
    }
    found = {}
    for kind in ("taylor", "random", "l2"):
        prune("tiny-llama", "stdlib", out=tmp_path / kind, pruner_type=kind, **options)
        found[kind] = perplexity(load.load_model(tmp_path / kind), windows, 8).value
    # A fifth of its MLP channels do next to nothing, which weights alone show too.
    assert found["taylor"] < (0.999 if level == "block" else 0.95) * found["l2"]
    assert found["taylor"] < 0.95 * found["random"]


@pytest.mark.slow
def test_a_smaller_model_decodes_faster(tmp_path):
    # Wide enough that a step is bound by reading weights.
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    families.save("llama", tmp_path / "model", num_key_value_heads=8, **wide)
    dense = load.load_model(tmp_path / "model")
    words = [str(tmp_path / "model"), "--pruner_type", "l2", "--pruning_ratio", ".75"]
    assert main([*words, *EVERYWHERE, "--out", str(tmp_path / "small")]) == 0
    small = load.load_model(tmp_path / "small")
    lengths = {"prompt": 16, "new": 12, "repeats": 3}
    before, after = (speed.measure(model, **lengths) for model in (dense, small))
    assert after.decode_tokens_s > 1.5 * before.decode_tokens_s


ODD = {
    "hybrid": ("NemotronHConfig", {
        "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
        "n_groups": 1, "chunk_size": 8,
        "layers_block_type": ["mamba", "attention", "mamba", "attention"]}),
    "image-text": ("Gemma3Config", {
        "text_config": families.GQA | {"num_hidden_layers": 4, "head_dim": 8},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5,
                          "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
                          "vision_use_head": False},
        "mm_tokens_per_image": 4, "image_token_index": 280}),
}  # fmt: skip


@pytest.mark.parametrize("words", [["--block_wise"], ["--layer_wise", "--layer", "2"]])
@pytest.mark.parametrize("kind", ODD)
def test_hybrids_and_image_text_models_get_smaller(tmp_path, kind, words):
    """Nemotron-H's config holds Infinity and no number of blocks; of Gemma 3 only the text part
    loses anything."""
    config, arguments = ODD[kind]
    arguments = arguments if kind == "image-text" else families.GQA | arguments
    config = getattr(transformers, config)(**arguments)
    model = nonuniform.model_class(config)._from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    families.save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(families.TEXT * 60)
    out = tmp_path / "out"
    words = [*words, "--pruning_ratio", "0.25", "--num_examples", "2", "--max_seq_len", "32"]
    words += ["--dtype", "float32", "--out", str(out)]
    assert main([str(tmp_path / "model"), str(tmp_path / "text.txt"), *words]) == 0
    ids = families.windows(2)
    with torch.no_grad():
        whole = load.load_model(out, dtype="float32")(ids, use_cache=False).logits
    assert torch.equal(torch.cat([x for _, x in stream_logits(out, ids)]), whole)
    before, after = (sum(p.numel() for p in m.parameters())
                     for m in (model, load.load_model(out)))  # fmt: skip
    # By default the first blocks are left alone, which is all that this hybrid has.
    assert after < before or (kind, words[0]) == ("hybrid", "--block_wise")
