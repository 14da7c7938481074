"""Results files, tables, the model card's section, the frontier."""

import json

import pytest
import torch
from safetensors.torch import save_file

from harness.checkpoint import hashes
from harness.commands import frontier, report
from harness.errors import UserError


def results(name, mb, ppl, acc=None, method=None):
    lines = [report.row("MB", mb, 2, main=True)]
    lines.append(
        report.row(
            "PPL stdlib", ppl, 3, better="lower", samples="9 windows", protocol="p | q", main=True
        )
    )
    if acc is not None:
        lines.append(report.row("quiz %", acc, 1, better="higher", main=True))
    return {
        "schema": report.SCHEMA,
        "model": {"name": name, "identity": "x"},
        "recipe": [{"method": method}] if method else [],
        "command": f"harness eval {name}",
        "versions": {"harness": "0"},
        "metrics": {"all": {"settings": {}, "seconds": 1, "rows": lines, "details": {}}},
    }


def test_saved_and_loaded_back_and_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "results.json"
    report.save(results("a", 10, float("inf")), path)
    assert report.rows_of(report.load(path.parent))[1]["value"] == "inf"
    json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="the disk is full"):
        report.save(results("b", 1, 2), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 99, "metrics": {}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        report.load(tmp_path)
    with pytest.raises(UserError, match="not found"):
        report.load(tmp_path / "none.json")


def test_tables():
    table = report.markdown(results("a", 1234.5, 7.0))
    assert "| MB         | 1,234.50 |           |          |" in table.splitlines()
    assert "p \\| q" in table
    lines = report.comparison([results("a", 10, 7, acc=55), results("b", 2.5, 9)]).splitlines()
    assert lines[0].split("|")[1:-1] == [" model ", "    MB ", " PPL stdlib ↓ ", " quiz % ↑ "]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["b", "2.50", "9.000", "-"]


def test_sizes_become_columns_where_models_differ_in_them():
    some = [results(name, 10, 7) for name in "ab"]
    for one, macs in zip(some, (5.5, 4.4), strict=True):
        rows = one["metrics"]["all"]["rows"]
        rows += [report.row("MMAC/token", macs, 2), report.row("parameters, M", 6.0, 2)]
    head, _, _, last = report.comparison(some).splitlines()
    assert "MMAC/token" in head and "4.40" in last and "parameters" not in head


def test_unlike_protocols_are_told():
    one, other = results("a", 10, 7), results("b", 9, 8)
    assert report.differing_protocols([one, other]) == []
    report.rows_of(other)[1]["samples"] = "3 windows"
    assert report.differing_protocols([one, other]) == ["PPL stdlib"]


def test_card_section_is_replaced_and_the_rest_kept(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# m\n\nintro\n\n## Use\n\ncode\n")
    assert not report.update_card(tmp_path, results("a", 1, 7))
    (tmp_path / "recipe.yaml").write_text("steps: []\n")
    assert report.update_card(tmp_path, results("a", 1, 7))
    first = card.read_text()
    assert first.startswith("# m\n\nintro\n\n## Use\n\ncode\n\n## Evaluation\n")
    report.update_card(tmp_path, results("a", 1, 7))
    assert card.read_text() == first
    card.write_text(first + "\n## Licence\n\nfree\n")
    report.update_card(tmp_path, results("a", 1, 8))
    text = card.read_text()
    assert text.count("## Evaluation") == 1 and "8.000" in text and "7.000" not in text
    assert text.endswith("\n## Licence\n\nfree\n")


def test_identity_follows_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100))
    first = hashes.of_model(tmp_path)
    assert hashes.of_model(tmp_path) == first
    weights.write_bytes(bytes(99) + b"x")
    second = hashes.of_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len({first, second, hashes.of_model(tmp_path)}) == 3


def test_a_change_of_one_tensor_in_a_large_file_is_noticed(tmp_path, monkeypatch):
    """Large files are not read whole: of every tensor something is."""
    monkeypatch.setattr(hashes, "WHOLE", 0)
    (tmp_path / "config.json").write_text("{}")
    tensors = {str(i): torch.ones(size) for i, size in enumerate((3, 600_000, 5, 400_000))}
    seen = set()
    for change in (None, *tensors):
        changed = tensors if change is None else tensors | {change: tensors[change] * 0}
        save_file(changed, tmp_path / "model.safetensors")
        seen.add(hashes.of_model(tmp_path))
    assert len(seen) == 1 + len(tensors)


def test_frontier_keeps_what_nothing_beats():
    points = [(4, 10.0), (2, 30.0), (3, 31.0), (8, 10.5), (8, 9.0), (2.001, 29.0)]
    assert frontier.frontier(points, "lower") == [5, 0, 4]
    assert frontier.frontier([(x, -y) for x, y in points], "higher") == [5, 0, 4]


def test_plot_shows_what_models_share(tmp_path):
    models = [
        results("dense", 10, 7, 60),
        results("w4", 3, 7.5, method="gptq"),
        results("w2", 2, 99),
    ]
    drawn = frontier.panels(models)
    assert [(label, len(points)) for label, _, points in drawn] == [("PPL stdlib", 3)]
    path = tmp_path / "out.png"
    frontier.plot(models, path)
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="nothing to plot"):
        frontier.plot(models[:1], path)
