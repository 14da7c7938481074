"""What is stored is what was evaluated: bit layouts, round trips, and plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import families
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.checkpoint import layouts, load, quantconfig
from harness.checkpoint.weights import Weights
from harness.errors import UserError
from harness.modules import get_matrix, linears, set_matrix
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

WIDTHS = range(2, 9)
GPTQ_BITS = (2, 3, 4, 8)


def quantized(rows, columns, grid, dtype=torch.float16):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return nearest(weight, grid, dtype)


def same(one, other):
    return (
        one.grid == other.grid
        and one.scale.dtype == other.scale.dtype
        and all(torch.equal(getattr(one, k), getattr(other, k)) for k in ("codes", "scale", "zero"))
    )


def round_trip(weight, layout):
    config = layouts.of(layout).config(Scheme(weight.grid), False)
    tensors = layouts.of(layout).encode("x", weight)
    assert all(t.is_contiguous() for t in tensors.values())
    config = json.loads(json.dumps(config))
    more = [config] if layout == "gptq" else []
    grid = layouts.of(layout).scheme_of(config).of("x")
    return layouts.of(layout).decode(tensors, "x", grid, *more)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_round_trip(bits, symmetric):
    for rows, columns, group in ((7, 30, 10), (7, 30, -1), (1, 1, -1), (33, 64, 32), (16, 13, 13)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = quantized(rows, columns, Grid(bits, group, symmetric), dtype)
            assert same(round_trip(weight, "compressed-tensors"), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_gptq_round_trip(bits, symmetric):
    for rows, columns, group in ((32, 96, 12), (64, 32, -1), (32, 64, 32)):
        grid = Grid(bits, group, symmetric)
        layouts.of("gptq").refuse(Scheme(grid), {"x": (rows, columns)}, False)
        weight = quantized(rows, columns, grid)
        weight.zero[0, 0] = weight.zero[0, 0] if symmetric else 0  # does not fit version 1
        assert same(round_trip(weight, "gptq"), weight)


@pytest.mark.parametrize("version", ["0.17.0", "0.20.0"])
def test_files_of_both_packings_of_compressed_tensors_are_read(version):
    """Made with the library's own packing in that version, from codes that a formula gives; some so
    narrow that both take as many words."""
    path = Path(__file__).parent / "packings" / f"compressed-tensors-{version}.safetensors"
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = {name.rpartition(".")[0] for name in held}
        assert len(names) == 12
        for name in names:
            width = int(name[1])
            scale = file.get_tensor(f"{name}.weight_scale")
            rows, columns = file.get_tensor(f"{name}.weight_shape").tolist()
            groups = scale.shape[1]
            grid = Grid(width, -1 if groups == 1 else columns // groups)
            found = layouts.of("compressed-tensors").decode(held, name, grid)
            codes = (torch.arange(rows)[:, None] * 7 + torch.arange(columns) * 3) % 2**width
            zero = (torch.arange(rows)[:, None] * 5 + torch.arange(groups) * 11) % 2**width
            assert torch.equal(found.codes, codes.to(torch.uint8)), name
            assert torch.equal(found.zero, zero.to(torch.uint8)), name
            if version == "0.20.0":  # which is what we write
                made = layouts.of("compressed-tensors").encode(name, found)
                assert all(torch.equal(made[key], file.get_tensor(key)) for key in made)


def test_words_that_are_of_neither_packing_are_refused():
    weight = quantized(8, 64, Grid(3, -1))
    tensors = layouts.of("compressed-tensors").encode("x", weight)
    tensors["x.weight_packed"] = tensors["x.weight_packed"][:, :-1]
    with pytest.raises(UserError, match=r"has 5 words a row; 64 values of 3 bits take 6 .* 7"):
        layouts.of("compressed-tensors").decode(tensors, "x", weight.grid)


def test_other_programs_files_are_read_as_transformers_reads_them(llamas, tmp_path):
    """Without "dequantize" it takes the scales to the dtype of the computation first."""
    out = tmp_path / "out"
    round_to_nearest(llamas[torch.bfloat16], out, Grid(4, 16, True), "compressed-tensors")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["dequantize"]
    (out / "config.json").write_text(json.dumps(config))
    for dtype in llamas:
        plain = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
        assert torch.equal(logits(plain), logits(load.load_model(out, dtype=dtype)))


def autogptq_words(codes, bits):
    """AutoGPTQ's words for codes [I, O], the input index running fastest within a word; written
    from its description, bit by bit for the 3-bit pattern of 32 values in three words."""
    rows, columns = codes.shape
    words = [[0] * columns for _ in range(rows * bits // 32)]
    for column in range(columns):
        for i in range(rows):
            code = int(codes[i, column])
            if bits != 3:
                per_word = 32 // bits
                words[i // per_word][column] |= code << (bits * (i % per_word))
                continue
            first, j = i // 32 * 3, i % 32
            if j < 10:
                words[first][column] |= code << (3 * j)
            elif j == 10:
                words[first][column] |= (code & 0b11) << 30
                words[first + 1][column] |= code >> 2
            elif j < 21:
                words[first + 1][column] |= code << (3 * (j - 11) + 1)
            elif j == 21:
                words[first + 1][column] |= (code & 0b1) << 31
                words[first + 2][column] |= code >> 1
            else:
                words[first + 2][column] |= code << (3 * (j - 22) + 2)
    return [[w - 2**32 if w >= 2**31 else w for w in row] for row in words]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_gptq_words_are_autogptqs(bits, symmetric):
    weight = quantized(32, 64, Grid(bits, 32, symmetric))
    tensors = layouts.of("gptq").encode("x", weight)
    assert tensors["x.qweight"].tolist() == autogptq_words(weight.codes.T, bits)
    zero = weight.zero - 1 if symmetric else weight.zero  # version 1 stores one less
    packed_along_outputs = list(zip(*autogptq_words(zero, bits), strict=True))
    assert tensors["x.qzeros"].tolist() == [list(row) for row in packed_along_outputs]
    assert torch.equal(tensors["x.scales"], weight.scale.T)
    assert tensors["x.g_idx"].tolist() == [0] * 32 + [1] * 32
    dtypes = {k: t.dtype for k, t in tensors.items()}
    assert dtypes["x.qweight"] == dtypes["x.qzeros"] == dtypes["x.g_idx"] == torch.int32
    assert dtypes["x.scales"] == torch.float16
    config = layouts.of("gptq").config(Scheme(weight.grid), False)
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


@pytest.mark.parametrize("bits", [4, 8])
def test_both_layouts_hold_the_same_words(bits):
    weight = quantized(32, 64, Grid(bits, 32, True))
    ours, theirs = (layouts.of(layout).encode("x", weight) for layout in layouts.PACKED)
    assert torch.equal(ours["x.weight_packed"], theirs["x.qweight"].T)
    assert torch.equal(ours["x.weight_scale"], theirs["x.scales"].T)


def test_what_a_layout_cannot_hold_is_refused():
    with pytest.raises(UserError, match="2, 3, 4 or 8 bits, not 5"):
        layouts.of("gptq").refuse(Scheme(Grid(5)), {}, False)
    with pytest.raises(UserError, match="q is 40 x 64"):
        layouts.of("gptq").refuse(Scheme(Grid(3)), {"x.q": (40, 64)}, False)
    layouts.of("gptq").refuse(Scheme(Grid(4)), {"x.q": (40, 64)}, False)
    layouts.of("compressed-tensors").refuse(Scheme(Grid(5)), {"x.q": (41, 63)}, False)
    assert quantconfig.layout_of({"quant_method": "awq"}) == "other"
    assert quantconfig.layout_of(None) == "dense"


def round_to_nearest(source, out, grid, layout):
    """The pass with the simplest method, and the model that it should have stored."""
    decoder = Decoder(source, dtype=Weights(source).dtype)
    scales = layouts.of(layout).scale_dtype(decoder.dtype)

    def update(matrices, statistics, hand):
        return {n: sequential.Update(nearest(w, grid, scales)) for n, w in matrices.items()}

    method = sequential.Method(
        "nearest", {}, [sequential.per_stage(update)], (), layout=layout, scheme=Scheme(grid)
    )
    sequential.compress(decoder, method, out, base=str(source))
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    for block in model.get_submodule(decoder.prefix):
        for linear in linears(block).values():
            weight = nearest(get_matrix(linear).float(), grid, scales)
            set_matrix(linear, weight.dequantize(decoder.dtype))
    return model


@torch.no_grad()
def logits(model):
    return model(families.windows(2), use_cache=False).logits


def loaded(folder):
    """In the dtype that it is stored in."""
    return load.load_model(folder, dtype=Weights(folder).dtype)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folders = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folders[dtype] = tmp_path_factory.mktemp("llama")
        families.save("llama", folders[dtype], dtype=dtype, num_hidden_layers=2, hidden_size=64)
    return folders


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_transformers_loads_the_model_that_was_evaluated(bits, symmetric, llamas, tmp_path):
    dtypes = list(llamas)
    for number, group in enumerate((16, -1)):
        dtype = dtypes[(bits + number) % len(dtypes)]
        model = round_to_nearest(
            llamas[dtype], tmp_path / str(group), Grid(bits, group, symmetric), "compressed-tensors"
        )
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / str(group)).eval()
        assert plain.dtype == dtype
        assert torch.equal(logits(plain), logits(model))
        ours = loaded(tmp_path / str(group))
        assert ours.dtype == dtype
        assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_gptq_files_load_through_the_harness(bits, symmetric, llamas, tmp_path):
    for group, dtype in ((16, torch.float16), (-1, torch.bfloat16)):
        out = tmp_path / str(group)
        grid = Grid(bits, group, symmetric)
        # 3 bits need sizes that are multiples of 32.
        source = llamas[dtype]
        if bits == 3:
            source = tmp_path / f"source{group}"
            sizes = {"hidden_size": 128, "intermediate_size": 64}
            families.save("llama", source, dtype=dtype, num_hidden_layers=2, **sizes)
        model = round_to_nearest(source, out, grid, "gptq")
        assert torch.equal(logits(loaded(out)), logits(model))


def test_dense_layout_is_an_ordinary_checkpoint(llamas, tmp_path):
    out = tmp_path / "out"
    model = round_to_nearest(llamas[torch.bfloat16], out, Grid(3, 16), "dense")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))


@pytest.mark.parametrize("layout", layouts.QUANTIZED)
def test_gpt2s_transposed_linears(layout, tmp_path):
    families.save("gpt2", tmp_path / "source", n_embd=64)
    out = tmp_path / "out"
    model = round_to_nearest(tmp_path / "source", out, Grid(4, 32, True), layout)
    assert torch.equal(logits(loaded(out)), logits(model))
    if layout == "dense":
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))
        return
    # Nothing but the harness reads these: an error, not a model with random weights.
    with pytest.raises((RuntimeError, ImportError), match=r"mismatched_sizes|optimum"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_family_with_linears_of_its_own_loads_packed(tmp_path):
    # Falcon's are a subclass of nn.Linear, and its weight initialisation reaches for dense weights.
    families.save("falcon", tmp_path / "source")
    out = tmp_path / "out"
    model = round_to_nearest(tmp_path / "source", out, Grid(4, 16, True), "compressed-tensors")
    assert torch.equal(logits(loaded(out)), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))


def test_packing_twice_is_refused(llamas, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    round_to_nearest(llamas[torch.float16], out, Grid(4, 16, True), "compressed-tensors")
    names = set(load_file(out / "model-00002-of-00003.safetensors"))
    q = "model.layers.0.self_attn.q_proj"
    assert {f"{q}.weight_packed", f"{q}.weight_scale", f"{q}.weight_shape"} <= names
    assert f"{q}.weight" not in names and "model.layers.0.input_layernorm.weight" in names
    with pytest.raises(UserError, match="already quantized"):
        load.load_model(out, load="int8")
