"""Rouge-L of sampled responses: by the original's protocol, five seeds, several references."""

import json
import statistics

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

import families
from harness.checkpoint import load
from harness.generation import responses
from minillm import eval_sets
from minillm.evaluate import main, parser

FLAGS = ["--max-length", "40", "--max-prompt-length", "20", "--batch-size", "4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    families.save("llama", tmp_path / "model", tokenizer=True)
    rows = [
        {"prompt": families.TEXT[i : i + 5 + i], "output": [families.TEXT[i:], "the end of it"]}
        for i in range(6)
    ]
    rows.append({"prompt": families.TEXT * 9, "output": "its prompt is too long"})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(path="results/model.json"):
    with open(path) as file:
        return json.load(file)["metrics"]["rouge-l test.jsonl"]


def test_defaults_are_the_originals():
    args = parser().parse_args(["m", "--data", "dolly,vicuna"])
    assert args.seeds == [10, 20, 30, 40, 50] and args.no_repeat_ngram_size == 6
    assert (args.temperature, args.top_p, args.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize("size", [6, 2])
def test_greedy_scores_are_those_of_a_plain_loop(place, size):
    asked = [pair for pair in eval_sets.load("stdlib-doc") if len(pair[0]) < 110][:5]
    asked = [(prompt, [*some, "Return the value."]) for prompt, some in asked]
    rows = [{"prompt": prompt, "output": some} for prompt, some in asked]
    rows.append({"prompt": families.TEXT * 99, "output": "its prompt is too long"})
    (place / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["tiny-llama-student", "--data", "test.jsonl", "--dtype", "float32", "--seeds", "1"]
    words += ["--max-length", "84", "--max-prompt-length", "60", "--temperature", "0"]
    assert main([*words, "--no-repeat-ngram-size", str(size)]) == 0
    found = measured("results/tiny-llama-student.json")
    assert found["details"]["prompts"] == 5 and found["details"]["left_out"] == 1
    model = load.load_model("tiny-llama-student", dtype="float32")
    tokenizer = load.load_tokenizer("tiny-llama-student")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    total = 0.0
    for prompt, references in asked:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        said = model.generate(
            ids, max_new_tokens=24, do_sample=False, no_repeat_ngram_size=size, pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
        )[0, ids.shape[1] :]  # fmt: skip
        text = tokenizer.decode(said, skip_special_tokens=True)
        total += max(scorer.score(r, text)["rougeL"].fmeasure for r in references)
    assert found["rows"][0]["value"] == pytest.approx(100 * total / 5)
    assert total > 0


def test_seeds_have_a_mean_a_deviation_and_are_measured_once(place, capsys, monkeypatch):
    words = ["model", "--data", "test.jsonl", *FLAGS]
    assert main([*words, "--seeds", "10", "20"]) == 0
    two = measured()["details"]["seeds"]
    capsys.readouterr()
    # Killed in the fourth: what was known stays.
    real, calls = responses.transformers_engine, []

    def stopping(*args):
        ask = real(*args)

        def at_most(*more):
            calls.append(more)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return ask(*more)

        return at_most

    monkeypatch.setattr(responses, "transformers_engine", stopping)
    assert main(words) == 130
    assert [len(calls), len(measured()["details"]["seeds"])] == [4, 3]
    monkeypatch.setattr(responses, "transformers_engine", real)
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.err.count("measured before, kept") == 5
    found = measured()
    values = list(found["details"]["seeds"].values())
    assert len(values) == 5 and len(set(values)) > 1 and values[:2] == list(two.values())
    assert [row["value"] for row in found["rows"]] == [
        statistics.fmean(values), statistics.stdev(values),
    ]  # fmt: skip
    assert found["rows"][0]["samples"] == "6 prompts x 5 seeds"
    assert f"{statistics.fmean(values):.2f}" in shown.out
    # Nothing is left to do, and nothing is loaded.
    monkeypatch.setattr(responses, "open_engine", None)
    assert main(words) == 0
    assert measured()["details"] == found["details"]


def test_sets_and_their_references(place, capsys):
    rows = eval_sets.load("test.jsonl")
    assert len(rows) == 7 and len(rows[0][1]) == 2 and rows[6][1] == ["its prompt is too long"]
    (place / "all.jsonl").write_text((place / "test.jsonl").read_text())
    assert len(eval_sets.load("all.jsonl")) == 1
    assert "its test part" in capsys.readouterr().err
    assert len(eval_sets.load("stdlib-doc")) > 100


def test_published_sets_are_read_as_their_files_are(place, monkeypatch):
    import huggingface_hub

    row = {"instruction": "i", "prompt": "one<n>two", "input": "", "output": ["a", "b"]}
    (place / "valid.jsonl").write_text(json.dumps(row))
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(place / "valid.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert eval_sets.load("S-NI") == [("one\ntwo", ["a", "b"])]
    assert asked == [("MiniLLM/sinst", "11_/valid.jsonl", "dataset")]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "dollyy"], "Did you mean 'dolly'?"),
        (["--data", "bad.jsonl"], "bad.jsonl, row 2: question"),
        (["--data", "test.jsonl", "--dev-num", "0"], "--dev-num 0: at least 1"),
        (["--data", "test.jsonl", "--top-p", "2"], "top_p 2.0"),
    ],
)
def test_bad_input_is_one_clear_line(place, capsys, words, message):
    rows = [{"prompt": "p", "response": "r"}, {"question": "q"}]
    (place / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["model", *words, *FLAGS]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and shown[-1].startswith("error: ")
