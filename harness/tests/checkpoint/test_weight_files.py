"""One rule for the files of a checkpoint, for whatever reads them; nothing outside the folder."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from harness.blocks.streams import stream_logits
from harness.checkpoint import load, weight_files
from harness.checkpoint.weights import Weights
from harness.errors import UserError
from harness.paths import read_json, regular

DOWN = "model.layers.1.mlp.down_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    families.save("llama", tmp_path / "model", num_hidden_layers=2)
    return tmp_path / "model"


def chosen(folder) -> list[str]:
    paths, _ = weight_files.locate(folder, read_json(folder / "config.json"))
    return [path.name for path in paths]


def write_shards(folder, tensors, map_more=()):
    """``tensors`` in two files and their index."""
    names = sorted(tensors)
    where = {n: f"shard-{int(i >= len(names) // 2)}.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        own = {n: tensors[n] for n in names if where[n] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    where |= dict(map_more)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def test_a_newer_single_file_beside_an_older_index_is_two_models(model):
    """transformers reads the single file and the packages read the shards: neither may happen."""
    tensors = load_file(model / SINGLE)
    write_shards(model, tensors)
    assert chosen(model) == [SINGLE]  # equal ones: transformers' order
    write_shards(model, tensors | {DOWN: tensors[DOWN] + 1})
    for read in (Weights, load.load_model, weight_files.read_headers):
        with pytest.raises(UserError, match=rf"holds two models: .* 1 tensors, {DOWN} among"):
            read(model)
    (model / "shard-0.safetensors").unlink()  # a torso, which nobody reads
    assert chosen(model) == [SINGLE]


def test_both_readers_take_the_same_files(model):
    """Safetensors before .bin, and of an index all that its files hold."""
    tensors = load_file(model / SINGLE)
    torch.save({n: t + 1 for n, t in tensors.items()}, model / "pytorch_model.bin")
    ids = families.windows(1)
    with torch.no_grad():
        whole = load.load_model(model, dtype="float32")(ids, use_cache=False).logits
    assert torch.equal(torch.cat([x for _, x in stream_logits(model, ids)]), whole)
    (model / SINGLE).unlink()
    write_shards(model, tensors)
    assert torch.equal(torch.cat([x for _, x in stream_logits(model, ids)]), whole)


def test_a_file_under_the_name_that_the_config_gives(model):
    (model / SINGLE).rename(model / "other.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (model / "config.json").write_text(json.dumps(config))
    assert chosen(model) == ["other.safetensors"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({DOWN: "../model.safetensors"}, r"names .*\.\./model\.safetensors"),
        ({DOWN: "/etc/passwd"}, r"names the file '/etc/passwd'"),
        ({DOWN: "shard-9.safetensors"}, "names shard-9.safetensors, which is not there"),
        ({DOWN: 7}, "names the file 7"),
        ({"nowhere": "shard-0.safetensors"}, "says that shard-0.safetensors holds nowhere"),
    ],
)
def test_an_index_that_lies_is_refused(model, more, message):
    write_shards(model, load_file(model / SINGLE), more.items())
    (model.parent / SINGLE).write_bytes((model / SINGLE).read_bytes())
    (model / SINGLE).unlink()
    with pytest.raises(UserError, match=message):
        Weights(model)


def test_links_stay_inside_and_pipes_are_not_waited_for(model, tmp_path):
    target = tmp_path / "elsewhere.safetensors"
    (model / SINGLE).rename(target)
    (model / SINGLE).symlink_to(target)
    with pytest.raises(UserError, match=r"is a link to .*elsewhere"):
        Weights(model)
    (model / SINGLE).unlink()
    os.mkfifo(model / SINGLE)
    for read in (Weights, load.resolve):
        with pytest.raises(UserError, match="no regular file"):
            read(model)
    (model / SINGLE).unlink()
    (model / SINGLE).symlink_to(SINGLE)  # a loop
    with pytest.raises(UserError, match="cannot be followed"):
        load.resolve(model)


def test_the_hubs_cache_links_to_its_blobs(model, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0f"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert regular(load.resolve(snapshot), SINGLE) == snapshot / SINGLE
    assert Weights(snapshot).names


def header_of(entries: dict, size: int) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + b"\0" * size


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 99,
        struct.pack("<Q", 5) + b"[1,2]",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        header_of({"a": ENTRY}, 15),
        header_of({"a": ENTRY}, 17),
        header_of({"a": ENTRY | {"shape": [-2, -2]}}, 16),
        header_of({"a": ENTRY | {"shape": [2, 3]}}, 16),
        header_of({"a": 1}, 16),
        header_of({"a": ENTRY | {"data_offsets": [0]}}, 16),
        header_of({"a": ENTRY, "b": ENTRY}, 16),
        struct.pack("<Q", 5002) + b"{" + b"9" * 5000 + b"}",
    ],
)
def test_damaged_headers_are_one_line(tmp_path, raw):
    (tmp_path / SINGLE).write_bytes(raw)
    with pytest.raises(UserError, match="corrupt or truncated"):
        weight_files.header(tmp_path / SINGLE)
