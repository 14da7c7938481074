"""Acts over a block in hand: several in a row, on either stream, folded norms, replayed calls."""

import pytest
import torch

import families
from harness.blocks import decoder as decoder_module
from harness.blocks.block import BlockInHand, Update, per_stage
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, compress
from harness.blocks.streams import Streams
from harness.checkpoint.load import load_model
from harness.quant.grid import Grid, nearest
from harness.quant.hessian import Hessian
from harness.quant.scheme import Scheme

GRID = Grid(4, 16)
WINDOWS = families.windows(5)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(decoder_module, "TOKENS_PER_BATCH", 48)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    families.save("llama", folder)
    return folder


@pytest.fixture
def hand(source):
    decoder = Decoder(source)
    return BlockInHand(decoder, 0, Streams(decoder, WINDOWS, ("quantized", "dense")))


def rounded(matrices, statistics, hand):
    return {name: Update(nearest(m, GRID, m.dtype)) for name, m in matrices.items()}


def folded(hand):
    """The norm before the MLP doubled, its readers halved: the same function, exactly."""
    gain = hand.block.post_attention_layernorm.weight.data
    hand.put({"post_attention_layernorm.weight": 2 * gain})
    names = ["mlp.gate_proj", "mlp.up_proj"]
    hand.put({name: Update(matrix / 2) for name, matrix in hand.matrices(names).items()})


def test_later_acts_see_what_earlier_ones_put(source, tmp_path):
    """Fold, then round in one pass: the bytes of folding in one pass and rounding in another."""
    calls = []

    def watch(hand):
        calls.append(hand.matrices(["mlp.up_proj"])["mlp.up_proj"].clone())

    def run(model, out, acts, **more):
        method = Method("m", {}, acts, **more)
        return compress(Decoder(model), method, out, base="b", windows=WINDOWS)

    packed = {"layout": "compressed-tensors", "scheme": Scheme(GRID)}
    act = per_stage(rounded, Hessian)
    run(source, tmp_path / "both", [watch, folded, watch, act], **packed)
    assert torch.equal(calls[0] / 2, calls[1])
    run(source, tmp_path / "folded", [folded])
    run(tmp_path / "folded", tmp_path / "then", [act], **packed)
    with torch.no_grad():
        logits = [load_model(tmp_path / name)(WINDOWS).logits for name in ("both", "then")]
        dense, same = (load_model(m)(WINDOWS).logits for m in (source, tmp_path / "folded"))
    assert torch.equal(*logits)
    torch.testing.assert_close(same, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_is_found_once_and_looking_changes_nothing(dtype, source, monkeypatch):
    decoder = Decoder(source, dtype=dtype)
    streams = Streams(decoder, WINDOWS)
    hands = [BlockInHand(decoder, index, streams) for index in range(2)]
    before = hands[0].forward(0)
    graph = hands[0].graph()
    assert [p.name.rpartition(".")[2] for p in graph] == [
        "input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"
    ]  # fmt: skip
    assert torch.equal(hands[0].forward(0), before)
    monkeypatch.setattr("harness.blocks.streams.find", None)
    assert hands[1].graph() is graph


def test_the_dense_stream_goes_on_through_the_dense_blocks(source, tmp_path):
    """Inputs of every block are the dense model's, whatever was put before; targets are its
    outputs; and with both streams the quantized one has the changes."""
    seen = {}

    def act(hand):
        seen.setdefault(hand.index, []).append(
            (torch.cat(hand.streams.inputs), torch.cat(hand.streams.targets))
        )
        hand.put(rounded(hand.matrices(["mlp.up_proj"]), None, hand))

    for number, streams in enumerate([("dense",), ("quantized", "dense")]):
        method = Method("m", {}, [act], streams)
        compress(Decoder(source), method, tmp_path / f"{number}", base="b", windows=WINDOWS)
    decoder = Decoder(source)
    hidden = decoder.embed(WINDOWS)
    for index in range(len(decoder)):
        (alone, targets), (quantized, same) = seen[index]
        torch.testing.assert_close(alone, hidden, rtol=1e-5, atol=1e-6)
        assert (index == 0) == torch.equal(alone, quantized)
        decoder.load(index)
        hidden = decoder.forward(index, hidden)
        torch.testing.assert_close(targets, hidden, rtol=1e-5, atol=1e-6)
        assert torch.equal(targets, same)


@torch.no_grad()
def test_calls_of_a_submodule_can_be_repeated(hand):
    outputs = []
    hook = hand.block.self_attn.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    calls = hand.calls("self_attn")
    hook.remove()
    assert len(calls) == len(hand.streams.inputs) > 1
    for (args, kwargs), output in zip(calls, outputs, strict=True):
        assert torch.equal(hand.block.self_attn(*args, **kwargs)[0], output)


@torch.no_grad()
@pytest.mark.parametrize("true_sequential", [True, False])
def test_a_put_after_the_statistics_counts(hand, true_sequential):
    """Forwards paused behind the last stage are dropped where a later act changes the block."""
    for names, _ in hand.statistics(Hessian, true_sequential):
        hand.put(rounded(hand.matrices(names), None, hand))
    hand.put({"input_layernorm.weight": torch.zeros(hand.block.input_layernorm.weight.shape)})
    expected = [hand.forward(batch) for batch in range(len(hand.streams.inputs))]
    hand.advance()
    assert all(map(torch.equal, hand.streams.inputs, expected))


def test_an_act_that_stops_leaves_no_hook(hand):
    with pytest.raises(ZeroDivisionError):
        for _ in hand.statistics(Hessian):
            raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in hand.block.modules())


def test_notes_and_resume(source, tmp_path):
    """A pass with both streams that is interrupted ends as the undisturbed one."""

    def act(hand, stop=None):
        if hand.index == stop:
            raise KeyboardInterrupt
        error = (hand.forward(0) - hand.target(0)).square().mean().item()
        hand.put(rounded(hand.matrices(["mlp.up_proj"]), None, hand))
        hand.note("before", error)

    def run(out, act):
        method = Method("m", {}, [act], ("quantized", "dense"))
        return compress(Decoder(source), method, tmp_path / out, base="b", windows=WINDOWS)

    rows = run("straight", act)
    assert rows[0]["before"] == 0 < rows[1]["before"]
    with pytest.raises(KeyboardInterrupt):
        run("out", lambda hand: act(hand, stop=2))
    assert run("out", act) == rows
