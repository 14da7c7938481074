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
from harness.data import example_sets
from harness.errors import UserError
from harness.losses.nll import nll_sum
from harness.modules import block_linears, find_blocks
from harness.training import lora, validation
from sparse import recover_run
from sparse.recover import Settings, main

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
    held = example_sets.read(tokenizer, str(dataset), "validation", length=length, limit=count)
    return [held[i] for i in range(len(held))]


def recover(model, dataset, out, **options):
    return recover_run.run(
        Settings(model=str(model), dataset=str(dataset), out=str(out), **options)
    )


def before(result) -> float:
    return result["rows"][0]["validation_loss"]


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
    best = next(row for row in log["looks"] if row["step"] == log["written"]["step"])
    assert best["validation_loss"] == pytest.approx(after, abs=1e-5)
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


def test_lora_moves_its_targets_by_its_products_and_nothing_else():
    model = families.build("llama")
    old = {name: p.clone() for name, p in model.named_parameters()}
    names = list(block_linears(*find_blocks(model)))
    targets = lora.choose_targets(names, ["q_proj", "down_proj"])
    options = {"targets": targets, "r": 2, "alpha": 6, "dropout": 0.5, "seed": 0}
    adapted = lora.add(model, **options)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * families.LAYERS
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    merged = lora.merged(families.build("llama"), trained, torch.float32, **options)
    assert dict(merged.named_parameters()).keys() == old.keys()
    for name, new in merged.named_parameters():
        linear = name.removesuffix(".weight")
        expected = old[name].double()
        if linear in targets:
            a, b = (trained[f"base_model.model.{linear}.lora_{x}.default.weight"] for x in "AB")
            expected = expected + 3 * b.double() @ a.double()
        torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_micro_batch_changes_nothing(place, tmp_path):
    """Lengths differ, so a loss that were not weighted by tokens would tell; 7 is not a multiple of
    any of these."""
    losses = []
    for micro in (2, 3, 7):
        result = recover(
            place / "llama", place / "sums.jsonl", tmp_path / str(micro), tune="full",
            micro_batch_size=micro, batch_size=7, max_steps=4, learning_rate=0.01, cutoff_len=24,
            eval_steps=1,
        )  # fmt: skip
        losses.append([row["validation_loss"] for row in result["rows"]])
        losses[-1] += [row["training_loss"] for row in result["rows"][1:]]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0][4] < losses[0][0] - 0.1


def test_zeros_stay_or_are_filled_knowingly(place, tmp_path):
    model = families.build("llama")
    with torch.no_grad():
        for module in block_linears(*find_blocks(model)).values():
            module.weight[torch.rand_like(module.weight) < 0.5] = 0
    sparse = tmp_path / "sparse"
    model.save_pretrained(sparse)
    families.save_tokenizer(sparse)
    text, zeros = str(place / "text.txt"), {n: p == 0 for n, p in model.named_parameters()}
    with pytest.raises(
        UserError, match=r"is sparse \(\d+ of .*use --tune full: .*keeps them; or add --densify"
    ):
        recover(sparse, text, tmp_path / "no", **QUICK)
    assert not (tmp_path / "no").exists()
    recover(sparse, text, tmp_path / "kept", tune="full", **QUICK)
    recover(sparse, text, tmp_path / "filled", densify=True, **QUICK)
    kept, filled = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("kept", "filled")
    )
    linears = {f"{name}.weight" for name in block_linears(*find_blocks(model))}
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
    result = recover(cut, text, out, teacher=str(place / "llama"), **QUICK)
    old, new = (load.load_model(folder) for folder in (cut, out))
    shapes = {name: p.shape for name, p in old.named_parameters()}
    assert {name: p.shape for name, p in new.named_parameters()} == shapes
    assert len({p.shape for n, p in new.named_parameters() if "down_proj" in n}) == 2
    ids = torch.stack([ids for ids, _ in held_out(cut, text, 32, 32)]).long()
    with torch.no_grad():
        logits = new(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(result["best"], abs=1e-5) and result["best"] < before(result) - 0.1
    assert len(yaml.safe_load((out / "recipe.yaml").read_text())["steps"]) == 2
    assert "the harness only" in (out / "README.md").read_text()


def test_a_bitmask_checkpoint_comes_back_dense_with_its_zeros(place, tmp_path, capsys):
    from sparse import magnitude

    text, packed, out = str(place / "text.txt"), tmp_path / "packed", tmp_path / "out"
    words = [str(place / "llama"), "--sparsity", "0.5", "--format", "bitmask"]
    assert magnitude.main([*words, "--out", str(packed)]) == 0
    recover(packed, text, out, tune="full", **QUICK)
    assert "packed is stored as bitmask; the result is written dense" in capsys.readouterr().err
    old, new = load.load_model(packed), AutoModelForCausalLM.from_pretrained(out)
    for name in block_linears(*find_blocks(old)):
        one, other = (m.get_parameter(f"{name}.weight") for m in (old, new))
        assert torch.equal(one == 0, other == 0) and not torch.equal(one, other)


def test_a_teacher_pulls_towards_itself(place, tmp_path, monkeypatch):
    """Its weights are random, and only the last look is better than those before: what is written
    is what the pull alone made."""
    text, teacher = place / "text.txt", place / "teacher"
    held = held_out(place / "llama", text, 32, 8)
    p = AutoModelForCausalLM.from_pretrained(teacher).double()

    def distance(folder):
        ids = torch.stack([ids for ids, _ in held])
        with torch.no_grad():
            models = (p, AutoModelForCausalLM.from_pretrained(folder).double())
            log_p, log_q = (model(ids).logits.log_softmax(-1) for model in models)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()

    measure = validation.held_out_loss
    looks = []

    def falling(running, examples, **how):
        looks.append(measure(running, examples, **how))
        return 9.0 - len(looks)

    monkeypatch.setattr(validation, "held_out_loss", falling)
    options = QUICK | {"tune": "full", "kd_weight": 1.0, "max_steps": 20, "eval_steps": 20}
    recover(
        place / "llama", text, tmp_path / "out", teacher=str(teacher), val_set_size=8, **options
    )
    assert distance(tmp_path / "out") < 0.5 * distance(place / "llama")
    assert looks[0] == pytest.approx(plain_loss(teacher, held), rel=1e-5)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_float32_leaves_a_bfloat16_checkpoint_what_it_is(place, tmp_path, tune):
    """What is looked at is what will be stored."""
    source, out = tmp_path / "short", tmp_path / "out"
    families.save("llama", source, tokenizer=True, dtype=torch.bfloat16, num_hidden_layers=2)
    options = QUICK | {"tune": tune, "dtype": "float32"}
    result = recover(source, place / "text.txt", out, **options)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    if tune == "lora":
        assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    else:
        # Rounding moves the loss by 1e-4 or so; sums of equal numbers differ by 1e-9.
        best = min(row["validation_loss"] for row in result["rows"])
        assert result["best"] == pytest.approx(best, abs=1e-7)
    assert "| computed in | float32 |\n| stored in | bfloat16 |" in (out / "README.md").read_text()


def test_bfloat16_gives_an_ordinary_bfloat16_checkpoint(place, tmp_path):
    families.save("llama", tmp_path / "half", tokenizer=True, dtype=torch.bfloat16)
    text = str(place / "text.txt")
    result = recover(tmp_path / "half", text, tmp_path / "out", **QUICK)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert written.dtype == torch.bfloat16 and result["best"] < before(result) - 0.1
    held = held_out(tmp_path / "half", text, 32, 32)
    assert plain_loss(tmp_path / "out", held) == pytest.approx(result["best"], abs=0.02)


def test_checkpointed_activations_change_nothing(place, tmp_path):
    runs = [
        recover(
            place / "llama", place / "text.txt", tmp_path / f"{flag}", tune="lora",
            gradient_checkpointing=flag, lora_dropout=0.3, **QUICK,
        )
        for flag in (False, True)
    ]  # fmt: skip
    assert runs[0]["best"] == pytest.approx(runs[1]["best"], abs=1e-5)


def test_a_dry_run_says_what_is_needed_and_writes_nothing(place, tmp_path, capsys):
    words = [str(place / "llama"), "--dataset", str(place / "text.txt"), "--cutoff_len", "32"]
    assert main([*words, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    captured = capsys.readouterr()
    trained = sum(
        8 * (m.in_features + m.out_features)
        for m in block_linears(*find_blocks(families.build("llama"))).values()
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
