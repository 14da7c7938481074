"""A teacher's probabilities on disk: KD from them is KD in memory, but for the tail's part."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from harness.checkpoint import load
from harness.data import example_sets
from harness.errors import UserError
from harness.losses import from_hidden
from harness.losses.divergence import kl_rows
from harness.training import batching, cache_writer, teacher_cache
from minillm import finetune, models
from minillm.cache_teacher import main

TOP = 5


@pytest.fixture
def place(tmp_path, monkeypatch):
    families.save("llama", tmp_path / "teacher", tokenizer=True)
    families.save("llama", tmp_path / "student", tokenizer=True, seed=1)
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [
        {"prompt": families.TEXT[i : i + 5], "response": families.TEXT[2 * i : 3 * i + 4]}
        for i in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples():
    found = example_sets.pairs("pairs", "train")
    tokenizer = load.load_tokenizer("teacher")
    return example_sets.examples(
        tokenizer, found, max_length=32, max_prompt_length=16, name="pairs"
    )


def exact(p, q, top):
    """(what the cache's KL is to be, what KL in memory has besides), float64 [R]: sums over the
    tokens one by one."""
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(top).indices, True)
    logs = p.log_softmax(-1), q.log_softmax(-1)
    p, q = (log.exp() for log in logs)
    terms = p * (logs[0] - logs[1])
    tails = [torch.where(inside, 0, x).sum(-1) for x in (p, q)]
    kept = torch.where(inside, terms, 0).sum(-1)
    beside = torch.where(inside, 0, terms).sum(-1)
    if top == p.shape[-1]:
        return kept, beside
    whole = tails[0] * (tails[0] / tails[1]).log()
    return kept + whole, beside - whole


def pair(rows=40, vocabulary=23, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, vocabulary, generator=draw, dtype=torch.float64) * 2


@pytest.mark.parametrize("top", [1, TOP, 23])
def test_what_is_lost_is_the_tail_and_no_more(top):
    teacher, student = pair()
    kept, lost = exact(teacher, student, top)
    log_p = teacher.log_softmax(-1)
    tops, ids = log_p.topk(top)
    tail = log_p.scatter(1, ids, -1e4).logsumexp(-1)
    labels = torch.arange(len(student)) % 23
    found = teacher_cache.loss(kl_rows, 0.5, student, labels, ids, tops, tail)
    ce = -student.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
    torch.testing.assert_close(found[2], kept.sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], ce)
    torch.testing.assert_close(found[0], (found[1] + found[2]) / 2)
    full = kl_rows(log_p, student.log_softmax(-1))
    torch.testing.assert_close(kept + lost, full)
    # The bound: never negative, and at most the tail times the worst ratio in it.
    outside = torch.ones_like(log_p).scatter(1, ids, 0).bool()
    worst = (log_p - student.log_softmax(-1)).where(outside, torch.tensor(-torch.inf).double())
    shift = tail - student.log_softmax(-1).where(outside, -torch.inf).logsumexp(-1)
    assert (lost > -1e-12).all()
    if top < 23:
        assert (lost <= tail.exp() * (worst.amax(-1) - shift) + 1e-12).all() and lost.sum() > 0.1


def test_the_gradient_is_that_of_the_loss():
    teacher, student = pair(6, 9)
    top = teacher.log_softmax(-1).topk(3)
    tail = teacher.log_softmax(-1).scatter(1, top.indices, -1e4).logsumexp(-1)
    student.requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 8])

    def kd(logits):
        return teacher_cache.loss(kl_rows, 0.7, logits, labels, top.indices, top.values, tail)[0]

    assert torch.autograd.gradcheck(kd, student)


def test_float16_costs_what_is_said():
    teacher, student = (x.float() for x in pair(500, 300))
    stored = teacher_cache.compress(teacher, 40)
    assert {key: stored[key].dtype for key in teacher_cache.KEYS} == {
        "ids": torch.uint16, "log_probs": torch.float16, "log_tail": torch.float32,
    }  # fmt: skip
    assert sum(t.numel() * t.element_size() for t in stored.values()) == 500 * (4 * 40 + 4)
    assert (
        teacher_cache.bytes_per_label(40, 300) == 164
        and teacher_cache.bytes_per_label(64, 2**17) == 388
    )
    q = student.double().log_softmax(-1)
    log_p, log_q = teacher_cache.buckets(
        q, stored["ids"].long(), stored["log_probs"].double(), stored["log_tail"].double()
    )
    kept, _ = exact(teacher.double(), student.double(), 40)
    p = log_p.exp()
    rounding = 2**-10 * (p * log_p.abs() * ((log_p - log_q).abs() + 1)).sum(-1)
    assert ((kl_rows(log_p, log_q) - kept).abs() < rounding + 1e-6).all()


def test_kd_from_the_cache_is_kd_in_memory(place):
    assert main(["teacher", "--data", "pairs", "--topk", str(TOP), "--out", "cache",
                 "--max-length", "32", "--max-prompt-length", "16"]) == 0  # fmt: skip
    found = examples()
    cached = teacher_cache.Cache("cache", found, families.VOCAB)
    teacher, student = (load.load_model(name) for name in ("teacher", "student"))
    chosen = [7, 2, 11]
    batch = batching.collate([found[i] for i in chosen], 0)
    batch |= cached.rows(chosen)
    _, parts = teacher_cache.distillation(kl_rows, 0.5, cached.vocabulary, student, batch)
    mask = batch["labels"] != batching.IGNORED
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = [batch["labels"].clamp_min(0)]
    with torch.no_grad():
        memory = from_hidden.over_models(
            from_hidden.mix_rows, teacher, student, inputs, mask, labels
        )
        logits = [m(**inputs).logits[mask].double() for m in (teacher, student)]
    kept, lost = exact(*logits, TOP)
    torch.testing.assert_close(parts["ce"], memory[1])
    assert lost.sum() > 0
    assert parts["kd"] == pytest.approx(kept.sum().item(), rel=2e-3)
    assert parts["kd"] + lost.sum() == pytest.approx(memory[2].item(), rel=2e-3)


def test_a_killed_run_ends_with_the_same_bytes(place, monkeypatch, capsys):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 250)
    words = ["teacher", "--data", "pairs", "--topk", "3", "--batch-size", "2"]
    assert main([*words, "--out", "whole"]) == 0
    assert "16 bytes each" in capsys.readouterr().out
    real, calls = cache_writer.probabilities, []

    def stopping(*args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(cache_writer, "probabilities", stopping)
    assert main([*words, "--out", "again"]) == 130
    monkeypatch.setattr(cache_writer, "probabilities", real)
    (place / "again.partial/shard-00003.safetensors.tmp").write_text("half")
    assert main([*words, "--out", "again", "--topk", "4"]) == 2
    assert "top_k" in capsys.readouterr().err
    assert main([*words, "--out", "again"]) == 0
    assert "resuming: 2 of" in capsys.readouterr().err
    shards = sorted((place / "whole").glob("shard-*"))
    assert len(shards) > 3
    assert [p.name for p in sorted((place / "again").iterdir())] == [
        p.name for p in sorted((place / "whole").iterdir())
    ]
    for path in shards:
        assert path.read_bytes() == (place / "again" / path.name).read_bytes()
    assert not list(place.glob("*.partial*"))
    # Every example's own part, wherever it lies.
    found = examples_of("teacher")
    cached = teacher_cache.Cache("again", found, families.VOCAB)
    ids = torch.cat([load_file(path)["ids"] for path in shards]).long()
    assert torch.equal(cached.rows(list(range(12)))["teacher_ids"], ids)
    starts = cached.starts
    assert torch.equal(cached.rows([5])["teacher_ids"], ids[starts[5] : starts[6]])


@pytest.mark.parametrize(
    "module, name, deadly", [(os, "replace", "cache"), (shutil, "rmtree", "replaced")]
)
def test_a_killed_overwrite_is_mended_by_a_repeat(place, monkeypatch, module, name, deadly):
    words = ["teacher", "--data", "pairs", "--topk", "3", "--out", "cache"]
    assert main(words) == 0
    before = sorted(place.iterdir())
    real = getattr(module, name)

    def dying(path, *more, **how):
        if str((path, *more)[-1]).endswith(deadly) and (place / "cache.partial.replaced").exists():
            (place / "cache.partial.replaced/cache.json").unlink()  # as far as it came
            raise KeyboardInterrupt
        return real(path, *more, **how)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, dying)
        assert main([*words, "--overwrite"]) == 130
    assert main([*words, "--overwrite"]) == 0
    assert sorted(place.iterdir()) == before
    teacher_cache.Cache("cache", examples_of("teacher"), families.VOCAB)


def examples_of(model):
    context = load.load_config(load.resolve(model)).max_position_embeddings
    return example_sets.examples(
        load.load_tokenizer(model), example_sets.pairs("pairs", "train"), max_length=context,
        max_prompt_length=context // 2, name="pairs",
    )  # fmt: skip


def test_finetune_trains_from_the_cache_with_no_teacher(place, monkeypatch, capsys):
    words = ["student", "--data", "pairs", "--type", "kd", "--total-iters", "3", "--batch-size",
             "4", "--lr", "1e-3", "--max-length", "32", "--kd-ratio", "1"]  # fmt: skip
    everything = str(families.VOCAB)
    assert main(["teacher", "--student", "student", "--data", "pairs", "--topk", everything,
                 "--out", "cache", "--max-length", "32"]) == 0  # fmt: skip
    assert finetune.main([*words, "--teacher", "teacher", "--out", "memory"]) == 0
    monkeypatch.setattr(models, "load_teacher", None)
    assert finetune.main([*words, "--teacher-cache", "cache", "--out", "cached"]) == 0
    tables = [json.loads((place / name / "compression_log.json").read_text())["looks"]
              for name in ("memory", "cached")]  # fmt: skip
    for one, other in zip(*tables, strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    assert tables[0][0]["validation_loss"] != pytest.approx(tables[0][-1]["validation_loss"])
    assert (
        finetune.main([*words, "--teacher-cache", "cache", "--out", "x", "--train-num", "5"]) == 2
    )
    assert "was made for 12 other examples, and there are 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--train-num", "-3"], "--train-num -3: at least 1"),
        (["--topk", "0"], "--topk 0: expected 1 to"),
        (["--topk", "100000"], "the vocabulary"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--student", "tiny-llama"], "different tokenizers"),
        (["--out", "pairs", "--overwrite"], "is not a teacher's cache"),
    ],
)
def test_bad_input_is_one_clear_line(place, capsys, words, message):
    assert main(["teacher", "--data", "pairs", *words]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and shown[-1].startswith("error: ")


@pytest.mark.parametrize("top", ["3", str(families.VOCAB)])
def test_a_broken_teacher_is_refused_and_leaves_nothing(place, capsys, top):
    families.save("llama", place / "teacher", rms_norm_eps=float("nan"))
    assert main(["teacher", "--data", "pairs", "--topk", top, "--out", "cache"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: the teacher gives NaN or infinite logits in torch.float32" in line
    assert not list(place.glob("cache*"))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("cache.json", lambda path: path.write_text("{}"), r"cache\.json lacks content;"),
        ("shard-00001.safetensors", halve, "shard-00001.safetensors cannot be read"),
        ("shard-00001.safetensors", lambda path: path.unlink(), "shard-00001.*cannot be read"),
        (
            "shard-00001.safetensors",
            lambda path: save_file({k: t[1:] for k, t in load_file(path).items()}, path),
            "shard-00001.safetensors has not the .* labels of its examples",
        ),
    ],
)
def test_a_damaged_cache_is_one_clear_line(place, monkeypatch, file, damage, message):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 250)
    assert main(["teacher", "--data", "pairs", "--topk", "3", "--out", "cache"]) == 0
    made = examples_of("teacher")
    teacher_cache.Cache("cache", made, families.VOCAB)
    damage(place / "cache" / file)
    with pytest.raises(UserError, match=message) as caught:
        teacher_cache.Cache("cache", made, families.VOCAB)
    assert "make it again with cache_teacher --overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cache_of_another_place_is_refused(place, capsys):
    made = examples_of("teacher")
    with pytest.raises(UserError, match=r"holds no cache\.json"):
        teacher_cache.Cache("pairs", made, families.VOCAB)
    assert main(["teacher", "--data", "pairs", "--topk", "3", "--out", "cache"]) == 0
    with pytest.raises(UserError, match="the student has 100"):
        teacher_cache.Cache("cache", made, 100)
