"""What the pictures of pruning show: series, ratios, starting points; and that they are made."""

import pytest

from harness.cli import main
from harness.commands import curves, report


def results(name, steps=(), load=None, mb=10.0, speed=None, **ppl):
    rows = [report.row("MB", mb, 2, main=True)]
    for dataset, value in ppl.items():
        rows.append(report.row(f"PPL {dataset}", value, 3, better="lower", main=True))
    metrics = {"footprint": {"settings": {"load": load}, "rows": rows, "details": {}}}
    if speed:
        details = {"batch_size": 2, "decode_tokens_s": speed}
        metrics["speed"] = {"settings": {}, "rows": [], "details": details}
    recipe = [{"method": method, "settings": settings} for method, settings in steps]
    model = {"name": name, "identity": "x"}
    return {"schema": 1, "model": model, "recipe": recipe, "metrics": metrics}


def unstructured(method, sparsity, n=0, m=0):
    return method, {"sparsity": sparsity, "prunen": n, "prunem": m}


def structured(ratio, level):
    return "llm_pruner", {"pruning_ratio": ratio, "level": level, "pruner_type": "taylor"}


CONVERT = ("convert", {"format": "bitmask"})
RECOVER = ("recover", {"epochs": 1})


@pytest.mark.parametrize(
    ("steps", "load", "series", "ratio"),
    [
        ([], None, "dense", 0.0),
        ([CONVERT], "nf4-dq", "dense + nf4-dq", 0.0),
        ([unstructured("wanda", 0.3)], None, "wanda", 0.3),
        ([unstructured("wanda", 0.0, 2, 4)], None, "wanda 2:4", 0.5),
        ([structured(0.25, "block"), CONVERT], None, "llm_pruner block", 0.25),
        ([structured(0.25, "channel"), RECOVER], "nf4-dq",
         "llm_pruner channel + recover + nf4-dq", 0.25),
        ([unstructured("sparsegpt", s) for s in (0.2, 0.3, 0.6)], None,
         "sparsegpt + sparsegpt", 0.6),
        ([unstructured("wanda", 0.5), ("gptq", {"wbits": 4})], None, "wanda + gptq", 0.5),
        ([("gptq", {"wbits": 4})], None, "gptq", None),
        ([("bitdistiller", {"bits": 2}), ("export", {})], None, "bitdistiller", None),
        ([("old", None)], None, "old", None),
    ],
)  # fmt: skip
def test_series_and_ratio(steps, load, series, ratio):
    made = results("m", steps, load)
    assert curves.series(made) == series
    assert curves.ratio(made) == ratio


def several():
    return [
        results("w6", [unstructured("wanda", 0.6)], wiki=40.0, ptb=80.0, speed=50, mb=10.1),
        results("dense", wiki=10.0, ptb=20.0, speed=40),
        results("w3", [unstructured("wanda", 0.3)], wiki=11.0, ptb=21.0),
        results("dense-nf4", load="nf4", wiki=10.5, mb=3, speed=20),
        results("w3-nf4", [unstructured("wanda", 0.3)], "nf4", wiki=12.0, mb=3, speed=20),
        results("b25", [structured(0.25, "block")], wiki=15.0, speed=60, mb=8),
        results("broken", [unstructured("wanda", 0.9)], wiki="inf"),
        results("w4", [("gptq", {"wbits": 4})], wiki=10.4, speed=40, mb=3.1),
    ]


def test_curves_begin_at_the_unpruned_model_loaded_alike():
    assert curves.curve_panels(several()) == {
        "wiki": {
            "wanda": [(0.0, 10.0), (0.3, 11.0), (0.6, 40.0)],
            "wanda + nf4": [(0.0, 10.5), (0.3, 12.0)],
            "llm_pruner block": [(0.0, 10.0), (0.25, 15.0)],
        },
        "ptb": {"wanda": [(0.0, 20.0), (0.3, 21.0), (0.6, 80.0)]},
    }
    alone = curves.curve_panels(several()[:1])
    assert alone["wiki"] == {"wanda": [(0.6, 40.0)]}


def test_bubbles():
    dataset, found = curves.bubbles(several())
    assert dataset == "wiki"
    assert found == {
        "wanda": [("w6", 40.0, 40.0, 10.1)],
        "dense": [("dense", 50.0, 10.0, 10.0)],
        "dense + nf4": [("dense-nf4", 100.0, 10.5, 3)],
        "wanda + nf4": [("w3-nf4", 100.0, 12.0, 3)],
        "llm_pruner block": [("b25", pytest.approx(100 / 3), 15.0, 8)],
        "gptq": [("w4", 50.0, 10.4, 3.1)],
    }


def test_pictures_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = []
    for made in several():
        names.append(f"{made['model']['name']}.json")
        report.save(made, tmp_path / names[-1])
    assert main(["compare", *names, "--curve", "curve.png", "--bubble", "bubble.png"]) == 0
    assert "plot: curve.png" in capsys.readouterr().out
    for name in ("curve.png", "bubble.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == len(names) + 2
    for flag, line in (("--curve", "pruning step"), ("--bubble", "both a speed")):
        assert main(["compare", "broken.json", flag, "none.png"]) == 2
        assert line in capsys.readouterr().err
