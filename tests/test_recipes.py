"""The shell recipes end to end, as a user types them, on tiny models and little text."""

import json

import families
import pytest

pytestmark = pytest.mark.slow
TEXT = families.TEXT * 60


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
    return tmp_path


def test_la_framework_table(inputs, run_recipe):
    shown = run_recipe(
        "la_framework_quant.sh",
        inputs / "opt",
        inputs / "gpt2",
        OUT=str(inputs / "out"),
        DATA=str(inputs / "texts"),
        TEXTS=str(inputs / "texts"),
        MMLU=str(inputs / "mmlu"),
        GPTQ_FLAGS="--nsamples 8 --seqlen 32 --device cpu",
        EVAL_FLAGS="--limit 6 --device cpu",
    )
    measured = shown.partition("Measured here:")[2].partition("Published")[0]
    rows = {line.split("|")[1].strip(): line for line in measured.splitlines() if "|" in line}
    assert {"opt", "opt-w4", "gpt2", "gpt2-w4"} <= rows.keys()
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
    assert "| opt-125m-w4 | 27.346 |" in shown


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
