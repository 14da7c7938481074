"""The pass over all blocks against a naive one: whole-model forwards with hooks, one per stage."""

import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import driving
import families
from harness import paths
from harness.blocks import block as block_module
from harness.blocks import decoder as decoder_module
from harness.blocks import sequential
from harness.blocks.decoder import Decoder
from harness.blocks.sequential import Method, Update, compress, per_stage
from harness.checkpoint import hashes, runs
from harness.errors import Finished, UserError
from harness.modules import get_matrix, linears, set_matrix
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

BATCH, WINDOWS = 2, 5  # the last batch is a short one
CALIBRATION = {"dataset": "d", "nsamples": 5, "seqlen": 24, "seed": 0}
# One with attention and MLP side by side, one with transposed linears, one that returns tuples.
SOME = ("llama", "gpt2", "falcon", "bloom")


class Recorder:
    """Statistics that keep every input they are given."""

    def __init__(self, columns, device):
        self.inputs, self.reduced = [], False

    def add(self, inputs):
        assert not self.reduced
        self.inputs.append(inputs.clone())

    def reduce(self):
        self.reduced = True


def coarse(matrix):
    return (matrix * 16).round() / 16


def recording(seen, change):
    """An update that notes what each stage saw, then changes the weights."""

    def update(matrices, statistics, hand):
        assert statistics.reduced
        seen.append((str(hand), list(matrices), torch.cat(statistics.inputs)))
        return {name: Update(change(matrix)) for name, matrix in matrices.items()}

    return update


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(decoder_module, "TOKENS_PER_BATCH", BATCH * 24)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folders = {family: tmp_path_factory.mktemp(family) for family in SOME}
    for family, folder in folders.items():
        families.save(family, folder)
    return folders


@torch.no_grad()
def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return torch.cat([model(p, use_cache=False).logits for p in families.windows(5).split(BATCH)])


def run(source, out, method, **options):
    return compress(
        Decoder(source), method, out, base="base", windows=families.windows(WINDOWS), **options
    )


# The whole oracle in one place.
@torch.no_grad()
def naive(source, change, true_sequential):  # noqa: C901
    """The same by whole forwards: for every stage (or block) run the model, hook, change."""
    decoder = Decoder(source)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    parts = families.windows(WINDOWS).split(BATCH)
    seen = []

    def inputs_of(block):
        """Linear -> all its inputs; and the linears in order of first call."""
        found, hooks = {}, []
        for name, module in linears(block).items():
            hook = lambda _, args, n=name: found.setdefault(n, []).append(args[0].clone())  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook))
        for part in parts:
            model(part, use_cache=False)
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(some) for name, some in found.items()}

    def grouped(inputs):
        groups = []
        for name, value in inputs.items():
            same = (g for g in groups if g[1].shape == value.shape and torch.equal(g[1], value))
            group = next(same, None)
            if group:
                group[0].append(name)
            else:
                groups.append(([name], value))
        return groups

    for index, block in enumerate(model.get_submodule(decoder.prefix)):
        groups = grouped(inputs_of(block))
        for names, value in groups:
            if true_sequential:
                value = inputs_of(block)[names[0]]
            seen.append((f"block {index}", names, value))
            if true_sequential:
                for name in names:
                    set_matrix(linears(block)[name], change(get_matrix(linears(block)[name])))
        if not true_sequential:
            for module in linears(block).values():
                set_matrix(module, change(get_matrix(module)))
    return seen, torch.cat([model(part, use_cache=False).logits for part in parts])


# keep: whether forwards stay paused between stages, which the plain order has no use for.
@pytest.mark.parametrize(("true_sequential", "keep"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("family", SOME)
def test_every_stage_sees_what_a_naive_pass_sees(
    family, true_sequential, keep, sources, tmp_path, monkeypatch, capsys
):
    if not keep:
        monkeypatch.setattr(block_module, "SHARE_OF_FREE_MEMORY", 0)
    seen = []
    method = Method(
        "coarse",
        {},
        [per_stage(recording(seen, coarse), Recorder, true_sequential)],
    )
    run(sources[family], tmp_path / "out", method)
    assert keep != ("slower, same result" in capsys.readouterr().err)
    expected, expected_logits = naive(sources[family], coarse, true_sequential)
    assert len(seen) == len(expected)
    for (where, names, value), (where2, names2, value2) in zip(seen, expected, strict=True):
        assert (where, names) == (where2, names2)
        assert torch.equal(value, value2)
    assert torch.equal(logits(tmp_path / "out"), expected_logits)


@pytest.mark.parametrize("family", SOME)
def test_a_pass_that_changes_nothing_changes_nothing(family, sources, tmp_path):
    before = driving.contents(sources[family])
    for number, statistics in enumerate((Recorder, None)):
        out = tmp_path / str(number)
        same = lambda matrices, *_: {n: Update(m) for n, m in matrices.items()}  # noqa: E731
        rows = run(sources[family], out, Method("same", {}, [per_stage(same, statistics)]))
        assert torch.equal(logits(out), logits(sources[family]))
        assert len(rows) == families.LAYERS * len(linears(Decoder(sources[family]).blocks[0]))
    assert torch.is_grad_enabled()
    assert driving.contents(sources[family]) == before


@pytest.mark.parametrize(("true_sequential", "times"), [(True, 1), (False, 2)])
def test_how_often_each_linear_runs(true_sequential, times, sources, tmp_path):
    decoder, calls = Decoder(sources["llama"]), {}
    for index, block in enumerate(decoder.blocks):
        for name, module in linears(block).items():
            calls[index, name] = 0

            def count(*_, key=(index, name)):
                calls[key] += 1

            module.register_forward_hook(count)
    method = Method("coarse", {}, [per_stage(recording([], coarse), Recorder, true_sequential)])
    compress(decoder, method, tmp_path / "out", base="b", windows=families.windows(WINDOWS))
    batches = 3
    probe = {0: 1}  # the first block is run once more, on a short window, to find the stages
    assert calls == {key: times * batches + probe.get(key[0], 0) for key in calls}


def test_two_passes_on_one_decoder_start_from_the_same_weights(sources, tmp_path):
    decoder = Decoder(sources["llama"])
    for name, change in (("zero", torch.zeros_like), ("same", torch.clone)):
        method = Method(name, {}, [per_stage(recording([], change), Recorder)])
        compress(decoder, method, tmp_path / name, base="b", windows=families.windows(WINDOWS))
    assert torch.equal(logits(tmp_path / "same"), logits(sources["llama"]))


# -- beginning, going on, ending -------------------------------------------------------------


class Interrupted(Exception):
    pass


def packing(bits=4, fail_at=None, error=Interrupted, calls=None):
    """A packed method whose codes depend on the data; stops at a block if told so."""
    grid = Grid(bits, 16, True)

    def update(matrices, statistics, hand):
        if calls is not None:
            calls.append(str(hand))
        if hand.index == fail_at:
            raise error("stopped by the test")
        size = torch.cat(statistics.inputs).square().mean().sqrt()
        return {
            n: Update(nearest(m * (1 + size / 64), grid, m.dtype), size.item())
            for n, m in matrices.items()
        }

    layout = "compressed-tensors"
    return Method(
        "packing", {"bits": bits}, [per_stage(update, Recorder)], layout=layout, scheme=Scheme(grid)
    )


def interrupted(source, out, **options):
    with pytest.raises(Interrupted):
        run(source, out, packing(fail_at=3), **options)
    assert not out.exists()


def test_an_interrupted_pass_goes_on_with_the_same_result(sources, tmp_path, capsys):
    source, out = sources["llama"], tmp_path / "out"
    run(source, tmp_path / "straight", packing())
    interrupted(source, out)
    # What a kill inside a write leaves: our temporary file, the safetensors library's.
    for stray in ("model-00005-of-00006.safetensors.tmp", ".tmpQXqjyK"):
        (tmp_path / "out.partial" / stray).write_bytes(b"half")
    calls = []
    capsys.readouterr()
    run(source, out, packing(calls=calls))
    assert "resuming: 3 of 5 blocks are done" in capsys.readouterr().err
    assert set(calls) == {"block 3", "block 4"}
    assert driving.contents(out) == driving.contents(tmp_path / "straight")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "straight"}


def noting(seen, fail_at=None):
    """Side tensors of some linears: their weights times how large their inputs were."""

    def update(matrices, statistics, hand):
        if hand.index == fail_at:
            raise Interrupted
        size = torch.cat(statistics.inputs).square().mean().sqrt()
        updates = {n: Update(coarse(m), side={"size": m * size}) for n, m in matrices.items()}
        if "self_attn.q_proj" in updates:
            updates["self_attn.q_proj"].side = {}
        for name, update in updates.items():
            for key, tensor in update.side.items():
                seen[f"{hand.prefix}.{name}.{key}"] = tensor
        return updates

    note = {"note": "root mean square"}
    return Method(
        "noting", {}, [per_stage(update, Recorder)], side_file="sizes.safetensors", side_note=note
    )


def test_side_tensors_end_in_a_file_of_their_own(sources, tmp_path):
    source, out, seen = sources["llama"], tmp_path / "out", {}
    run(source, tmp_path / "straight", noting(seen))
    with safe_open(tmp_path / "straight" / "sizes.safetensors", framework="pt") as file:
        assert file.metadata() == {"note": "root mean square"}
        assert set(file.keys()) == set(seen) and len(seen) == 6 * families.LAYERS
        assert "model.layers.3.mlp.down_proj.size" in seen
        assert all(torch.equal(file.get_tensor(name), seen[name]) for name in seen)
    index = json.loads((tmp_path / "straight" / "model.safetensors.index.json").read_text())
    assert not set(seen) & set(index["weight_map"])
    with pytest.raises(Interrupted):
        run(source, out, noting({}, fail_at=3))
    with pytest.raises(UserError, match="another run"):
        run(source, out, packing())
    run(source, out, noting({}))
    assert driving.contents(out) == driving.contents(tmp_path / "straight")
    with pytest.raises(Interrupted):
        run(source, out, noting({}, fail_at=2), overwrite=True)
    run(source, out, packing(), overwrite=True, resume=False)
    assert not (out / "sizes.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "straight"}


@pytest.mark.parametrize("fault", ["empty", "cut", "zeros", "side gone", "state cut"])
def test_shards_that_are_not_whole_are_made_again(fault, sources, tmp_path, capsys):
    source, out, partial = sources["llama"], tmp_path / "out", tmp_path / "out.partial"
    run(source, tmp_path / "straight", noting({}))
    with pytest.raises(Interrupted):
        run(source, out, noting({}, fail_at=4))
    shard = sorted(partial.iterdir())[1]
    data = shard.read_bytes()
    if fault == "state cut":
        state = tmp_path / "out.partial.json"
        state.write_text(state.read_text()[:100])
        with pytest.raises(UserError, match="--no-resume"):
            run(source, out, noting({}))
        run(source, out, noting({}), resume=False)
    elif fault == "side gone":
        sorted((tmp_path / "out.side.partial").iterdir())[1].unlink()
        run(source, out, noting({}))
    else:
        half = len(data) // 2
        shard.write_bytes(
            {"empty": b"", "cut": data[:-1], "zeros": data[:half] + bytes(half)}[fault]
        )
        run(source, out, noting({}))
    told = "resuming: 1 of 5 blocks are done" in capsys.readouterr().err
    assert told == (fault != "state cut")
    assert driving.contents(out) == driving.contents(tmp_path / "straight")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "straight"}


def test_another_runs_blocks_are_not_taken(sources, tmp_path):
    source, out = sources["llama"], tmp_path / "out"
    interrupted(source, out, calibration=CALIBRATION)
    kept = driving.contents(tmp_path / "out.partial")
    with pytest.raises(UserError, match="settings, bits: 4 there, 3 now"):
        run(source, out, packing(bits=3), calibration=CALIBRATION)
    with pytest.raises(UserError, match="settings, seed: 0 there, 1 now"):
        run(source, out, packing(), calibration=CALIBRATION | {"seed": 1})
    with pytest.raises(UserError, match=r"another run \(calibration"):
        compress(
            Decoder(source), packing(), out, base="base", windows=families.windows(5, seed=1),
            calibration=CALIBRATION,
        )  # fmt: skip
    with pytest.raises(UserError, match="model, model"):
        families.save("llama", tmp_path / "other", seed=1)
        run(tmp_path / "other", out, packing(), calibration=CALIBRATION)
    assert driving.contents(tmp_path / "out.partial") == kept
    run(source, out, packing(bits=3), calibration=CALIBRATION, resume=False)
    assert not (tmp_path / "out.partial").exists()


def test_another_run_may_have_more_or_less_to_say(tmp_path):
    same = {"settings": {"bits": 2}, "clip": "abc"}
    runs.refuse_other_run(tmp_path, same, dict(same))
    for begun, now in ((same, {"settings": {"bits": 2}}), ({"settings": {"bits": 2}}, same)):
        with pytest.raises(UserError, match=r"another run \(clip\)"):
            runs.refuse_other_run(tmp_path, begun, now)


def test_a_change_anywhere_in_a_large_file_is_another_model(tmp_path):
    size = 2**24
    (tmp_path / "config.json").write_text("{}")
    tensors = {"x": torch.zeros(size, dtype=torch.uint8)}
    paths.save_tensors(tmp_path / "model.safetensors", tensors)
    before = hashes.model_files(tmp_path)
    assert before == hashes.model_files(tmp_path)
    tensors["x"][size // 3 : size // 3 + size // 256] += 1
    paths.save_tensors(tmp_path / "model.safetensors", tensors)
    changed = hashes.model_files(tmp_path)
    assert changed["config.json"] == before["config.json"]
    assert changed["model.safetensors"] != before["model.safetensors"]


def test_a_place_where_nothing_can_be_made_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file is a file, no folder; choose another --out"):
        runs.RunFolder(tmp_path / "file" / "new" / "out").check(overwrite=False)
    runs.RunFolder(tmp_path / "new" / "out").check(overwrite=False)


def test_what_a_kill_after_the_last_rename_leaves_is_swept(sources, tmp_path):
    source, out = sources["llama"], tmp_path / "out"
    run(source, out, noting({}))
    (tmp_path / "out.partial.json").write_text("{}")
    for name in ("out.side.partial", "out.partial.replaced"):
        (tmp_path / name).mkdir()
    with pytest.raises(Finished, match="out is finished already"):
        run(source, out, noting({}))
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_run_that_finished_no_block_leaves_nothing(sources, tmp_path):
    with pytest.raises(Interrupted):
        run(sources["llama"], tmp_path / "out", packing(fail_at=0))
    assert not list(tmp_path.iterdir())
    run(sources["llama"], tmp_path / "out", packing(bits=3))


def test_finished_results_are_replaced_only_when_told(sources, tmp_path):
    source, out = sources["llama"], tmp_path / "out"
    (tmp_path / "out.old").mkdir()  # a user's own copy, by a likely name
    (tmp_path / "out.old" / "mine").write_text("keep")
    run(source, out, packing())
    before = driving.contents(out)
    with pytest.raises(UserError, match=r"out exists; .*--overwrite"):
        run(source, out, packing(bits=3))
    with pytest.raises(Interrupted):
        run(source, out, packing(bits=3, fail_at=2), overwrite=True)
    assert driving.contents(out) == before  # until the new one is whole
    run(source, out, packing(bits=3), overwrite=True)
    assert driving.contents(out) != before
    assert (tmp_path / "out.old" / "mine").read_text() == "keep"
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.old"}


def test_folders_that_are_no_checkpoints_are_not_deleted(sources, tmp_path):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "one.jpg").write_text("")
    with pytest.raises(UserError, match="not a checkpoint folder"):
        run(sources["llama"], out, packing(), overwrite=True)
    assert [p.name for p in out.iterdir()] == ["one.jpg"]
    (out / "one.jpg").unlink()
    run(sources["llama"], out, packing(), overwrite=True)  # an empty folder is fine


@pytest.mark.parametrize("where", ["shard", "text", "side file"])
def test_a_full_disk_is_said_and_resumable(where, sources, tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    families.save("llama", source)
    families.save_tokenizer(source)
    full = OSError(errno.ENOSPC, "No space left on device")
    real = safetensors.torch.save_file

    def save_file(tensors, path, metadata):
        path.write_bytes(b"half")
        if "00004-of" in path.name:
            raise full
        real(tensors, path, metadata)

    def raises(*_):
        raise full

    patches = {
        "shard": ("safetensors.torch.save_file", save_file),
        "text": ("harness.paths.write_text", raises),
        "side file": ("shutil.copyfile", raises),
    }
    name, function = patches[where]
    with monkeypatch.context() as patch:
        patch.setattr(name, function)
        # The command line turns both into one line and exit code 2.
        with pytest.raises((UserError, OSError), match=r"disk is full|No space left"):
            run(source, out, packing())
    assert not out.exists() and not list(tmp_path.glob("**/*.tmp"))
    run(source, out, packing())
    run(source, tmp_path / "straight", packing())
    assert driving.contents(out) == driving.contents(tmp_path / "straight")


def test_what_a_pass_leaves_alone_is_said(tmp_path, capsys):
    families.save("mixtral", tmp_path / "source")
    same = lambda matrices, *_: {n: Update(m) for n, m in matrices.items()}  # noqa: E731
    run(tmp_path / "source", tmp_path / "out", Method("same", {}, [per_stage(same, Recorder)]))
    said = capsys.readouterr().err
    assert "left as they are, no linear layers: " in said
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj (86% of the blocks)" in said
    expected, source = logits(tmp_path / "out"), logits(tmp_path / "source")
    assert (expected - source).abs().max() < 1e-5


def test_what_lies_beside_the_weights(sources, tmp_path):
    source = tmp_path / "source"
    families.save("llama", source, tokenizer=True)
    method = Method("coarse", {"step": 16}, [per_stage(recording([], coarse), Recorder)])
    options = {"calibration": CALIBRATION}
    run(source, tmp_path / "one", method, command="first", **options)
    run(tmp_path / "one", tmp_path / "two", packing(), command="second", **options)
    two = tmp_path / "two"
    assert (two / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    steps = yaml.safe_load((two / "recipe.yaml").read_text())["steps"]
    assert [(s["method"], s["command"]) for s in steps] == [
        ("coarse", "first"), ("packing", "second")
    ]  # fmt: skip
    assert steps[0]["settings"] == {"step": 16} and steps[1]["calibration"]["seqlen"] == 24
    card = (two / "README.md").read_text()
    assert "second" in card and "5 windows of 24 tokens of `d`" in card
    log = json.loads((two / sequential.LOG).read_text())
    names = {n for n, _ in AutoModelForCausalLM.from_pretrained(source).named_modules()}
    assert len(log["layers"]) == 7 * families.LAYERS
    assert {row["name"] for row in log["layers"]} <= names
    index = json.loads((two / "model.safetensors.index.json").read_text())
    total = sum(paths.tensor_bytes(p) for p in two.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == total


def test_activations_that_overflow_are_refused(sources, tmp_path):
    huge = Method("huge", {}, [per_stage(recording([], lambda m: m * 1e30), Recorder)])
    with pytest.raises(UserError, match=r"block 0 gives NaN or infinite activations in .*float32"):
        run(sources["llama"], tmp_path / "out", huge)


def test_foreign_tokens_are_refused(sources, tmp_path):
    with pytest.raises(UserError, match="token 288, the model knows 288"):
        compress(Decoder(sources["llama"]), packing(), tmp_path / "out", base="b",
                 windows=torch.full((1, 8), families.VOCAB))  # fmt: skip
    assert not list(tmp_path.iterdir())


def killed_runs_equal_the_undisturbed_one(source, folder, times, seed, renames):
    words = [
        Path(driving.__file__).with_name("kill_driver.py"),
        source,
        folder,
        times,
        seed,
        *renames,
    ]
    driving.killed_runs_equal_the_straight_one(folder, 2 + times + len(renames), *words)


# 0 is the state file, 1 to 3 belong to the first block (state, side tensors, shard), 13 to 15 to
# the last, 22 is the side file, 23 the result's own, -1 after it.
def test_killed_passes_resume_to_the_same_bytes(sources, tmp_path):
    killed_runs_equal_the_undisturbed_one(sources["llama"], tmp_path, 3, 0, [0, 3, 9, 23, -1])


@pytest.mark.slow
def test_passes_killed_at_ten_moments_and_at_every_rename(sources, tmp_path):
    killed_runs_equal_the_undisturbed_one(sources["llama"], tmp_path, 10, 1, [*range(24), -1])


def test_shards_are_readable_as_the_umask_says(tmp_path):
    """A server under another user reads them; the library alone would make them 0600."""
    old = os.umask(0o022)
    try:
        paths.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
