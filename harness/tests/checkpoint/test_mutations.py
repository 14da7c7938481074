"""A hundred and more ways in which a good folder is damaged: exit code 2 and one line, or the
result of the good one, and never a traceback or a wait.

Every mutation is tried by `info` and by the two readers behind every command (whole models, block
by block), in one process: what each command adds of its own is in its package's tests.
"""

import json
import math
import random
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from harness import cli
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.blocks.streams import stream_logits
from harness.checkpoint import load, recipe
from harness.commands import report
from harness.commands.info import info
from harness.data import corpora, example_sets
from harness.errors import UserError
from harness.metrics import mmlu_data
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

DOWN = "model.layers.1.mlp.down_proj"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP = b"[" * 100_000
LONG = b'{"a": ' + b"7" * 10_000 + b"}"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    families.save("llama", root / "dense", tokenizer=True, num_hidden_layers=2, hidden_size=64)
    for layout, grid in (("gptq", Grid(4, 16, True)), ("compressed-tensors", Grid(4, 16, False))):

        def round_all(matrices, statistics, where, grid=grid):
            return {n: sequential.Update(nearest(w, grid, torch.float16))
                    for n, w in matrices.items()}  # fmt: skip

        method = sequential.Method(
            "rtn", {}, [sequential.per_stage(round_all)], (), layout=layout, scheme=Scheme(grid)
        )
        sequential.compress(Decoder(root / "dense"), method, root / layout, base="dense")
        merge(root / layout)
    return root


def merge(folder):
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def outcome(folder):
    """What the readers make of a folder: logits, or the lines that refuse it."""
    ids, found = families.windows(1), []
    for read in (
        lambda: info(folder),
        lambda: load.load_model(folder, dtype="float32")(ids, use_cache=False).logits,
        lambda: torch.cat([x for _, x in stream_logits(folder, ids, dtype="float32")]),
        lambda: load.load_tokenizer(folder)("def add"),
    ):
        started = time.perf_counter()
        try:
            with torch.no_grad():
                found.append(read())
        except UserError as error:
            assert "\n" not in str(error)
            found.append(error)
        assert time.perf_counter() - started < 20
    return found


@pytest.fixture(scope="module")
def expected(good):
    return {folder.name: outcome(folder) for folder in good.iterdir()}


def check(folder, expected):
    """Exit 2 and one line, or the unchanged result: never other numbers."""
    print_out, whole, streamed, _ = outcome(folder)
    for found, wanted in ((whole, expected[1]), (streamed, expected[2])):
        if not isinstance(found, UserError):
            assert torch.equal(found, wanted)
    assert isinstance(whole, UserError) == isinstance(streamed, UserError), (whole, streamed)
    refused = any(isinstance(f, UserError) for f in (print_out, whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", open("/dev/null", "w"))  # noqa: SIM115
        code = cli.main(["info", str(folder)])
    assert code == (2 if isinstance(print_out, UserError) else 0)
    return refused


def text(old: str, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def field(*keys, value=None, drop=False):
    """Change one field of a JSON file, by its path."""

    def change(path):
        whole = json.loads(path.read_text())
        inner = whole
        for key in keys[:-1]:
            inner = inner[key]
        if drop:
            inner.pop(keys[-1], None)
        else:
            inner[keys[-1]] = value
        path.write_text(json.dumps(whole))

    return change


def raw(content: bytes):
    return lambda path: path.write_bytes(content)


def tensors(change):
    def edit(path):
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    return edit


def cast(name, **how):
    return tensors(lambda t: t.update({name: t[name].to(**how)}))


def reshape(name, take):
    return tensors(lambda t: t.update({name: take(t[name]).contiguous()}))


JUNK = [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", DEEP, LONG, b"{}", b"\x00" * 99]
CONFIG = [
    *(raw(content) for content in JUNK),
    *(field(key, value=value)
      for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
                  "intermediate_size", "vocab_size", "head_dim")
      for value in (-1, 0, 10**12, "many", 3.5, True)),
    *(field("dtype", value=value) for value in ("bool", "int8", "float99", 7, [])),
    *(field("model_type", value=value) for value in ("unheard-of", None, 3, "bert", "t5")),
    *(field("architectures", value=value) for value in (None, [], ["X"], "LlamaForCausalLM")),
    *(field("rms_norm_eps", value=value) for value in ("a", None)),
    *(field("quantization_config", value=value)
      for value in ([], [1], "gptq", {}, {"bits": 4}, {"quant_method": 3}, {"quant_method": "awq"},
                    {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True})),
    *(field("harness_sizes", value=value) for value in ([], [1, 2], "x", {})),
    field("transformers_weights", value="../dense/model.safetensors"),
    field("tie_word_embeddings", value=True), field("attention_bias", value=True),
    field("max_position_embeddings", value=-5),
]  # fmt: skip
HEADER = struct.pack("<Q", 4)
WEIGHTS = [
    raw(b""), raw(b"\xff" * 999), raw(HEADER + b"null"), raw(struct.pack("<Q", 100_000) + DEEP),
    raw(struct.pack("<Q", len(LONG)) + LONG), lambda p: p.write_bytes(p.read_bytes()[:-9]),
    lambda p: p.write_bytes(p.read_bytes() + b"x"),
    lambda p: p.write_bytes(p.read_bytes().replace(b'"F32"', b'"Q77"', 1)),
    lambda p: p.write_bytes(p.read_bytes().replace(b'"F32"', b'"BOO"', 1)),
    lambda p: p.unlink(), lambda p: p.rename(p.with_suffix(".bin")),
    tensors(lambda t: t.pop(f"{DOWN}.weight")), tensors(lambda t: t.clear()),
    tensors(lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"] * math.nan})),
    cast(f"{DOWN}.weight", dtype=torch.int8), cast(f"{DOWN}.weight", dtype=torch.bool),
    cast(f"{DOWN}.weight", dtype=torch.float8_e5m2), cast(f"{DOWN}.weight", dtype=torch.int64),
    reshape(f"{DOWN}.weight", lambda w: w[:, :-1]), reshape(f"{DOWN}.weight", lambda w: w[0]),
    reshape("model.norm.weight", lambda w: w[None]),
    reshape("model.embed_tokens.weight", lambda w: w[:9]),
    tensors(lambda t: t.update({f"{DOWN}.qweight": torch.zeros(2, 2)})),
    tensors(lambda t: t.update({f"{DOWN}.weight_packed": torch.zeros(2, 2)})),
]  # fmt: skip
INDEXES = [
    *JUNK, b'{"weight_map": 7}', b'{"weight_map": {}}', b'{"weight_map": {"a": null}}',
    b'{"weight_map": {"a": "../model.safetensors"}}', b'{"weight_map": {"a": "/etc/passwd"}}',
    b'{"weight_map": {"a": "nowhere.safetensors"}}', b'{"weight_map": {"a": "shard.safetensors"}}',
    b'{"weight_map": ["shard.safetensors"]}', b'{"weight_map": {"a": "config.json"}}',
]  # fmt: skip
PACKED = {
    "gptq": [
        *(field("quantization_config", key, drop=True)
          for key in ("bits", "group_size", "sym", "quant_method")),
        *(field("quantization_config", key, value=value)
          for key, values in {
              "bits": (0, 3, 8, 5, "4", None, 4.0), "group_size": (0, 7, 32, -2, -1, "16"),
              "sym": (False, None, "yes"), "checkpoint_format": ("gptq_v2", "marlin", 7),
              "dynamic": ({"a": {}},), "desc_act": (True,),
              "quant_method": ("awq", "fp8", [])}.items()
          for value in values),
    ],
    "compressed-tensors": [
        *(field("quantization_config", key, drop=True) for key in ("config_groups", "format")),
        *(field("quantization_config", key, value=value)
          for key, values in {
              "config_groups": ({}, [], None, {"g": 1}, {"g": {"weights": None}}),
              "kv_cache_scheme": ({"num_bits": 8},), "format": ("dense", "nvfp4-pack-quantized", 1),
              "ignore": (None, []), "quantization_status": ("frozen", "initialized")}.items()
          for value in values),
        *(field("quantization_config", "config_groups", "group_0", "weights", key, value=value)
          for key, values in {
              "num_bits": (0, 3, 8, "4", None), "symmetric": (True, None), "type": ("float",),
              "group_size": (32, 8, 0, None, "x"), "strategy": ("channel", "tensor", None,
              1)}.items()
          for value in values),
        field("quantization_config", "config_groups", "group_0", "input_activations",
              value={"num_bits": 8}),
    ],
}  # fmt: skip
PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
}
TOKENIZERS = [*JUNK, b'{"model": {}}', b'{"version": "9", "model": {"type": "X"}}']


def mutated(good, tmp_path, kind):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good / kind, folder)
    return folder


def sweep(good, tmp_path, expected, kind, name, changes, refused):
    """At least ``refused`` of the changes are refused; the others change nothing."""
    count = 0
    for number, change in enumerate(changes):
        folder = mutated(good, tmp_path, kind)
        change(folder / name)
        try:
            count += check(folder, expected[kind])
        except Exception as error:
            raise AssertionError(f"{kind}, {name}, change {number}: {error!r}") from error
    assert count >= refused, f"{count} of {len(changes)} were refused"


def test_configs(good, tmp_path, expected):
    assert len(CONFIG) > 70
    sweep(good, tmp_path, expected, "dense", "config.json", CONFIG, 60)


def test_weights(good, tmp_path, expected):
    sweep(good, tmp_path, expected, "dense", SINGLE, WEIGHTS, len(WEIGHTS))


def test_indexes(good, tmp_path, expected):
    def shard(content):
        def change(path):
            path.with_name(SINGLE).rename(path.with_name("shard.safetensors"))
            path.write_bytes(content)

        return change

    sweep(good, tmp_path, expected, "dense", INDEX, map(shard, INDEXES), len(INDEXES))


def test_old_files_that_are_no_weights(good, tmp_path, expected):
    def change(content):
        def edit(path):
            path.with_name(SINGLE).unlink()
            path.write_bytes(content)

        return edit

    junk = [b"", b"PK\x03\x04", b"\x80\x04K\x07.", b"\x00" * 999, b"{}"]
    sweep(good, tmp_path, expected, "dense", "pytorch_model.bin", map(change, junk), len(junk))


@pytest.mark.parametrize("kind", PACKED)
def test_packed(good, tmp_path, expected, kind):
    sweep(good, tmp_path, expected, kind, "config.json", PACKED[kind], 0.8 * len(PACKED[kind]))
    parts = [
        change
        for part in PARTS[kind]
        for name in [f"{DOWN}.{part}"]
        for change in (
            tensors(lambda t, name=name: t.pop(name)),
            reshape(name, torch.flatten),
            reshape(name, lambda x: x[:1]),
            reshape(name, lambda x: x[..., :-1]),
        )
    ]
    sweep(good, tmp_path, expected, kind, SINGLE, parts, 0.7 * len(parts))


def test_tokenizers(good, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for content in TOKENIZERS:
            folder = mutated(good, tmp_path, "dense")
            (folder / name).write_bytes(content)
            (tmp_path / "text.txt").write_text(families.TEXT * 40)
            words = ["eval", folder, "--ppl", tmp_path / "text.txt", "--limit", 1, "--seqlen", 16]
            words += ["--out", tmp_path / "r.json", "--overwrite", "--dry-run"]
            assert cli.main([str(word) for word in words]) in (0, 2), (name, content[:20])


def test_recipes_and_results(good, tmp_path):
    recipes = [*JUNK, b"steps: 1", b"steps: [1]", b"a: &a [*a]", b"!!python/object:os.system {}"]
    for content in recipes:
        folder = mutated(good, tmp_path, "dense")
        (folder / "recipe.yaml").write_bytes(content)
        json.dumps(recipe.steps(folder))
        assert cli.main(["info", str(folder)]) == 0
    for content in [*JUNK, b'{"schema": 2, "model": {"name": "a"}, "metrics": {"a": 1}}']:
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(UserError):
            report.load(tmp_path / "r.json")


TABLES = {
    "csv": '"What, is?",a,b,c,d,A\nWhy?,a,b,c,d,B\n' * 5,
    "jsonl": '{"prompt": "a", "response": "b", "question": "q", "choices": ["a"], "answer": 0}\n',
    "json": json.dumps([{"instruction": "a", "input": "", "output": ["b", "c"]}] * 6),
    "txt": families.TEXT * 5,
}
INSERTED = [b'"', b"{", b"}", b"[", b"null", b"1e999", b"\\u", b"\\ud800", b",", b"\n", b"\x00",
            b"9" * 5000, b"[" * 3000, b"\xff", b"\xef\xbb\xbf"]  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    content, kind = bytearray(content), draw.randrange(5)
    for _ in range(draw.randrange(1, 6)):
        place = draw.randrange(len(content) + 1)
        if kind == 0:
            content[place:place] = bytes([draw.randrange(256)])
        elif kind == 1:
            del content[place : place + draw.randrange(1, 9)]
        elif kind == 2:
            content[place:place] = draw.choice(INSERTED)
        elif kind == 3:
            content = content[:place] or bytearray(b" ")
        elif place < len(content):
            content[place] ^= 1 << draw.randrange(8)
    return bytes(content)


@pytest.mark.parametrize("ending", TABLES)
def test_data_files(good, tmp_path, ending):
    """Whatever is read of a damaged table: rows, or one line."""
    tokenizer, draw = load.load_tokenizer(good / "dense"), random.Random(0)
    path, quiz = tmp_path / f"x.{ending}", tmp_path / "mmlu"
    for split in ("dev", "test"):
        (quiz / split).mkdir(parents=True)
    for _ in range(80):
        path.write_bytes(damaged((TABLES[ending] * 3).encode(), draw))
        for split in ("dev", "test") if ending == "csv" else ():
            (quiz / split / f"anatomy_{split}.csv").write_bytes(path.read_bytes())
        for read in (
            lambda: corpora.evaluation(tokenizer, str(path), seqlen=8, limit=1),
            lambda: corpora.calibration(tokenizer, str(path), nsamples=1, seqlen=8, seed=0),
            lambda: corpora.instructions(str(path), "train", tokenizer),
            lambda: example_sets.pairs(str(path), "train", tokenizer=tokenizer),
            lambda: example_sets.is_text(str(path)),
            lambda: corpora.questions(str(path)),
            lambda: mmlu_data.read(str(quiz)) if ending == "csv" else None,
        ):
            try:
                read()
            except UserError as error:
                assert "\n" not in str(error)
