"""Pruned matrices without their zeros: bit-exact both ways, resumable, refused by everybody else,
and as small as the reports say."""

import hashlib
import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import families
from harness import paths
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, Update, compress, per_stage
from harness.checkpoint import load, recipe, shards
from harness.checkpoint.layouts import bitmask
from harness.checkpoint.weights import Weights
from harness.cli import main
from harness.commands import info
from harness.errors import UserError
from harness.metrics import sparsity
from harness.modules import get_matrix, linears, set_matrix
from harness.quant.grid import Grid, nearest

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(list(INTEGERS)),
    share=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_matrix_comes_back(rows, columns, dtype, share, transposed, seed):
    draw = torch.Generator().manual_seed(seed)
    # Random bits: every number there is, NaNs with payloads, subnormals and infinities among them.
    bits = torch.randint(-(2**31), 2**31, (rows, columns), generator=draw)
    weight = bits.to(INTEGERS[dtype]).view(dtype)
    weight[torch.rand(rows, columns, generator=draw) < share] = 0
    weight[torch.rand(rows, columns, generator=draw) < share / 4] = -0.0
    weight = weight.T if transposed else weight
    tensors = bitmask.encode("x", weight)
    assert all(t.is_contiguous() for t in tensors.values())
    nonzeros = int((weight != 0).sum())
    small = bitmask.nbytes(*weight.shape, nonzeros, dtype.itemsize)
    dense_bytes = weight.numel() * dtype.itemsize
    assert sum(t.nbytes for t in tensors.values()) == min(small, dense_bytes)
    if small >= dense_bytes:
        assert list(tensors) == ["x.weight"]
        back = tensors["x.weight"]
    else:
        assert tensors["x.weight"].shape == (nonzeros,)
        back = bitmask.decode(tensors.__getitem__, "x")
        # A byte of the mask, by its definition.
        bit = tensors["x.weight_bitmask"][-1, (weight.shape[1] - 1) // 8]
        assert bool(bit >> ((weight.shape[1] - 1) % 8) & 1) == bool(weight[-1, -1] != 0)
        weight = torch.where(weight == 0, torch.zeros((), dtype=dtype), weight)
    assert back.dtype == dtype and back.shape == weight.shape
    as_bits = [t.contiguous().view(INTEGERS[dtype]) for t in (back, weight)]
    assert torch.equal(*as_bits)


def half(matrix):
    return torch.where(matrix.abs() < matrix.abs().median(), 0, matrix)


def prune(source, out, layout, change=half, **options):
    """The pass with the simplest pruning method there is."""

    def update(matrices, statistics, hand):
        return {name: Update(change(matrix)) for name, matrix in matrices.items()}

    method = Method("halves", {"sparsity": 0.5}, [per_stage(update)], (), layout=layout)
    return compress(Decoder(source), method, out, base=str(source), **options)


@torch.no_grad()
def logits(model):
    return model(families.windows(2), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon"])
def test_every_reader_of_ours_sees_the_dense_model(family, tmp_path):
    source, dense, small = (tmp_path / name for name in ("source", "dense", "small"))
    families.save(family, source, dtype=torch.bfloat16)
    prune(source, dense, "dense")
    prune(source, small, "bitmask")
    want = AutoModelForCausalLM.from_pretrained(dense).eval()
    model = load.load_model(small, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(want))
    state = want.state_dict()
    weights = Weights(small)
    for name in weights.names & set(state):
        assert torch.equal(weights.read(name), state[name]), name
    # Pruned or quantized again, it is the dense model that is.
    again = [tmp_path / "again-dense", tmp_path / "again-small"]
    for folder, out in zip((dense, small), again, strict=True):
        prune(folder, out, "dense", change=lambda m: m.clamp(min=0))
    assert same_files(*again)


def same_files(*folders):
    found = [
        {p.name: hashlib.sha256(p.read_bytes()).digest() for p in folder.glob("*.safetensors")}
        for folder in folders
    ]
    return found[0] == found[1] and len(found[0]) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_transformers_refuses_rather_than_inventing_weights(family, tmp_path):
    families.save(family, tmp_path / "source")
    prune(tmp_path / "source", tmp_path / "out", "bitmask")
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == family
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"harness convert .* --format dense"):
        load.load_model(tmp_path / "out", load="int8")


def test_a_dense_linear_stays_dense_in_the_same_file(tmp_path):
    families.save("llama", tmp_path / "source")
    keep_some = lambda m: m if m.shape == (32, 48) else half(m)  # noqa: E731
    prune(tmp_path / "source", tmp_path / "out", "bitmask", change=keep_some)
    names = set(load_file(tmp_path / "out" / "model-00002-of-00006.safetensors"))
    assert "model.layers.0.self_attn.q_proj.weight_bitmask" in names
    assert "model.layers.0.mlp.down_proj.weight_bitmask" not in names
    assert logits(load.load_model(tmp_path / "out")).isfinite().all()


def test_a_quantized_update_is_stored_without_its_zeros(tmp_path):
    """SparseGPT's joint quantization: what the codes stand for, zeros left out."""
    families.save("llama", tmp_path / "source")
    grid = Grid(4, 16, True)

    def update(matrices, statistics, hand):
        return {n: Update(nearest(half(m), grid, torch.float32)) for n, m in matrices.items()}

    method = Method("joint", {}, [per_stage(update)], (), layout="bitmask")
    compress(Decoder(tmp_path / "source"), method, tmp_path / "out", base="b")
    model = load.load_model(tmp_path / "out")
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    for block in want.model.layers:
        for linear in linears(block).values():
            matrix = nearest(half(get_matrix(linear)), grid, torch.float32)
            set_matrix(linear, matrix.dequantize(torch.float32))
    assert torch.equal(logits(model), logits(want))


def test_a_killed_pass_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    source = tmp_path / "source"
    families.save("gpt2", source)

    class Norms:
        def __init__(self, columns, device):
            self.total = 0

        def add(self, inputs):
            self.total = self.total + inputs.float().square().sum((0, 1))

        def reduce(self):
            pass

    def update(matrices, norms, hand):
        scores = {name: m.abs() * norms.total.sqrt() for name, m in matrices.items()}
        return {n: Update(matrices[n] * (s > s.median())) for n, s in scores.items()}

    def run(out):
        method = Method("norms", {}, [per_stage(update, Norms)], layout="bitmask")
        compress(Decoder(source), method, out, base="b", windows=families.windows(3))

    run(tmp_path / "straight")
    real = shards.Writer.write_block

    def killed(self, index, *parts):
        if index == 3:
            raise KeyboardInterrupt
        real(self, index, *parts)

    monkeypatch.setattr(shards.Writer, "write_block", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    monkeypatch.setattr(shards.Writer, "write_block", real)
    run(tmp_path / "out")
    assert same_files(tmp_path / "straight", tmp_path / "out")


def test_damage_is_one_line(tmp_path):
    families.save("llama", tmp_path / "source")
    prune(tmp_path / "source", tmp_path / "out", "bitmask")
    file = tmp_path / "out" / "model-00002-of-00006.safetensors"
    tensors = load_file(file)
    q = "model.layers.0.self_attn.q_proj"
    for damage in (
        {f"{q}.weight": tensors[f"{q}.weight"][1:]},
        {f"{q}.weight_shape": torch.tensor([32, 99])},
        {f"{q}.weight_shape": torch.tensor([32])},
    ):
        save_file(tensors | damage, file)
        with pytest.raises(UserError, match=f"{q}.* damaged") as error:
            load.load_model(tmp_path / "out")
        assert "\n" not in str(error.value)


def weight_files(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_convert_there_and_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families.save("gpt2", "source", tokenizer=True)
    prune(tmp_path / "source", tmp_path / "dense", "dense")
    assert main(["convert", "dense", "--format", "bitmask", "--dry-run"]) == 0
    assert not (tmp_path / "dense-bitmask").exists()
    assert main(["convert", "dense", "--format", "bitmask", "--out", "small"]) == 0
    assert main(["convert", "small", "--format", "dense", "--out", "back"]) == 0
    small = weight_files(tmp_path / "small")
    printed = capsys.readouterr().out
    assert f"small: {small / 1e6:,.2f} MB, {weight_files(tmp_path / 'dense') / 1e6:,.2f}" in printed
    assert same_files(tmp_path / "dense", tmp_path / "back")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "dense" / name).read_text()
    steps = yaml.safe_load((tmp_path / "back/recipe.yaml").read_text())["steps"]
    assert [step["method"] for step in steps] == ["halves", "convert", "convert"]
    assert "harness convert --format dense" in (tmp_path / "small/README.md").read_text()
    # Bad input: nothing written, one line.
    for words, line in (
        (["convert", "source", "--format", "bitmask", "--out", "x"], "too few for a bitmask"),
        (["convert", "dense", "--format", "dense", "--out", "dense"], "the model itself"),
        (["convert", "dense", "--format", "dense", "--out", "small"], "small exists"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err.splitlines()
        assert line in error[-1]
    assert not (tmp_path / "x").exists()


def test_sizes_are_those_of_the_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families.save("llama", "source", tokenizer=True)
    (tmp_path / "text.txt").write_text("one two three four " * 200)
    prune(tmp_path / "source", tmp_path / "dense", "dense")
    prune(tmp_path / "source", tmp_path / "small", "bitmask")
    tensors = {
        name: sum(paths.tensor_bytes(path) for path in (tmp_path / name).glob("*.safetensors"))
        for name in ("dense", "small")
    }
    shares = []
    for name in ("dense", "small", "source"):
        words = ["eval", name, "--ppl", "text.txt", "--limit", "2", "--out", f"{name}.json"]
        assert main([*words, "--seqlen", "32"]) == 0
        assert ("zeros %" in capsys.readouterr().out) == (name != "source")
        result = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]["footprint"]
        assert result["details"]["disk_bytes"] == weight_files(tmp_path / name)
        assert result["details"]["quantized_parameters"] == 0
        found = result["details"]["sparsity"]
        shares.append(found["share"])
        assert len(found["by_block"]) == 5
        if name != "source":
            saved = found["linear_bytes_dense"] - found["linear_bytes_bitmask"]
            assert saved == tensors["dense"] - tensors["small"]
            rows = {row["label"]: row["value"] for row in result["rows"]}
            other = "MB as bitmask" if name == "dense" else "MB as dense"
            assert abs(rows[other] - rows["MB"]) == pytest.approx(saved / 1e6)
    assert shares[0] == shares[1] == pytest.approx(0.5, abs=0.01) and shares[2] == 0
    text = info.info("small")
    assert "bitmask: a bit per weight" in text and "no engine here has kernels" in text
    assert "zeros" in info.info("dense") and "zeros" not in info.info("source")
    assert sparsity.of_checkpoint(tmp_path / "small").share == shares[0]
    # The header says it all without reading a weight.
    assert Weights(tmp_path / "small").shape("model.norm.weight") == (32,)


def test_nominal_ratio():
    assert recipe.nominal_ratio({"sparsity": 0.5, "prunen": 0, "prunem": 0}) == 0.5
    assert recipe.nominal_ratio({"sparsity": 0.0, "prunen": 2, "prunem": 4}) == 0.5
    assert recipe.nominal_ratio({"pruning_ratio": 0.25}) == 0.25
    assert recipe.nominal_ratio({"wbits": 4}) is None


def test_plan_knows_the_smaller_file(tmp_path, capsys):
    from harness.blocks.plan import print_plan

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    families.save("llama", tmp_path / "source", dtype=torch.float16, **sizes)
    disk = {}
    for layout in ("dense", "bitmask"):
        method = Method("halves", {"sparsity": 0.5}, [per_stage(None)], (), layout=layout)
        print_plan(Decoder(tmp_path / "source"), method, tmp_path / "out", 0)
        line = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("| 0-1"))
        disk[layout] = float(line.split("|")[5])
    assert disk["bitmask"] == pytest.approx(disk["dense"] * 0.5625, abs=0.06)
