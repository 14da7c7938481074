"""MiniLLM's trainer: phases, the loss of a step against whole logits in float64, and whole runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from harness.checkpoint.load import load_tokenizer
from harness.data import example_sets
from harness.errors import UserError
from harness.training.engine import Training
from minillm import on_policy, rollouts, sampling, train_minillm

DRIVER = Path(__file__).with_name("minillm_driver.py")
NEW, COLUMNS = 12, 20
SIZES = {"hidden_size": 16, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a student, and 24 training and some validation prompts."""
    place = tmp_path_factory.mktemp("minillm")
    for seed, name in enumerate(("teacher", "student")):
        families.save("llama", place / name, tokenizer=True, seed=seed, **SIZES)
    (place / "data").mkdir()
    for split, count in (("train", 24), ("validation", 8)):
        rows = [
            {"prompt": f"for n in range({n}):\n"[: 8 + n % 9], "response": f"print({n})"}
            for n in range(count)
        ]
        text = "\n".join(map(json.dumps, rows))
        (place / "data" / f"{split}.jsonl").write_text(text)
    return place


def arguments(folder, out, *more):
    return [
        str(folder / "student"), "--teacher", str(folder / "teacher"), "--data",
        str(folder / "data"), "--lm-data", str(folder / "text.txt"), "--max-length", "32",
        "--max-prompt-length", "20", "--num-rollouts", "8", "--ppo-epochs", "2", "--batch-size",
        "2", "--gradient-accumulation-steps", "2", "--lr", "5e-3", "--warmup-iters", "2",
        "--total-iters", "12", "--eval-interval", "5", "--save-interval", "3", "--out", str(out),
        *more,
    ]  # fmt: skip


def launch(folder, out, kill=-1, *more, ranks=1):
    (folder / "text.txt").write_text(families.TEXT * 40)
    result = out.with_suffix(".json")
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [*start, str(DRIVER), str(result), str(kill), *arguments(folder, out, *more)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done, json.loads(result.read_text()) if result.is_file() else None


def test_a_phase_goes_through_its_rollouts_once_an_epoch():
    plan = rollouts.Plan(rollouts=12, batch=4, epochs=2)
    assert plan.steps == 6 and [s for s in range(14) if plan.starts_phase(s)] == [0, 6, 12]
    for first in (0, 3, 6):
        seen = [i for step in range(first, first + 3) for i in plan.chosen(step, seed=0)]
        assert sorted(seen) == list(range(12))
    assert plan.chosen(0, 0) != plan.chosen(3, 0) != plan.chosen(6, 0)
    # Epochs over 30 prompts follow each other without a gap.
    shown = [i for phase in range(5) for i in plan.prompts(30, phase, seed=0)]
    assert sorted(shown[:30]) == sorted(shown[30:]) == list(range(30))
    with pytest.raises(UserError, match="multiple of the 5"):
        rollouts.Plan(rollouts=12, batch=5, epochs=2)


@pytest.fixture(autouse=True)
def own_cache(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "hf")


@pytest.fixture
def learner(folder):
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / name).eval()
        for name in ("teacher", "student")
    )
    tokenizer = load_tokenizer(folder / "student")
    found = [
        example_sets.examples(
            tokenizer, example_sets.pairs(str(folder / "data"), split), max_length=32,
            max_prompt_length=20, name=split,
        )
        for split in ("train", "validation")
    ]  # fmt: skip
    text = [(families.windows(1, 20)[0] % COLUMNS, 1)] * 9

    class Windows(list):
        lengths = (20,) * 9

    return on_policy.OnPolicy(
        student, teacher, COLUMNS, True, tokenizer, 0, *found, Windows(text),
        rollouts.Objective(), rollouts.Plan(8, 4, 2), Training(1e-3, 12, 2, 2), NEW, chunk=3,
        lm_coef=0.7, look_chunk=3,
    )  # fmt: skip


def test_the_loss_of_a_step_is_the_papers_on_whole_logits(learner):
    """From the phase's rollouts, one by one, in float64: sampled part, single step and text."""
    student, teacher = learner.student, learner.teacher
    first = learner.batches(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batches = learner.batches(1)
    found = sum(learner.loss_of(student, batch)[0].item() for batch in batches)
    tokens = sum(batch["tokens"] for batch in batches)
    assert tokens == batches[0]["step_tokens"] != first[0]["step_tokens"]
    assert learner.phase.mask.sum(1).unique().numel() > 2

    def logs(model, ids):
        return model(ids[None]).logits[0, :, :COLUMNS].double().log_softmax(-1)

    phase, sampled, single = learner.phase, 0.0, 0.0
    scores = []
    for i in range(8):
        reward = phase.reward[i][phase.mask[i]].double()
        long = len(reward)
        scores += [
            sum(0.95 ** (k - t) * reward[k] for k in range(t, long)) / (long - t)
            for t in range(long)
        ]
    mean, deviation = torch.stack(scores).mean(), torch.stack(scores).std(correction=0)
    with torch.no_grad():
        for i in learner.plan.chosen(1, 0):
            prompt, answer = phase.prompts[i], phase.responses[i][phase.mask[i]]
            p, q = (logs(m, torch.cat([prompt, answer])) for m in (teacher, student))
            p, q = p[len(prompt) - 1 : -1], q[len(prompt) - 1 : -1]
            before = sum(int(phase.mask[j].sum()) for j in range(i))
            for t, token in enumerate(answer):
                advantage = (scores[before + t] - mean) / deviation
                ratio = (q[t, token] - phase.logp[i, t]).exp() * phase.weight[i, t]
                cut = ratio.clamp(0.8, 1.2)
                sampled += max(-advantage * ratio, -advantage * cut).item()
                single += (q[t].exp() * (q[t] - p[t])).sum().item()
        ids = learner.text[0][0]
        p, q = logs(teacher, ids)[:-1], logs(student, ids)[:-1]
        hard = -q.gather(-1, ids[1:, None])[:, 0]
        text = (0.5 * hard + 0.5 * (p.exp() * (p - q)).sum(-1)).mean().item()
    expected = sampled + single + learner.lm_coef * text * tokens
    assert found == pytest.approx(expected, rel=1e-4)


def test_rollouts_are_rated_as_they_were_written(learner):
    """logp and weight are those of a whole forward over prompt and response; rewards are theirs."""
    learner.batches(0)
    phase = learner.phase
    for i in range(8):
        answer = phase.responses[i][phase.mask[i]]
        ids = torch.cat([phase.prompts[i], answer])
        at = slice(len(phase.prompts[i]) - 1, len(ids) - 1)
        with torch.no_grad():
            q, p = (
                m(ids[None]).logits[0, at, :COLUMNS].softmax(-1)[range(len(answer)), answer]
                for m in (learner.student, learner.teacher)
            )
        inside = phase.mask[i]
        torch.testing.assert_close(phase.logp[i][inside].exp(), q, rtol=1e-4, atol=1e-6)
        weight = q / (0.8 * q + 0.2 * p)
        torch.testing.assert_close(phase.weight[i][inside], weight, rtol=1e-4, atol=1e-5)
        reward = (p.log() - q.log()) / 0.5
        torch.testing.assert_close(phase.reward[i][inside], reward, rtol=1e-4, atol=1e-3)
    assert phase.reward[~phase.mask].eq(0).all()


def test_a_look_measures_the_students_own_responses(learner):
    found = learner.evaluate(engine_of(learner.student), 0)
    draws = sampling.uniforms(8, NEW, on_policy.EVALUATION_SEED)
    total = count = 0
    for i in range(8):
        ids, first = learner.held_out[i]
        made = sampling.sample(
            learner.student, None, ids[None, :first], torch.ones(1, first).long(), draws[i : i + 1],
            alpha=0.0, ends=[0], pad=0, vocabulary=COLUMNS,
        )  # fmt: skip
        both = torch.cat([ids[:first], made.responses[0]])
        with torch.no_grad():
            p, q = (
                m(both[None]).logits[0, first - 1 : -1, :COLUMNS].double().log_softmax(-1)
                for m in (learner.teacher, learner.student)
            )
        total += (q.exp() * (q - p)).sum().item()
        count += made.responses.shape[1]
    assert found["reverse_kl"] == found["value"] == pytest.approx(total / count, rel=1e-4)
    assert found["length"] == count / 8 and 0 <= found["rouge_l"] <= 100


class engine_of:
    """A model that answers as DeepSpeed's engine does, where no weights are shared out."""

    def __init__(self, module):
        self.module, self.device = module, module.device

    def zero_optimization_stage(self):
        return 0


@pytest.fixture(scope="module")
def straight(folder):
    done, result = launch(folder, folder / "straight")
    assert done.returncode == 0, done.stderr
    return done, result


def test_training_lowers_the_reverse_kl_and_writes_the_best(folder, straight):
    _, result = straight
    looks = [row["reverse_kl"] for row in result["rows"]]
    assert [row["step"] for row in result["rows"]] == [0, 5, 10, 12]
    assert result["best"] == min(looks) < 0.9 * looks[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "straight")
    assert all(p.isfinite().all() for p in model.parameters())
    assert "minillm" in (folder / "straight" / "recipe.yaml").read_text()


def test_a_killed_run_goes_on_as_if_nothing_had_been(folder, straight):
    """States are saved where a phase is over, after steps 4 and 8; killed before step 10."""
    out = folder / "killed"
    done, result = launch(folder, out, 10)
    assert done.returncode == -9 and result is None and not out.exists()
    done, result = launch(folder, out)
    assert done.returncode == 0, done.stderr
    assert "resuming: 8 steps are done" in done.stderr
    for ours, theirs in zip(result["rows"], straight[1]["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    left, right = (AutoModelForCausalLM.from_pretrained(folder / n) for n in ("killed", "straight"))
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_equal_one_with_twice_the_accumulation(folder, straight, zero):
    out = folder / f"two-{zero}"
    more = ["--gradient-accumulation-steps", "1", "--zero", str(zero)]
    done, result = launch(folder, out, -1, *more, ranks=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(result["rows"], straight[1]["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_lora_checkpointing_and_ablations_run(folder):
    more = ["--peft", "lora", "--gradient-checkpointing", "--teacher-mixed-alpha", "0",
            "--no-length-norm", "--no-single-step-reg", "--lm-coef", "0", "--select",
            "rouge"]  # fmt: skip
    done, result = launch(folder, folder / "lora", -1, *more)
    assert done.returncode == 0, done.stderr
    assert result["best"] == max(row["rouge_l"] for row in result["rows"])
    AutoModelForCausalLM.from_pretrained(folder / "lora")


def test_in_train_mode_nothing_is_dropped():
    ids = families.windows(1, 12)
    for family in ("gpt2", "opt", "falcon"):
        model = families.build(family)
        expected = model(ids).logits
        assert not torch.equal(model.train()(ids).logits, expected) or family == "falcon"
        on_policy.without_dropout(model)
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher-mixed-alpha", "1"], "--teacher-mixed-alpha 1.0"),
        (["--num-rollouts", "9"], "multiple of the 4"),
        (["--ppo-epochs", "0"], "--ppo-epochs 0"),
        (["--reward-scaling", "0"], "--reward-scaling 0.0"),
        (["--max-length", "100"], "--max-length 100"),
    ],
)
def test_bad_flags_are_one_line(folder, flags, message, capsys):
    code = train_minillm.main(arguments(folder, folder / "never", *flags))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 2 and len(error) == 1 and message in error[0]
