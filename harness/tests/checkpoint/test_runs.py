"""Where results go: refused places, one run at a time, what is carried over from the source."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import families
from harness import paths
from harness.checkpoint import card, load, recipe, runs, side_files
from harness.checkpoint.save import save_model
from harness.errors import UserError

HOLD = """import sys
from pathlib import Path
from harness.checkpoint.runs import RunFolder
RunFolder(Path(sys.argv[1])).hold()
print("held", flush=True)
"""


def holder(out, then="input()"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def test_a_name_is_held_by_one_process_and_freed_by_a_kill(tmp_path):
    out = tmp_path / "new" / "folder" / "out"
    process = holder(out)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in (out, tmp_path / "link" / "folder" / "out"):  # the same place
        with pytest.raises(UserError, match="another run is writing"):
            runs.RunFolder(name).hold()
    other = runs.RunFolder(out.with_name("other"))
    other.hold()
    other.release()
    process.kill()
    process.wait()
    run = runs.RunFolder(out)
    run.hold()  # the file that was left behind stands in nobody's way
    run.hold()
    run.release()
    assert not list(out.parent.iterdir())


NOWHERE = [
    ".", "..", "/", "", "a/..", "n" * 250, "é" * 120, "n" * 300 + "/a", "loop", "loop/a",
    "dangling", "dangling/a", "file/a", "a" * 5000, "bad\udcff",
]  # fmt: skip


@pytest.mark.parametrize("name", NOWHERE, ids=range(len(NOWHERE)))
def test_places_where_nothing_can_be_made(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "file").touch()
    before = sorted(os.listdir())
    with pytest.raises(UserError) as caught:
        paths.check_place(Path(name))
    assert "\n" not in str(caught.value) and sorted(os.listdir()) == before


def test_a_result_is_not_made_of_the_model_itself(tmp_path):
    source = tmp_path / "runs" / "model"
    source.mkdir(parents=True)
    for folder in (source, source.parent):
        (folder / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    ends = {
        source: "is the model itself",
        tmp_path / "link": "is the model itself",
        source / "w4": "in the model's own folder",
        tmp_path / "link" / "a" / "w4": "in the model's own folder",
        source.parent: "the model .* is in",
    }
    for out, end in ends.items():
        with pytest.raises(UserError, match=end):
            runs.claim(out, source, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "to-other").symlink_to(other)
    with pytest.raises(UserError, match="a link to"):
        runs.claim(tmp_path / "to-other", source, overwrite=True)
    runs.claim(tmp_path / "out", source, overwrite=False, dry_run=True)
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "link", "other", "to-other"}


CARRIED = [
    "tokenizer.json", "tokenizer.model", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json", "LICENSE",
    "LICENSE.txt", "NOTICE", "USE_POLICY.md", "merges.txt", "vocab.json", "added_tokens.json",
    "special_tokens_map.json", "generation_config.json", "modeling_a.py", "qwen.tiktoken",
    "additional_chat_templates/tool_use.jinja",
]  # fmt: skip
LEFT = [
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "a.gguf", "README.md",
    "config.json", "recipe.yaml", "results.json", "quantize_config.json", ".gitattributes", "x.pth",
    "training_args.bin", "original/params.json", "tokenizer/vocab.txt", "train.jsonl",
    "additional_chat_templates/.hidden",
]  # fmt: skip


def test_side_files_are_carried_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in CARRIED + LEFT:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    side_files.copy(source, target)
    made = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert made == set(CARRIED)
    assert all((target / name).read_text() == name for name in CARRIED)
    assert side_files.nbytes(source) == sum(map(len, CARRIED))


@pytest.mark.parametrize("name", ["LICENSE", "recipe.yaml", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize("kind", ["fifo", "outside", "device"])
def test_side_files_that_are_none_are_refused_before_the_work(name, kind, tmp_path):
    source = tmp_path / "model"
    (source / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    path = source / name
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"outside": tmp_path / "secret", "device": "/dev/zero"}[kind])
    with pytest.raises(UserError, match=name):
        runs.claim(tmp_path / "out", source, overwrite=False)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "secret"}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FOREIGN = {
    "llm-compressor": b"default_stage:\n  default_modifiers:\n    QuantizationModifier: {}\n",
    "broken": b"steps: [\n",
    "not UTF-8": b"steps:\n- method: \xff\xfe\n",
    "list": b"- a\n- b\n",
    "no dict": b"steps: 3\n",
    "steps of texts": b"steps: [a, b]\n",
    "no method": b"steps:\n- settings: {}\n",
    "settings no dict": b"steps:\n- {method: a, settings: [1]}\n",
    "deep": b"steps: " + b"[" * 5000 + b"]" * 5000,
    "aliases": BOMB.encode() + b"steps: [{method: m, settings: {a: *i}}]\n",
    "aliases in steps": b"steps:\n- method: m\n  settings: &s {a: *s}\n",
    "date": b"steps:\n- {method: m, settings: {when: 2024-01-01}}\n",
    "number": b"steps:\n- {method: m, settings: {n: " + b"9" * 10_000 + b"}}\n",
    "tag": b"steps: !!python/object:os.system [ls]\n",
    "half": b'steps:\n- {method: "\\uD800"}\n',
    "long": b"# " + b"x" * 2**19 + b"\nsteps: []\n",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_recipes_of_others_are_kept_as_text(data, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(data)
    (tmp_path / "README.md").write_text("theirs")
    (step,) = recipe.steps(tmp_path)
    assert step["method"] == recipe.FOREIGN and not recipe.is_ours(tmp_path)
    ours = {"method": "gptq", "settings": {}, "command": "c"}
    text = card.recipe(tmp_path, ours)
    assert yaml.safe_load(text)["steps"] == [step, ours]
    json.dumps(step)
    if len(data) < 10**5 and b"\xff" not in data:
        assert step["recipe"] == data.decode()
    (tmp_path / "recipe.yaml").write_text(text)
    assert recipe.steps(tmp_path) == [step, ours] and recipe.is_ours(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\n \n", None])
def test_a_recipe_that_says_nothing_has_no_steps(data, tmp_path):
    if data is not None:
        (tmp_path / "recipe.yaml").write_bytes(data)
    assert recipe.steps(tmp_path) == []


@pytest.mark.filterwarnings("ignore")
def test_settings_that_transformers_would_not_write_are_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    families.save("llama", source, tokenizer=True, num_hidden_layers=1)
    refused = '{"do_sample": false,  "temperature": 0.9}'
    (source / "generation_config.json").write_text(refused)
    config = json.loads((source / "config.json").read_text()) | {"top_p": 0.5}
    (source / "config.json").write_text(json.dumps(config))
    step = {"method": "recover", "command": "c", "settings": {}}
    save_model(load.load_model(source), source, out, base="b", step=step)
    assert (out / "generation_config.json").read_text() == refused
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    load.load_model(out)
