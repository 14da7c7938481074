"""Recovery against loops written out in plain torch and transformers."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from harness.checkpoint import load
from harness.data import training_data
from harness.errors import UserError
from harness.losses.nll import nll_sum
from sparse import losses, recover_run, training, tuning
from sparse.recover import main

QUICK = {"max_steps": 6, "cutoff_len": 32, "learning_rate": 0.01, "eval_steps": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recover")
    for family in ("llama", "gpt2"):
        families.save(family, folder / family, tokenizer=True)
    families.save("llama", folder / "teacher", tokenizer=True, seed=1, intermediate_size=80)
    (folder / "text.txt").write_text(families.TEXT * 200)
    rows = [
        {"prompt": f"{i} + {i % 7} =", "response": f" {i + i % 7}" * (i % 3)} for i in range(60)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def held_out(folder, dataset, length, count):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return training_data.load(tokenizer, str(dataset), seqlen=length, held_out=count)[1]


def plain_loss(folder, examples):
    """Nats per predicted token of a checkpoint, one example at a time, through transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = count = 0
    for ids, first in examples:
        with torch.no_grad():
            logits = model(ids[None].long()).logits[0]
        total += nll_sum(logits[first - 1 : -1], ids[first:].long())
        count += len(ids) - first
    return total / count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_result_is_an_ordinary_checkpoint_that_is_better(place, tmp_path, family, tune, capsys):
    out = tmp_path / "out"
    words = [place / family, "--dataset", place / "text.txt", "--tune", tune, "--out", out]
    words += ["--max_steps", 6, "--cutoff_len", 32, "--learning_rate", 0.01, "--val_set_size", 9]
    assert main([str(word) for word in words]) == 0
    held = held_out(place / family, place / "text.txt", 32, 9)
    before, after = (plain_loss(folder, held) for folder in (place / family, out))
    assert after < before - 0.1
    table = capsys.readouterr().out
    assert f"| before | {before:.4f} | {math.exp(before):.3f} |" in table
    assert f"| after (step 6) | {after:.4f} | {math.exp(after):.3f} |" in table
    log = json.loads((out / "compression_log.json").read_text())
    assert log["written"]["loss"] == pytest.approx(after, abs=1e-5)
    assert [row["step"] for row in log["looks"]] == [0, 1, 2, 3, 4, 5, 6]
    step = yaml.safe_load((out / "recipe.yaml").read_text())["steps"][-1]
    assert step["method"] == "recover" and step["settings"]["tune"] == tune
    card = (out / "README.md").read_text()
    assert f"# {family}, tuned with recover" in card and "examples of at most 32 tokens of" in card
    old, new = (json.loads((f / "config.json").read_text()) for f in (place / family, out))
    assert {k: v for k, v in new.items() if k != "dtype"} == {
        k: v for k, v in old.items() if k not in ("dtype", "torch_dtype")
    }
    assert not list(tmp_path.glob("*.partial*"))


def test_lora_moves_its_targets_by_its_products_and_nothing_else(place):
    model = families.build("llama")
    old = {name: p.clone() for name, p in model.named_parameters()}
    names = list(tuning.block_linears(model))
    targets = tuning.choose_targets(names, ["q_proj", "down_proj"])
    parameters = tuning.add_lora(model, targets, r=2, alpha=6, dropout=0.5, seed=0)
    assert len(parameters) == 2 * 2 * families.LAYERS
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter)
    factors = {name: p.detach().double() for name, p in parameters.items()}
    merged = tuning.finish(model, torch.float32)
    assert dict(merged.named_parameters()).keys() == old.keys()
    for name, new in merged.named_parameters():
        linear = name.removesuffix(".weight")
        expected = old[name].double()
        if linear in targets:
            a, b = (factors[f"{linear}.lora_{x}.default.weight"] for x in "AB")
            expected = expected + 3 * b @ a
        torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-6)


def test_losses_and_their_gradients(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 3 * 11)
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 7))
    targets = torch.where(torch.rand(2, 7) < 0.4, losses.IGNORED, ids.roll(-1, 1))
    logits = torch.randn(2, 7, 11, requires_grad=True)
    expected = torch.randn(2, 7, 11)

    def teacher(input_ids, use_cache):
        return type("", (), {"logits": expected})

    q, p = logits.double().log_softmax(-1), expected.double().log_softmax(-1)
    mask = (targets != losses.IGNORED).double()
    plain = F.nll_loss(q.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    kl = ((p.exp() * (p - q)).sum(-1) * mask).sum()
    mixed = losses.distillation(teacher, "forward_kl", 0.3, torch.float32)
    for function, oracle in ((losses.cross_entropy, plain), (mixed, 0.7 * plain + 0.3 * kl)):
        value = function(logits, ids, targets)
        torch.testing.assert_close(value.double(), oracle, rtol=1e-5, atol=1e-5)
        ours, theirs = (
            torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (value, oracle)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_the_micro_batch(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    data, _ = training_data.load(tokenizer, str(place / "sums.jsonl"), seqlen=24, held_out=4)
    batch = training.batch_of(data, 1, 8, 0)
    assert len({len(ids) for ids, _ in batch}) > 2  # lengths differ: token-weighted or not matters
    found = []
    for micro in (1, 3, 8):
        model = families.build("llama")
        value = training.gradients(model, batch, losses.cross_entropy, micro, torch.float32, 0)
        found.append((value, torch.cat([p.grad.flatten() for p in model.parameters()])))
    model = families.build("llama")
    rows = [(model(ids[None].long()).logits[0, f - 1 : -1], ids[f:].long()) for ids, f in batch]
    oracle = F.cross_entropy(torch.cat([r for r, _ in rows]), torch.cat([t for _, t in rows]))
    oracle.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for value, gradient in found:
        assert value == pytest.approx(oracle.item(), rel=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_every_example_is_seen_once_per_epoch():
    data = [(torch.full((5 + i % 3,), i), 1) for i in range(10)]
    steps = [training.batch_of(data, step, 4, seed=3) for step in range(6)]
    assert [len(batch) for batch in steps] == [4, 4, 2] * 2
    seen = [[int(ids[0]) for batch in steps[a : a + 3] for ids, _ in batch] for a in (0, 3)]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10)) and seen[0] != seen[1]


def test_the_learning_rate_rises_and_falls_as_the_usual_schedule():
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    usual = get_linear_schedule_with_warmup(optimizer, 10, 100)
    plan = training.Plan(100, 8, 4, 2.0, 10)
    for step in range(100):
        rate = plan.rate_at(step, plan.done(step, 0.0))
        # Ours spends no step at rate zero: it is the usual one, a step ahead while it rises.
        ahead = 0.2 if step < 10 else 0.0
        assert rate == pytest.approx(usual.get_last_lr()[0] + ahead)
        optimizer.step()
        usual.step()
    timed = training.Plan(10_000, 8, 4, 2.0, 100, minutes=1)
    rates = [timed.rate_at(3 * s, timed.done(3 * s, s)) for s in range(60)]
    assert max(rates) == pytest.approx(2.0, rel=0.02) and rates.index(max(rates)) == 6
    assert rates[59] < 0.05


class Memory:
    """Stands in for the files of a run."""

    def load(self, parameters, optimizer):
        return None

    def save(self, progress, parameters, optimizer):
        pass

    def keep_best(self, step, parameters):
        self.best = {name: p.detach().clone() for name, p in parameters.items()}


def test_the_best_look_is_kept_and_patience_ends_the_run():
    model = families.build("llama", num_hidden_layers=1)
    parameters = tuning.train_all(model)
    values = iter([5.0, 4.0, 3.0, 3.5, 3.2, 9.0, 9.0])
    after = []

    def look():
        after.append({name: p.detach().clone() for name, p in parameters.items()})
        return next(values)

    data = [(ids, 1) for ids in families.windows(8)]
    plan = training.Plan(50, 4, 4, 1e-3, 1, eval_steps=2, patience=3)
    store = Memory()
    arguments = (losses.cross_entropy, look, plan, torch.float32, store)
    progress = training.train(model, parameters, {}, data, *arguments)
    assert (progress.step, progress.best_step, progress.best_loss) == (10, 4, 3.0)
    assert all(torch.equal(store.best[name], after[2][name]) for name in parameters)
    assert not torch.equal(store.best["lm_head.weight"], after[3]["lm_head.weight"])


def test_zeros_stay_or_are_filled_knowingly(place, tmp_path):
    model = families.build("llama")
    with torch.no_grad():
        for module in tuning.block_linears(model).values():
            module.weight[torch.rand_like(module.weight) < 0.5] = 0
    sparse = tmp_path / "sparse"
    model.save_pretrained(sparse)
    families.save_tokenizer(sparse)
    text, zeros = str(place / "text.txt"), {n: p == 0 for n, p in model.named_parameters()}
    with pytest.raises(
        UserError, match=r"\(49\.\d% of .*--tune full, which keeps them, or --densify"
    ):
        recover_run.recover(str(sparse), text, out=tmp_path / "no", **QUICK)
    assert not (tmp_path / "no").exists()
    recover_run.recover(str(sparse), text, out=tmp_path / "kept", tune="full", **QUICK)
    recover_run.recover(str(sparse), text, out=tmp_path / "filled", densify=True, **QUICK)
    kept, filled = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("kept", "filled")
    )
    linears = {f"{name}.weight" for name in tuning.block_linears(model)}
    for name, new in kept.named_parameters():
        assert torch.equal(new == 0, zeros[name]), name
        assert not torch.equal(new, model.get_parameter(name)), name
    assert all((filled.get_parameter(name) != 0).float().mean() > 0.99 for name in linears)


def test_blocks_of_unequal_size_stay_so(place, tmp_path):
    from sparse import llm_pruner

    cut, out, text = tmp_path / "cut", tmp_path / "out", str(place / "text.txt")
    llm_pruner.prune(
        str(place / "llama"), text, out=cut, pruning_ratio=0.5, block_mlp_layer_start=1,
        block_mlp_layer_end=4,
        block_attention_layer_start=2, block_attention_layer_end=4, num_examples=2, max_seq_len=16,
    )  # fmt: skip
    result = recover_run.recover(str(cut), text, out=out, teacher=str(place / "llama"), **QUICK)
    old, new = (load.load_model(folder) for folder in (cut, out))
    shapes = {name: p.shape for name, p in old.named_parameters()}
    assert {name: p.shape for name, p in new.named_parameters()} == shapes
    assert len({p.shape for n, p in new.named_parameters() if "down_proj" in n}) == 2
    ids = torch.stack([ids for ids, _ in held_out(cut, text, 32, 32)]).long()
    with torch.no_grad():
        logits = new(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(result.after, abs=1e-5) and result.after < result.before - 0.1
    assert len(yaml.safe_load((out / "recipe.yaml").read_text())["steps"]) == 2
    assert "the harness only" in (out / "README.md").read_text()


def test_a_bitmask_checkpoint_comes_back_dense_with_its_zeros(place, tmp_path, capsys):
    from sparse import magnitude

    text, packed, out = str(place / "text.txt"), tmp_path / "packed", tmp_path / "out"
    words = [str(place / "llama"), "--sparsity", "0.5", "--format", "bitmask"]
    assert magnitude.main([*words, "--out", str(packed)]) == 0
    recover_run.recover(str(packed), text, out=out, tune="full", **QUICK)
    assert "packed is stored as bitmask; the result is written dense" in capsys.readouterr().err
    old, new = load.load_model(packed), AutoModelForCausalLM.from_pretrained(out)
    for name in tuning.block_linears(old):
        one, other = (m.get_parameter(f"{name}.weight") for m in (old, new))
        assert torch.equal(one == 0, other == 0) and not torch.equal(one, other)


def test_a_teacher_pulls_towards_itself(place, tmp_path):
    text = str(place / "text.txt")
    options = QUICK | {"tune": "full", "kd_weight": 1.0, "patience": 0, "max_steps": 20}
    random = tmp_path / "random.txt"  # on which the teacher knows nothing: only the pull is left
    random.write_text(families.TEXT[::-1] * 100)
    teacher = AutoModelForCausalLM.from_pretrained(place / "teacher").double()
    held = held_out(place / "llama", text, 32, 8)

    def distance(model):
        ids = torch.stack([ids for ids, _ in held]).long()
        p, q = (m.double()(ids).logits.log_softmax(-1) for m in (teacher, model))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    model = families.build("llama")
    before = distance(model)
    parameters = tuning.train_all(model.float())
    loss = losses.distillation(teacher.float(), "forward_kl", 1.0, torch.float32)
    teacher.requires_grad_(False)
    plan = training.Plan(20, 8, 8, 0.01, 2, eval_steps=20)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    data, _ = training_data.load(tokenizer, text, seqlen=32, held_out=8)
    arguments = (loss, lambda: 1.0, plan, torch.float32, Memory())
    training.train(model, parameters, {}, data, *arguments)
    assert distance(model.eval()) < 0.5 * before
    result = recover_run.recover(
        str(place / "llama"), text, out=tmp_path / "out", teacher=str(place / "teacher"), **options
    )
    assert result.teacher == pytest.approx(plain_loss(place / "teacher", held), rel=0.1)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_float32_leaves_a_bfloat16_checkpoint_what_it_is(place, tmp_path, tune):
    """What is looked at is what will be stored."""
    source, out = tmp_path / "short", tmp_path / "out"
    families.save("llama", source, tokenizer=True, dtype=torch.bfloat16, num_hidden_layers=2)
    options = QUICK | {"tune": tune, "dtype": "float32"}
    result = recover_run.recover(str(source), str(place / "text.txt"), out=out, **options)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    if tune == "lora":
        assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    else:
        # Rounding moves the loss by 1e-4 or so; sums of equal numbers differ by 1e-9.
        best = min(row["validation_loss"] for row in result.rows)
        assert result.after == pytest.approx(best, abs=1e-7)
    assert "| computed in | float32 |\n| stored in | bfloat16 |" in (out / "README.md").read_text()


def test_bfloat16_gives_an_ordinary_bfloat16_checkpoint(place, tmp_path):
    families.save("llama", tmp_path / "half", tokenizer=True, dtype=torch.bfloat16)
    text = str(place / "text.txt")
    result = recover_run.recover(str(tmp_path / "half"), text, out=tmp_path / "out", **QUICK)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert written.dtype == torch.bfloat16 and result.after < result.before - 0.1
    held = held_out(tmp_path / "half", text, 32, 32)
    assert plain_loss(tmp_path / "out", held) == pytest.approx(result.after, abs=0.02)


def test_checkpointed_activations_change_nothing(place, tmp_path):
    runs = [
        recover_run.recover(
            str(place / "llama"), str(place / "text.txt"), out=tmp_path / f"{flag}", tune="lora",
            gradient_checkpointing=flag, lora_dropout=0.3, **QUICK,
        )
        for flag in (False, True)
    ]  # fmt: skip
    assert runs[0].after == pytest.approx(runs[1].after, abs=1e-5)


def test_a_dry_run_says_what_is_needed_and_writes_nothing(place, tmp_path, capsys):
    words = [str(place / "llama"), "--dataset", str(place / "text.txt"), "--cutoff_len", "32"]
    assert main([*words, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    captured = capsys.readouterr()
    trained = sum(
        8 * (m.in_features + m.out_features)
        for m in tuning.block_linears(families.build("llama")).values()
    )
    assert f"recover (lora): {trained / 1e6:.2f} of" in captured.out
    assert "steps of 8" in captured.err and list(tmp_path.iterdir()) == []


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
    words = [source, "--dataset", place / "text.txt", "--max_steps", 1, "--cutoff_len", 32]
    assert main([str(word) for word in [*words, "--out", out]]) == 0
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())["steps"]
    assert recipe[0] == {"method": "another tool's recipe", "recipe": files.pop("recipe.yaml")}
    assert len(recipe) == 2
    assert {name: (out / name).read_text() for name in files} == files
