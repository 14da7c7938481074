"""Quantization-aware training against a plain loop, and the file that is the model."""

import json
import re
from functools import partial

import pytest
import qat_place as qat
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from bitdistiller import autoclip, cache_teacher, result, student
from harness import paths
from harness.checkpoint import load
from harness.data import corpora, example_sets
from harness.metrics import perplexity
from harness.modules import block_linears, find_blocks
from harness.quant.grid import Grid
from harness.training import batching, engine, validation

GRID = Grid(2, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return qat.make(tmp_path_factory.mktemp("qat"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    qat.cache_beside(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def clipped(place):
    """The clipped model, float32, dense."""
    out = place / "clipped"
    words = [place / "model", place / "text.txt", "--w_bit", 2, "--q_group_size", 16, "--out", out]
    words += ["--n_samples", 8, "--seqlen", 16, "--format", "dense"]
    assert autoclip.main([str(word) for word in words]) == 0
    return out


def examples(place, split, whole=False):
    """Ids and first predicted position, through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    for pair in example_sets.pairs(str(place / "set.jsonl"), split):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(pair["response"])["input_ids"], tokenizer.eos_token_id][:32]
        yield torch.tensor([ids]), 1 if whole else len(prompt)


def cakld(teacher, model, ids, first, beta):
    with torch.no_grad():
        p = teacher(input_ids=ids).logits[0, first - 1 : -1].softmax(-1)
    q = model(input_ids=ids).logits[0, first - 1 : -1].softmax(-1)
    ratio = (p / q).log()
    return (beta * -q * ratio + (1 - beta) * p * ratio).sum()


def plain_loop(place, beta, per_example):
    """(quantized weights, training loss, validation loss) after STEPS steps of 8 examples."""
    teacher = AutoModelForCausalLM.from_pretrained(place / "model")
    model = student.build(AutoModelForCausalLM.from_pretrained(place / "model"), GRID)
    rows = list(examples(place, "train", per_example))
    some = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(some, lr=0.003, weight_decay=0)
    order = batching.order(len(rows), 42, 0)
    means = []
    for step in range(qat.STEPS):
        chosen = [rows[i] for i in order[8 * step : 8 * (step + 1)]]
        count = 8 if per_example else sum(ids.shape[1] - first for ids, first in chosen)
        total = sum(cakld(teacher, model, *row, beta) for row in chosen) / count
        total.backward()
        means.append(total.item())
        torch.nn.utils.clip_grad_norm_(some, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held = list(examples(place, "validation", per_example))
    with torch.no_grad():
        total = sum(cakld(teacher, model, *row, beta) for row in held).item()
    count = len(held) if per_example else sum(ids.shape[1] - first for ids, first in held)
    plain, *_ = result.finish(model)
    return plain.state_dict(), sum(means) / len(means), total / count


@pytest.mark.parametrize("words", [[], ["--original_loss", "True"]], ids=["ours", "original"])
def test_training_is_the_plain_loop(place, tmp_path, words, capsys):
    out = qat.run(place, tmp_path / "out", "--beta", "0.4", "--eval_steps", 3, *words)
    expected, trained_loss, held_loss = plain_loop(place, 0.4, bool(words))
    first, last = qat.looks(out)
    assert last["training_loss"] == pytest.approx(trained_loss, rel=1e-4)
    assert last["validation_loss"] == pytest.approx(held_loss, rel=1e-3)
    assert last["validation_loss"] < 0.97 * first["validation_loss"]
    found = qat.weights(out)
    same = [(found[name] - expected[name]).abs() < 1e-4 for name in found]
    assert sum(s.sum() for s in same) > 0.99 * sum(s.numel() for s in same)
    assert f"{last['validation_loss']:.4f}" in capsys.readouterr().out
    step = yaml.safe_load((out / "recipe.yaml").read_text())["steps"][-1]
    assert step["method"] == "bitdistiller" and step["settings"]["beta"] == 0.4


@pytest.mark.parametrize(
    ("model", "dtype", "words"),
    [
        ("model", "float32", ["--bits", 2]),
        ("model", "bfloat16", ["--quant_type", "int2-asym"]),
        ("bfloat16", "bfloat16", ["--quant_type", "nf3"]),
        ("bfloat16", "float32", ["--quant_type", "nf3"]),
        ("bfloat16", "float32", ["--bits", 2]),
        ("bfloat16", "bfloat16", ["--learn", "all"]),
        ("float16", "bfloat16", ["--learn", "all"]),
    ],
)
def test_what_was_evaluated_is_what_loads(place, tmp_path, monkeypatch, model, dtype, words):
    """Bit for bit, stored as the model was, whatever was computed in: logits, and the perplexity
    that the log has."""
    looked = []
    real = validation.perplexity

    def spy(running, windows):
        looked.append(running.module(windows[:2]).logits)
        return real(running, windows)

    monkeypatch.setattr(validation, "perplexity", spy)
    words = ["--ppl", place / "text.txt", "--ppl_limit", 4, "--eval_steps", 1, *words]
    out = qat.run(place, tmp_path / "out", "--dtype", dtype, *words, model=model)
    written = qat.log(out)["written"]["step"]
    assert written > 0
    stored, before = qat.weights(out), qat.weights(place / model)
    assert {t.dtype for t in stored.values()} == {t.dtype for t in before.values()}
    embedding = "model.embed_tokens.weight"
    assert torch.equal(stored[embedding], before[embedding])
    model = load.load_model(out, dtype=dtype)
    windows = corpora.evaluation(
        load.load_tokenizer(out), str(place / "text.txt"), seqlen=64, limit=4
    )
    with torch.no_grad():
        assert torch.equal(model(windows[:2]).logits, looked[written])
    value = qat.looks(out)[written]["perplexity"]
    assert perplexity.perplexity(model, windows).value == value
    found = result.Grids(out)
    assert found.kind == ("nf3" if "nf3" in words else "int")
    if found.kind == "int":
        assert found.grid == GRID and found.names == block_linears(*find_blocks(model)).keys()


def test_the_clipped_checkpoint_is_where_it_begins(place, clipped, tmp_path):
    words = ["--ppl", place / "text.txt", "--ppl_limit", 4]
    out = qat.run(place, tmp_path / "out", "--clip", clipped, *words, steps=1)
    model = load.load_model(clipped)
    tokenizer = load.load_tokenizer(clipped)
    windows = corpora.evaluation(tokenizer, str(place / "text.txt"), seqlen=64, limit=4)
    assert qat.looks(out)[0]["perplexity"] == perplexity.perplexity(model, windows).value
    plain = qat.run(place, tmp_path / "plain", *words, steps=1)
    assert qat.looks(plain)[0] != qat.looks(out)[0]


def test_scales_alone_go_on_from_a_result(place, tmp_path):
    words = ["--ppl", place / "text.txt", "--ppl_limit", 4]
    first = qat.run(place, tmp_path / "first", *words)
    second = qat.run(place, tmp_path / "second", "--start", first, "--kd_loss_type", "ce", *words)
    best = min(row["perplexity"] for row in qat.looks(first))
    assert qat.looks(second)[0]["perplexity"] == best
    (_, before), (_, after) = map(result.read, (first, second))
    assert all(torch.equal(before[name].codes, after[name].codes) for name in before)
    assert any(not torch.equal(before[name].scale, after[name].scale) for name in before)
    old, new = qat.weights(first), qat.weights(second)
    assert all(torch.equal(old[name], new[name]) for name in old if "norm" in name)


@pytest.mark.parametrize("flag", ["--clip", "--start", "--teacher_cache"])
def test_a_killed_run_is_not_gone_on_with_by_another(
    place, clipped, tmp_path, monkeypatch, capsys, flag
):
    """Whether the flag was there then, or is now."""
    words = [place / "model", "--data", place / "set.jsonl", "--out", tmp_path / "cache4"]
    words += ["--topk", 4, "--model_max_length", 32]
    assert cache_teacher.main([str(word) for word in words]) == 0
    result_of = qat.run(place, tmp_path / "first", steps=1)
    folders = {"--clip": clipped, "--start": result_of, "--teacher_cache": tmp_path / "cache4"}
    learn = ["--learn", "all" if flag == "--start" else "weights"]
    given = [*learn, flag, folders[flag]]
    real = engine.train_step

    def stop(running, plan, step, *rest):
        if step == 1:
            raise KeyboardInterrupt
        return real(running, plan, step, *rest)

    for name, before, now in (("with", given, learn), ("without", learn, given)):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(engine, "train_step", stop)
            qat.run(place, out, "--save_steps", 1, *before, code=130)
        capsys.readouterr()
        qat.run(place, out, "--save_steps", 1, *now, code=2)
        assert f"was begun by another run ({flag[2:]}" in capsys.readouterr().err


def test_accumulated_micro_batches_are_one_batch(place, tmp_path):
    one = qat.run(place, tmp_path / "one", "--per_device_train_batch_size", 2,
                  "--gradient_accumulation_steps", 4)  # fmt: skip
    four = qat.run(place, tmp_path / "four", "--gradient-checkpointing")
    other = qat.run(place, tmp_path / "other", "--seed", 1)
    assert qat.looks(one)[-1] == pytest.approx(qat.looks(four)[-1], rel=1e-4)
    assert qat.looks(one)[-1] != pytest.approx(qat.looks(other)[-1], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_gpu_names_the_knobs_and_a_smaller_batch_goes_on(
    place, tmp_path, monkeypatch, capsys, dtype
):
    """From the last saved state, to what the larger batch would have given."""
    words = ["--dtype", dtype, "--eval_steps", 2, "--beta", 0.5]
    whole = qat.run(place, tmp_path / "whole", *words, steps=4)
    real = engine.train_step

    def full(running, plan, step, *rest):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        return real(running, plan, step, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", full)
        qat.run(place, out, *words, steps=4, code=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: CUDA out of memory. Tried to allocate 2 GiB: fewer examples")
    for knob in ("per_device_train_batch_size", "gradient-checkpointing", "zero 3", "offload"):
        assert f"--{knob}" in line
    words += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
    qat.run(place, out, *words, "--gradient_checkpointing", "True", steps=4)
    assert "resuming: 2 steps are done" in capsys.readouterr().err
    close = 1e-4 if dtype == "float32" else 2e-2
    for row, expected in zip(qat.looks(out), qat.looks(whole), strict=True):
        assert row == pytest.approx(expected, rel=close)


def test_a_text_and_the_originals_rows(place, tmp_path, capsys):
    pairs = [json.loads(line) for line in (place / "set.jsonl").read_text().splitlines()]
    rows = "".join(json.dumps([[row["prompt"], row["response"]]]) + "\n" for row in pairs)
    (place / "rows.json").write_text(rows)
    ours = qat.run(place, tmp_path / "ours", steps=1)
    original = qat.run(place, tmp_path / "original", data="rows.json", steps=1)
    assert qat.looks(ours) == qat.looks(original)
    whole = qat.run(place, tmp_path / "whole", "--train_on_inputs", "--max_train_samples", 20,
                    "--max_eval_samples", 2, steps=1)  # fmt: skip
    assert "20 examples" in capsys.readouterr().err
    assert qat.looks(whole)[-1]["validation_loss"] != qat.looks(ours)[-1]["validation_loss"]
    text = qat.run(place, tmp_path / "text", data="text.txt", steps=1)
    said = capsys.readouterr().err
    assert "text.txt, train:" in said and "text.txt, validation: 1 windows of 32" in said
    assert qat.looks(text)[-1]["tokens"] == 8 * 32


def test_a_set_is_dealt_only_where_it_serves_for_both(place, tmp_path, capsys):
    rows = (place / "set.jsonl").read_text().splitlines()[:30]
    (place / "few.jsonl").write_text("\n".join(rows))
    (place / "one.jsonl").write_text(rows[0])
    both = ["--data", place / "one.jsonl", "--eval_data", place / "one.jsonl"]
    for words, trained, held in (
        ([], 54, 3),
        (["--eval_data", place / "few.jsonl"], 60, 30),
        (["--ppl", place / "text.txt", "--ppl_limit", 4], 60, None),
        (both, 1, 1),
    ):
        qat.run(place, tmp_path / "out", "--dry-run", *words)
        said = capsys.readouterr().err
        assert f"train: {trained} examples" in said
        assert f"validation: {held} examples" in said or held is None
    qat.run(place, tmp_path / "out", "--dry-run", "--eval_data", place / "text.txt")
    whole = capsys.readouterr().err
    qat.run(place, tmp_path / "out", "--dry-run", data="text.txt")
    counts = [
        int(re.search(rf"text.txt, {part}: (\d+) windows", said)[1])
        for part, said in zip(("whole", "train"), (whole, capsys.readouterr().err), strict=True)
    ]
    assert counts[0] == counts[1] + 1


def test_the_card_shows_what_counted(place, tmp_path):
    out = qat.run(place, tmp_path / "out", "--dtype", "bfloat16", "--beta", 0.5, steps=1)
    card = (out / "README.md").read_text()
    assert "| max_steps | 1 |" in card and "| dtype | bfloat16 |" in card
    for name in ("num_train_epochs", "bf16", "cakld_steps", "train_kd"):
        assert f"| {name} " not in card, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dry_run_tells_the_disk_that_the_run_takes(place, tmp_path, monkeypatch, capsys, dtype):
    words = ["--save_steps", 1, "--eval_steps", 1, "--train_kd", "False", "--dtype", dtype]
    run = partial(qat.run, place, tmp_path / "out", *words, model=load.ASSETS / "tiny-llama")
    run("--dry-run")
    told = float(re.search(r"while it runs ([\d.]+) MB", capsys.readouterr().out)[1])
    sizes = []
    real = paths.write_text

    def spy(path, text):
        found = (tmp_path / "out.partial").rglob("*")
        sizes.append(sum(p.stat().st_size for p in found if p.is_file()) / 1e6)
        real(path, text)

    monkeypatch.setattr(paths, "write_text", spy)
    run()
    assert 0.95 * told < max(sizes) < 1.05 * told


def test_cross_entropy_needs_no_teacher(place, tmp_path, monkeypatch):
    loaded = []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *a, **k: loaded.append(a) or real(*a, **k))
    out = qat.run(place, tmp_path / "out", "--train_kd", "False", "--eval_steps", 3)
    assert len(loaded) == 2  # the student, and the result
    rows = qat.looks(out)
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]


def test_a_cache_of_all_tokens_is_the_teacher(place, tmp_path, monkeypatch):
    words = [place / "model", "--data", place / "set.jsonl", "--topk", 288, "--out"]
    words += [tmp_path / "probs", "--model_max_length", 32]
    assert cache_teacher.main([str(word) for word in words]) == 0
    looked = ["--ppl", place / "text.txt", "--ppl_limit", 4]
    # The cache leaves out the rows held out; a run that looks elsewhere would train on them too.
    rows = example_sets.pairs(str(place / "set.jsonl"), "train")
    (place / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    live = qat.run(place, tmp_path / "live", *looked, data="part.jsonl")
    kept = qat.run(place, tmp_path / "kept", *looked, "--teacher-cache", tmp_path / "probs")
    assert qat.looks(kept)[-1] == pytest.approx(qat.looks(live)[-1], rel=1e-2)
    betas = [qat.log(out)["settings"]["beta"] for out in (live, kept)]
    assert betas[0] == pytest.approx(betas[1], rel=1e-3)
    held_out = qat.run(place, tmp_path / "held", "--teacher_cache", tmp_path / "probs", steps=1)
    assert qat.looks(held_out)[0]["validation_loss"] > 1  # cross entropy
    families.save("llama", place / "another", tokenizer=True, num_hidden_layers=2, seed=1)
    for more, model in (
        (["--max_train_samples", 9], "model"), (["--train_on_inputs"], "model"), ([], "another"),
    ):  # fmt: skip
        words = ["--teacher_cache", tmp_path / "probs", *more]
        qat.run(place, tmp_path / "x", *words, model=model, code=2)
