"""SFT and distillation against loops written out in plain torch and transformers."""

import json
import math
import random
import shutil

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from harness import precision
from harness.data import example_sets
from harness.training import batching, engine, validation
from minillm import cache_teacher, packing
from minillm.finetune import main

QUICK = ["--max-length", "32", "--max-prompt-length", "24", "--lr", "0.003", "--dev-num", "8"]
QUICK += ["--weight-decay", "0.1"]
STEPS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    families.save("llama", folder / "llama", tokenizer=True)
    # Another number of examples at a time would drop others.
    kept = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    families.save("gpt2", folder / "gpt2", tokenizer=True, **kept)
    families.save("llama", folder / "teacher", tokenizer=True, seed=1, intermediate_size=80)
    draw = random.Random(0)
    words = families.TEXT.split()
    rows = [
        {"prompt": " ".join(draw.choices(words, k=draw.randint(1, 4))) + ":",
         "response": " " + " ".join(draw.choices(words, k=draw.randint(1, 5)))}
        for _ in range(60)
    ]  # fmt: skip
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run(place, out, *words, model="llama", code=0, steps=STEPS):
    words = [place / model, "--data", place / "set.jsonl", *QUICK, "--out", out, *words]
    assert main([*map(str, words), "--total-iters", str(steps)]) == code
    return out


def weights(folder):
    return load_file(folder / "model.safetensors")


def log(folder):
    return json.loads((folder / "compression_log.json").read_text())


def distance(start, one, two):
    """How far apart two state dicts are, against the way that training went. (Adam blows the last
    digit of a tiny gradient up to a whole step: single weights cannot be compared.)"""
    way, apart = (
        sum((a[name] - b[name]).double().square().sum() for name in start)
        for a, b in ((start, one), (one, two))
    )
    return (apart / way).sqrt().item()


def examples(place, split, folder):
    """Ids and first predicted position of the set's examples, through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for pair in example_sets.pairs(str(place / "set.jsonl"), split):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(pair["response"])["input_ids"], tokenizer.eos_token_id][:32]
        yield torch.tensor([ids]), len(prompt)


def losses_of(logits, ids, first):
    return F.cross_entropy(logits[0, first - 1 : -1], ids[0, first:], reduction="sum")


def plain_loop(place, family, teacher=None):
    """(weights, validation loss) after STEPS steps of 8 examples, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(place / family)
    rows = list(examples(place, "train", place / family))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.003)
    order = batching.order(len(rows), 0, 0)
    for step in range(STEPS):
        chosen = [rows[i] for i in order[8 * step : 8 * (step + 1)]]
        count = sum(ids.shape[1] - first for ids, first in chosen)
        for ids, first in chosen:
            logits = model(input_ids=ids).logits
            loss = losses_of(logits, ids, first)
            if teacher:
                with torch.no_grad():
                    p = teacher(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
                q = logits[0, first - 1 : -1].log_softmax(-1)
                loss = 0.5 * loss + 0.5 * (p.exp() * (p - q)).sum()
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-7 + (0.003 - 1e-7) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
    held = list(examples(place, "validation", place / family))
    with torch.no_grad():
        total = sum(losses_of(model(input_ids=ids).logits, ids, first) for ids, first in held)
    return model.state_dict(), total.item() / sum(ids.shape[1] - first for ids, first in held)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sft_is_the_plain_loop(place, tmp_path, family, capsys):
    expected, loss = plain_loop(place, family)
    out = run(place, tmp_path / "out", model=family)
    assert distance(weights(place / family), weights(out), expected) < 1e-3
    rows = log(out)["looks"]
    assert rows[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[0]["validation_loss"] > loss + 0.01
    table = capsys.readouterr().out
    assert f"| 3 * | {rows[-1]['training_loss']:.4f} | {loss:.4f} |" in table
    step = yaml.safe_load((out / "recipe.yaml").read_text())["steps"][-1]
    assert step["method"] == "sft" and step["settings"]["lr"] == 0.003
    assert "# " + family + ", tuned with sft" in (out / "README.md").read_text()
    assert list((out / "tensorboard").iterdir())
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)


def test_distillation_is_the_plain_loop(place, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(place / "teacher")
    expected, _ = plain_loop(place, "llama", teacher)
    out = run(place, tmp_path / "out", "--type", "kd", "--teacher", place / "teacher")
    assert distance(weights(place / "llama"), weights(out), expected) < 1e-3
    row = log(out)["looks"][-1]
    assert row["training_loss"] == pytest.approx((row["training_ce"] + row["training_kd"]) / 2)


def test_distillation_from_a_whole_cache_is_that_from_the_teacher(place, tmp_path):
    """All 288 log-probabilities of each label, in float16."""
    words = [
        "--data",
        place / "set.jsonl",
        *QUICK[:4],
        "--topk",
        288,
        "--out",
        tmp_path / "probs",
    ]
    assert cache_teacher.main([str(word) for word in [place / "teacher", *words]]) == 0
    kept = run(place, tmp_path / "kept", "--type", "kd", "--teacher-cache", tmp_path / "probs")
    live = run(place, tmp_path / "live", "--type", "kd", "--teacher", place / "teacher")
    assert distance(*map(weights, (place / "llama", live, kept))) < 0.02
    rows = [log(tmp_path / name)["looks"][-1] for name in ("live", "kept")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-3)


def test_accumulated_micro_batches_are_one_batch(place, tmp_path):
    one = run(place, tmp_path / "one", "--batch-size", 1, "--gradient-accumulation-steps", 8)
    eight = run(place, tmp_path / "eight", "--batch_size", 8)
    other = run(place, tmp_path / "other", "--seed", 1)
    start, one, eight, other = map(weights, (place / "llama", one, eight, other))
    assert distance(start, one, eight) < 1e-3 < 0.1 < distance(start, one, other)
    looks = [log(tmp_path / name)["looks"][-1] for name in ("one", "eight")]
    assert looks[0] == pytest.approx(looks[1], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "neox"])
def test_packed_examples_are_read_as_if_alone(family):
    model = families.build(family)
    assert packing.isolates(model)
    draw, rows = random.Random(0), []
    for length in (9, 5, 12, 3, 7, 8):
        ids = torch.tensor([draw.randrange(1, families.VOCAB) for _ in range(length)])
        rows.append((ids, draw.randrange(1, length)))
    packs = packing.pack([len(ids) for ids, _ in rows], 20, seed=0)
    packed = packing.collate([[rows[i] for i in pack] for pack in packs], 0)
    alone = batching.collate(rows, 0)
    assert packed["tokens"] == alone["tokens"] and packed["read"] == alone["read"] == 44
    assert packed["input_ids"].numel() < alone["input_ids"].numel()
    losses = []
    for batch in (packed, alone):
        logits = model(**validation.inputs_of(batch, "cpu")).logits
        every = F.cross_entropy(logits.mT, batch["labels"], reduction="none")
        losses.append(sorted(every[batch["labels"] != batching.IGNORED].tolist()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_packing_says_where_examples_see_each_other(place, tmp_path, family, capsys):
    model = families.save(family, tmp_path / family, tokenizer=True)
    assert not packing.isolates(model)
    run(place, tmp_path / "out", "--packing", model=tmp_path / family)
    assert "reads packed examples as one text" in capsys.readouterr().err


def test_packing_trains_as_well(place, tmp_path, capsys):
    """All examples in one batch: what is packed is what is not."""
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    pairs = example_sets.pairs(str(place / "set.jsonl"), "train")
    found = example_sets.examples(tokenizer, pairs, max_length=32, max_prompt_length=24, name="set")
    packs = len(packing.pack(found.lengths, 32, 0))
    alone = run(place, tmp_path / "alone", "--batch-size", len(found), steps=2)
    packed = run(place, tmp_path / "packed", "--packing", "--batch-size", packs, steps=2)
    assert packs < 0.7 * len(found) and "one text" not in capsys.readouterr().err
    assert distance(*map(weights, (place / "llama", alone, packed))) < 1e-3
    looks = zip(log(alone)["looks"], log(packed)["looks"], strict=True)
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in looks)


def test_the_best_by_rouge_is_written(place, tmp_path, monkeypatch):
    values = iter([1.0, 4.0, 2.0, 3.0])
    monkeypatch.setattr(validation, "rouge", lambda *a, **k: next(values))
    out = run(place, tmp_path / "out", "--eval-gen", "--eval-interval", 1)
    assert log(out)["written"] == {"step": 1}
    assert [row["rouge_l"] for row in log(out)["looks"]] == [1, 4, 2, 3]


def test_rouge_of_a_model_that_knows_the_answers(place, tmp_path):
    """Enough greedy steps on one example, and its response comes back: 100."""
    row = {"prompt": "add:", "response": " return left"}
    (tmp_path / "one.jsonl").write_text((json.dumps(row) + "\n") * 3)
    out = tmp_path / "out"
    words = ["--eval-gen", "--greedy", "--lr", "0.01", "--data", tmp_path / "one.jsonl"]
    run(place, out, *words, "--dev-data", tmp_path / "one.jsonl", steps=25)
    first, last = log(out)["looks"][0], log(out)["looks"][-1]
    assert first["rouge_l"] < 50 and max(r["rouge_l"] for r in log(out)["looks"]) == 100, last


def test_lora_trains_and_merges(place, tmp_path):
    out = run(place, tmp_path / "out", "--peft", "lora", "--peft-lora-dropout", 0.3)
    old, new = weights(place / "llama"), weights(out)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all("q_proj" in name or "v_proj" in name for name in moved)
    looks = log(out)["looks"]
    model = AutoModelForCausalLM.from_pretrained(out)
    held = list(examples(place, "validation", out))
    with torch.no_grad():
        total = sum(losses_of(model(input_ids=ids).logits, ids, first) for ids, first in held)
    count = sum(ids.shape[1] - first for ids, first in held)
    assert total.item() / count == pytest.approx(looks[-1]["validation_loss"], rel=1e-5)
    assert looks[-1]["validation_loss"] < looks[0]["validation_loss"]


@pytest.mark.parametrize("lora", [[], ["--peft", "lora"]], ids=["whole", "lora"])
def test_a_bfloat16_checkpoint_stays_one_and_a_run_keeps_its_dtype(
    place, tmp_path, monkeypatch, capsys, lora
):
    """On a CPU without units for bfloat16, then on one with."""
    families.save("llama", tmp_path / "short", tokenizer=True, dtype=torch.bfloat16)
    words = [*lora, "--save-interval", 1, "--eval-interval", 2]
    real = engine.train_step

    def stop(running, plan, step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return real(running, plan, step, *rest)

    monkeypatch.setattr(precision, "cpu_has_units", lambda dtype: False)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", stop)
        run(place, out, *words, model=tmp_path / "short", code=130)
    assert "computing in float32, as this CPU has no fast bfloat16" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(precision, "cpu_has_units", lambda dtype: True)
        run(place, out, *words, model=tmp_path / "short", code=2)
        error = capsys.readouterr().err.splitlines()[-1]
        assert "dtype: float32 there, bfloat16 now); add --dtype float32, choose" in error
    run(place, out, *words, model=tmp_path / "short")
    assert "resuming: 2 steps are done" in capsys.readouterr().err
    before, after = (weights(folder) for folder in (tmp_path / "short", out))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and ("model.embed_tokens.weight" in changed) == (not lora)
    assert log(out)["dtype"] == {"computed": "float32", "stored": "bfloat16"}


def test_across_tokenizers_with_uld(place, tmp_path, capsys):
    line = refused(place, tmp_path, capsys, "--type", "kd", "--teacher", "tiny-llama")
    assert "different tokenizers" in line and "--align uld" in line
    words = ["--type", "kd", "--teacher", "tiny-llama", "--align", "uld"]
    out = run(place, tmp_path / "out", *words)
    assert log(out)["looks"][-1]["training_uld"] > 0


def refused(place, tmp_path, capsys, *words):
    capsys.readouterr()
    run(place, tmp_path / "bad", *words, code=2)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1 and not (tmp_path / "bad").exists()
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--type", "kd"], "--type kd needs a teacher"),
        (["--teacher", "tiny-llama"], "--type sft has no teacher"),
        (["--type", "seqkd", "--teacher", "tiny-llama", "--packing"], "--packing is for"),
        (
            ["--type", "kd", "--teacher", "tiny-llama", "--align", "uld", "--loss", "jsd"],
            "leave --loss jsd out",
        ),
        (["--type", "seqkd", "--data", "dolly"], "python -m minillm.generate"),
        (["--select", "rouge"], "add --eval-gen"),
        (["--kd-ratio", "1.5"], "--kd-ratio 1.5: expected 0 to 1"),
        (["--max-length", "65"], "--max-length 65: expected 2 to 64 tokens"),
        (["--max-prompt-length", "32"], "--max-prompt-length 32: expected less than"),
        (["--max-prompt-length", "1"], "none is left"),
        (["--epochs", "0"], "--epochs 0.0: expected a number above 0"),
        (["--lr", "-1"], "learning rate -1"),
        (["--dtype", "float16"], "float16 trains on GPUs only"),
        (["--batch-size", "0"], "micro batch 0: at least 1"),
        (["--peft-path", "."], "holds no adapter_config.json"),
    ],
)
def test_settings_that_cannot_be(place, tmp_path, capsys, words, message):
    assert message in refused(place, tmp_path, capsys, *words)


def test_a_loss_that_is_no_number_leaves_its_batch(place, tmp_path, capsys):
    """A learning rate that breaks the model: whatever step it is that fails, its batch is there."""
    line = refused(place, tmp_path, capsys, "--lr", "1e30", "--warmup-iters", "0")
    assert "training diverged; lower the learning rate" in line
    saved = next(tmp_path.glob("bad.failed-step*.safetensors"))
    assert set(load_file(saved)) == {f"0.{n}" for n in ("input_ids", "attention_mask", "labels")}
    assert "error" in json.loads(saved.with_suffix(".json").read_text())


def test_the_published_rate_is_chosen_and_said(place, tmp_path, capsys):
    words = [place / "llama", "--data", place / "set.jsonl", "--out", tmp_path / "out", "--dry-run"]
    assert main(list(map(str, words))) == 0
    shown = capsys.readouterr()
    assert "135 steps of 8 examples, 20 epochs" in shown.err
    assert "learning rate 0.0005 (published nearest to" in shown.err
    words += [*QUICK[:4], "--preset", "gpt2-base", "--epochs", "1"]
    assert main(list(map(str, words))) == 0
    assert "2 steps of 32 examples" in capsys.readouterr().err  # 16 times 2, in one process
    assert "memory: about" in shown.out and not (tmp_path / "out").exists()


def test_settings_that_transformers_would_not_write_and_a_foreign_recipe(place, tmp_path):
    """Both are carried over, and a run of hours does not end on them."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(place / "llama", source)
    files = {
        "generation_config.json": '{"do_sample": false, "temperature": 0.9}', "NOTICE": "theirs",
        "preprocessor_config.json": "{}", "recipe.yaml": "default_stage: {}\n",
    }  # fmt: skip
    for name, text in files.items():
        (source / name).write_text(text)
    run(place, out, model=source, steps=1)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())["steps"]
    assert recipe[0] == {"method": "another tool's recipe", "recipe": files.pop("recipe.yaml")}
    assert len(recipe) == 2
    assert {name: (out / name).read_text() for name in files} == files
