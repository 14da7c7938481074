"""The `harness` command end to end on a tiny model, offline; exit codes; bad input."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from harness import settings
from harness.cli import main, run
from harness.errors import UserError

TEXT = "the quick brown fox jumps over the lazy dog and naps. " * 60


SHARED = Path(__file__).resolve().parents[3] / "shared"


def make_model(folder, seed=0):
    torch.manual_seed(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<s>", *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    question = {"question": "the quick", "choices": ["brown", "red", "x", "y"], "answer": 0}
    (tmp_path / "quiz.jsonl").write_text((json.dumps(question) + "\n") * 6)
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        (tmp_path / "mmlu" / split / f"anatomy_{split}.csv").write_text("q,None,b,c,d,A\n" * 5)
    return tmp_path


def evaluate(*words):
    return main(["eval", *map(str, words)])


def test_outcomes_become_exit_codes(capsys):
    def fails(error):
        def body():
            raise error

        return body

    assert run(lambda: None) == 0
    assert run(lambda: 7) == 7
    assert run(fails(UserError("found, expected, mend"))) == 2
    assert capsys.readouterr().err == "error: found, expected, mend\n"
    assert run(fails(KeyboardInterrupt())) == 130
    assert run(fails(OSError(errno.ENOSPC, "No space left", "out/x"))) == 2
    assert "disk is full at out/x" in capsys.readouterr().err
    assert run(fails(OSError(errno.EROFS, "Read-only file system", "out/x"))) == 2
    assert "out/x: Read-only file system; choose" in capsys.readouterr().err
    assert run(fails(OSError(errno.EIO, "broken"))) == 1
    assert run(fails(ZeroDivisionError())) == 1
    assert "Traceback" in capsys.readouterr().err


def test_shared_flags():
    import argparse

    parser = argparse.ArgumentParser()
    settings.add_flags(parser, settings.Shared)
    args = parser.parse_args([])
    assert (args.out, args.device, args.dtype, args.seed) == (None, "auto", "auto", 0)
    assert (args.resume, args.overwrite, args.dry_run) == (True, False, False)
    assert parser.parse_args(["--no-resume"]).resume is False


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom harness.cli import main\n"
        "try: main(['eval', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--ppl" in done.stdout and "examples:" in done.stdout


def test_everything_at_once_and_compare(here, dense, capsys):
    words = [dense, "--ppl", "text.txt", "--choice", "quiz.jsonl", "--mmlu", "mmlu", "--speed"]
    words += ["--divergence-from", dense, "--limit", 4, "--seqlen", 64]
    assert evaluate(*words) == 0
    output = capsys.readouterr().out
    assert "results: results/dense.json" in output
    assert "seqlen 64, non-overlapping" in output
    results = json.loads((here / "results/dense.json").read_text())
    metrics = results["metrics"]
    assert metrics["ppl:text.txt"]["details"]["windows"] == 4
    assert metrics["choice:quiz.jsonl"]["details"]["n"] == 4
    assert metrics["mmlu"]["details"]["n"] == 4
    assert metrics["divergence"]["details"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["speed"]["details"]["decode_tokens_s"] > 0
    assert metrics["footprint"]["details"]["bits_per_parameter"] == 32
    for metric in metrics.values():
        assert {"torch", "transformers", "harness"} <= metric["versions"].keys()
        assert metric["command"] and metric["date"]
    assert results["recipe"] == []

    other = make_model(here / "other", seed=1)
    assert evaluate(other, "--ppl", "text.txt", "--limit", 4, "--seqlen", 64) == 0
    capsys.readouterr()
    pair = ["compare", "results/dense.json", "results/other.json", "--plot", "plot.png"]
    assert main(pair) == 0
    output = capsys.readouterr().out
    assert "PPL text.txt ↓" in output and "plot: plot.png" in output
    assert (here / "plot.png").stat().st_size > 5000


def test_results_accumulate_and_are_not_measured_twice(here, dense, monkeypatch, capsys):
    from harness.losses import nll

    words = [dense, "--ppl", "text.txt", "--seqlen", 32, "--limit", 2]
    assert evaluate(*words) == 0
    first = json.loads((here / "results/dense.json").read_text())["metrics"]
    # An interruption during the next metric keeps what was finished.
    monkeypatch.setattr(
        "harness.metrics.multiple_choice.score", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert evaluate(*words, "--choice", "quiz.jsonl") == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(nll, "perplexity_of_logits", never)
    assert evaluate(*words, "--choice", "quiz.jsonl") == 0
    then = json.loads((here / "results/dense.json").read_text())["metrics"]
    assert then["ppl:text.txt"] == first["ppl:text.txt"] and "choice:quiz.jsonl" in then
    assert "measured before" in capsys.readouterr().err
    # Other settings, and --overwrite, measure anew.
    for change in (["--limit", 3], ["--overwrite"]):
        assert evaluate(*words, *change) == 1
        assert "measured again" in capsys.readouterr().err


def test_results_of_another_model_are_not_mixed_in(here, dense, capsys):
    assert evaluate(dense, "--ppl", "text.txt", "--limit", 1, "--out", "r.json") == 0
    other = make_model(here / "other", seed=1)
    assert evaluate(other, "--ppl", "text.txt", "--limit", 1, "--out", "r.json") == 2
    assert "results of another model (dense)" in capsys.readouterr().err


def test_results_follow_the_data_and_the_model(here, dense, capsys):
    """Another text of the same length, more subjects, one zeroed matrix: measured anew or refused,
    and what is kept says when and how it was measured."""
    words = [dense, "--seqlen", 32, "--limit", 8, "--ppl", "text.txt", "--choice", "quiz.jsonl"]
    words += ["--mmlu", "mmlu"]

    def metrics():
        assert evaluate(*words) == 0
        said = capsys.readouterr().err
        found = json.loads((here / "results/dense.json").read_text())["metrics"]
        kept = [key for key in found if f"{key}: measured before" in said]
        return {key: (m["details"], m["date"], m["command"]) for key, m in found.items()}, kept

    first, kept = metrics()
    assert kept == []
    (here / "text.txt").write_text(TEXT.replace("quick", "swift"))
    second, kept = metrics()
    assert kept == ["footprint", "choice:quiz.jsonl", "mmlu"]
    assert second["ppl:text.txt"][0]["value"] != first["ppl:text.txt"][0]["value"]
    assert second["mmlu"] == first["mmlu"]
    question = {"question": "the lazy", "choices": ["brown", "red", "x", "y"], "answer": 1}
    (here / "quiz.jsonl").write_text((json.dumps(question) + "\n") * 6)
    for split in ("dev", "test"):
        (here / "mmlu" / split / f"virology_{split}.csv").write_text("p,None,b,c,d,B\n" * 5)
    _, kept = metrics()
    assert kept == ["footprint", "ppl:text.txt"]
    other = here / "other"
    shutil.copytree(dense, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    words[0] = other
    assert evaluate(*words, "--out", "results/dense.json") == 2
    assert "results of another model (dense)" in capsys.readouterr().err


def test_results_of_an_older_harness_are_measured_anew(here, dense, capsys):
    words = [dense, "--ppl", "text.txt", "--limit", 1, "--out", "r.json"]
    assert evaluate(*words) == 0
    old = json.loads((here / "r.json").read_text()) | {"schema": 1, "command": "x", "versions": {}}
    (here / "r.json").write_text(json.dumps(old))
    capsys.readouterr()
    assert evaluate(*words) == 0
    said = capsys.readouterr().err
    assert "measuring anew" in said and "measured before" not in said
    assert json.loads((here / "r.json").read_text())["schema"] == 2


def test_block_by_block_gives_the_same(here, dense):
    words = ["--ppl", "text.txt", "--seqlen", 64, "--divergence-from", dense, "--limit", 3]
    assert evaluate(dense, *words, "--out", "whole.json") == 0
    assert evaluate(dense, *words, "--out", "blocks.json", "--block-by-block") == 0
    values = []
    for name in ("whole.json", "blocks.json"):
        metrics = json.loads((here / name).read_text())["metrics"]
        values.append(metrics["ppl:text.txt"]["details"]["nll_sum"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_card_of_our_own_checkpoint_is_filled(here):
    ours = make_model(here / "ours")
    (ours / "recipe.yaml").write_text("steps:\n- {method: gptq, command: python -m gptq x}\n")
    (ours / "README.md").write_text("# ours\n")
    assert evaluate(ours, "--ppl", "text.txt", "--limit", 1) == 0
    results = json.loads((ours / "results.json").read_text())
    assert results["recipe"][0]["method"] == "gptq"
    assert "PPL text.txt" in (ours / "README.md").read_text()


def test_dry_run_writes_nothing(here, dense, capsys):
    assert evaluate(dense, "--ppl", "text.txt", "--speed", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "windows of 128 tokens" in output and "TMAC" in output
    assert not (here / "results").exists()


def test_info(here, dense, capsys):
    assert main(["info", str(dense)]) == 0
    output = capsys.readouterr().out
    assert "llama, 2 blocks of width 32" in output and "read by" in output


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere/x/y"], "nowhere/x/y"),
        (["MODEL", "--ppl", "wikitex2"], "Did you mean 'wikitext2'?"),
        (["MODEL", "--ppl", "text.txt", "--seqlen", "129"], "context of 128"),
        (["MODEL", "--ppl", "text.txt", "--limit", "0"], "--limit 0"),
        (["MODEL", "--mmlu", "text.txt"], "not an MMLU folder"),
        (["MODEL", "--mmlu", "mmlu", "--block-by-block"], "leave out --mmlu"),
        (["MODEL", "--mmlu", "mmlu", "--shots", "9"], "anatomy has 5 development questions"),
        (["MODEL", "--ppl", "text.txt", "--device", "gpu"], "device gpu"),
        (["TRUNCATED", "--ppl", "text.txt"], "truncated"),
        (["NAN", "--ppl", "text.txt"], "NaN"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(here, dense, capsys, words, line):
    if words[0] in ("TRUNCATED", "NAN"):
        broken = make_model(here / "broken")
        weights = broken / "model.safetensors"
        if words[0] == "NAN":
            tensors = load_file(weights)
            tensors["model.norm.weight"][3] = float("nan")
            save_file(tensors, weights, metadata={"format": "pt"})
        else:
            weights.write_bytes(weights.read_bytes()[:-100])
        words = [broken, *words[1:]]
    words = [dense if word == "MODEL" else word for word in words]
    assert evaluate(*words) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and line in errors[0]


@pytest.mark.slow
@pytest.mark.realdata
def test_real_model_and_data(here, capsys):
    """The README's example on real files; perplexity against a loop over the same windows."""
    model, text = SHARED / "models/stories260K", SHARED / "data/wikitext-2/test.txt"
    mmlu = SHARED / "data/mmlu"
    if not all(path.exists() for path in (model, text, mmlu)):
        pytest.skip("needs ../shared with stories260K, wikitext-2 and mmlu")
    # As in the acceptance line but fewer windows.
    assert evaluate(model, "--ppl", text, "--mmlu", mmlu, "--limit", 20) == 0
    metrics = json.loads((here / "results/stories260K.json").read_text())["metrics"]
    assert metrics["mmlu"]["details"]["n"] == 20

    loaded = AutoModelForCausalLM.from_pretrained(model)
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"))["input_ids"]
    losses = []
    for start in range(0, 20 * 512, 512):
        window = torch.tensor([ids[start : start + 512]])
        with torch.no_grad():
            losses.append(loaded(window, labels=window).loss)
    expected = torch.stack(losses).mean().exp().item()
    assert metrics[f"ppl:{text}"]["details"]["value"] == pytest.approx(expected, rel=1e-4)
