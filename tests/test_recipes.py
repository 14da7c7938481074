"""The shell recipes end to end, as a user types them, on tiny models and little text."""

import json

import pytest

import families

pytestmark = pytest.mark.slow
TEXT = families.TEXT * 60
DISTIL_FLAGS = (
    "--all '--max-length 32 --max-prompt-length 16 --total-iters 2 --batch-size 4' "
    "--minillm '--num-rollouts 8 --gradient-accumulation-steps 1' "
    "--evaluate '--max-length 32 --max-prompt-length 16 --seeds 10'"
)


@pytest.fixture
def inputs(tmp_path):
    """Random OPT and GPT-2 with a tokenizer, a text in two splits, two MMLU subjects."""
    for family in ("opt", "gpt2"):
        families.save(family, tmp_path / family, tokenizer=True)
    (tmp_path / "texts").mkdir()
    for split in ("train", "test"):
        (tmp_path / "texts" / f"{split}.txt").write_text(TEXT)
        (tmp_path / "mmlu" / split.replace("train", "dev")).mkdir(parents=True)
    for folder, questions in (("dev", 5), ("test", 3)):
        for subject in ("anatomy", "virology"):
            rows = "x + y?,left,right,None,number,B\n" * questions
            (tmp_path / "mmlu" / folder / f"{subject}_{folder}.csv").write_text(rows)
    (tmp_path / "pairs").mkdir()
    for split, count in (("train", 12), ("valid", 2), ("test", 2)):
        rows = [{"prompt": TEXT[i : i + 5], "response": TEXT[i : 2 * i + 4]} for i in range(count)]
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_la_framework_table(inputs, run_recipe):
    shown = run_recipe(
        "la_framework.sh",
        inputs / "opt",
        inputs / "gpt2",
        OUT=str(inputs / "out"),
        DATA=str(inputs / "texts"),
        TEXTS=str(inputs / "texts"),
        MMLU=str(inputs / "mmlu"),
        GPTQ_FLAGS="--nsamples 8 --seqlen 32 --device cpu",
        DISTIL=f"{inputs / 'opt'} {inputs / 'opt'}",
        INSTRUCTIONS=str(inputs / "pairs"),
        PLAIN=str(inputs / "texts"),
        DISTIL_FLAGS=DISTIL_FLAGS,
        EVAL_FLAGS="--limit 6 --device cpu",
    )
    measured = shown.partition("Measured here:")[2].partition("Published")[0]
    rows = {line.split("|")[1].strip(): line for line in measured.splitlines() if "|" in line}
    assert {"opt", "opt-w4", "gpt2", "gpt2-w4", "minillm"} <= rows.keys()
    assert "PPL texts" in rows["model"] and "MMLU" in rows["model"]
    assert all(" - " not in line for line in rows.values()), "a number is missing"
    for family in ("opt", "gpt2"):
        results = json.loads((inputs / f"out/{family}-w4/results.json").read_text())
        protocol = results["metrics"]["mmlu"]["rows"][0]["protocol"]
        assert "0-shot, llmcbench prompt" in protocol
        details = results["metrics"]["footprint"]["details"]
        assert 4 < details["bits_per_weight"] < 8  # 4 and one scale and zero per short row
        recipe = results["recipe"][0]
        assert recipe["settings"]["wbits"] == 4 and recipe["calibration"]["nsamples"] == 8
    assert "| opt-350m-to-opt-125m | 25.556 |" in shown


def test_quickstart(tmp_path, run_recipe):
    shown = run_recipe(
        "quickstart.sh",
        tmp_path / "out",
        MODEL="tiny-llama-student",
        BITS="3",
        NSAMPLES="8",
        LIMIT="8",
    )
    rows = [line for line in shown.rpartition("| model")[2].splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["tiny-llama-student", "rtn-w3", "gptq-w3"]
    dense, nearest, gptq = (float(row.split("|")[4].replace(",", "")) for row in rows)
    assert dense < gptq < nearest
    plot = tmp_path / "out/frontier.png"
    assert f"plot: {plot}" in shown and plot.stat().st_size > 5000
    table = tmp_path / "out/table.md"
    assert f"table: {table}" in shown and "bits/weight" in table.read_text()


def table(path) -> dict[str, dict[str, str]]:
    """Rows of a Markdown table by their first cell, cells by their column."""
    head, _, *lines = [line for line in path.read_text().splitlines() if "|" in line]
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {cells[0]: dict(zip(columns, cells, strict=True)) for cells in rows}


def number(row: dict[str, str], column: str) -> float:
    """The cell of the column that begins so."""
    return float(next(v for k, v in row.items() if k.startswith(column)).replace(",", ""))


def test_bitdistiller(tmp_path, run_recipe):
    """All steps on the small embedded model; a few steps of training already help."""
    settings = {
        "OUT": str(tmp_path), "COUNTS": "24,24", "EVAL_FLAGS": "--limit 8",
        "GENERATE_FLAGS": "--max_new_tokens 48 --batch_size 24",
        "TRAIN_FLAGS": "--learning_rate 1e-3 --model_max_length 64 --max_steps 12 --eval_steps 6 "
        "--per_device_train_batch_size 8 --train_on_inputs",
        "CLIP_FLAGS": "--n_samples 8 --seqlen 64", "GPTQ_FLAGS": "--nsamples 8",
    }  # fmt: skip
    run_recipe("bitdistiller.sh", "tiny-llama-student", **settings)
    rows = table(tmp_path / "table.md")
    assert list(rows) == ["tiny-llama-student", "rtn", "clipped", "gptq", "bitdistiller"]
    losses = {name: number(row, "PPL") for name, row in rows.items()}
    assert losses["tiny-llama-student"] < losses["bitdistiller"] < losses["clipped"] < losses["rtn"]
    for name in ("clipped", "gptq", "bitdistiller"):
        assert number(rows[name], "bits/weight") == number(rows["rtn"], "bits/weight") < 2.2
    assert all(number(row, "decode") > 0 for row in rows.values())
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_llm_compression(tmp_path, run_recipe):
    """One point of each kind, a recovery of seconds; its table, plots and demo."""
    settings = {
        "OUT": str(tmp_path), "RATIOS": "50", "BLOCK": "50", "CHANNEL": "25", "TWICE": "50-70",
        "HEALED": "block-50", "NF4": "block-50-recovered sparsegpt-50", "MINUTES": "0.2",
        "NSAMPLES": "8", "EVAL_FLAGS": "--limit 8",
    }  # fmt: skip
    shown = run_recipe("llm_compression.sh", "tiny-llama", **settings)
    rows = table(tmp_path / "table.md")
    assert rows.keys() == {
        "tiny-llama", "block-50", "channel-25", "sparsegpt-50", "twice-50-70",
        "block-50-recovered", "block-50-distilled", "tiny-llama-nf4-dq",
        "block-50-recovered-nf4-dq", "sparsegpt-50-nf4-dq",
    }  # fmt: skip

    def value(row, column):
        return number(rows[row], column)

    for column in ("parameters", "MMAC/token", "MB"):
        assert value("channel-25", column) < value("tiny-llama", column)
        assert value("block-50", column) < value("tiny-llama", column)
    assert value("tiny-llama", "PPL") < value("sparsegpt-50", "PPL") < value("twice-50-70", "PPL")
    assert value("sparsegpt-50", "zeros") == 50 and value("twice-50-70", "zeros") == 70
    assert value("sparsegpt-50-nf4-dq", "MB") < 0.5 * value("sparsegpt-50", "MB")
    for name in ("frontier.png", "ratio.png", "bubble.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert shown.count("tokens/s)") >= 4 * 2  # four models, asked twice at least
