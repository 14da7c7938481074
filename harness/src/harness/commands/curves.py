"""Two pictures of pruning: perplexity against the share removed, and quality x time x size."""

import math
from collections.abc import Sequence
from pathlib import Path

from harness.checkpoint.card import REPACKED
from harness.checkpoint.recipe import nominal_ratio
from harness.commands.frontier import COLOURS, annotate, logarithmic
from harness.commands.report import rows_of
from harness.errors import UserError
from harness.paths import write

DENSE = "dense"
LARGEST = 1100  # area of the largest bubble, in square points
NAMED = 20  # with more models than this their names cover the picture
# Points of a series: (x, y) of a curve; (name, time, perplexity, megabytes) of bubbles.
Series = dict[str, list]


def steps_of(results: dict) -> list[dict]:
    """The recipe's steps that changed the model (others change its files only)."""
    return [step for step in results["recipe"] if step.get("method") not in REPACKED]


def series(results: dict) -> str:
    """What a model was made with: its last two methods, and how it was loaded.

    "dense", "wanda", "wanda 2:4", "llm_pruner block + recover", "sparsegpt + sparsegpt + nf4-dq".
    """
    parts = [_method(step) for step in steps_of(results)[-2:]]
    return " + ".join([*(parts or [DENSE]), *_load(results)])


def _method(step: dict) -> str:
    settings = step.get("settings") or {}
    words = [str(step.get("method", "other"))]
    if settings.get("level"):
        words.append(str(settings["level"]))
    if settings.get("prunem"):
        words.append(f"{settings['prunen']}:{settings['prunem']}")
    return " ".join(words)


def _load(results: dict) -> list[str]:
    load = results["metrics"].get("footprint", {}).get("settings", {}).get("load")
    return [load] if load else []


def ratio(results: dict) -> float | None:
    """What the last pruning step asked to remove; 0 for a model without steps, None for one that
    was changed but not pruned."""
    steps = steps_of(results)
    if not steps:
        return 0.0
    ratios = [nominal_ratio(step.get("settings") or {}) for step in steps]
    return next((r for r in reversed(ratios) if r is not None), None)


def perplexities(results: dict) -> dict[str, float]:
    """Finite perplexities by the dataset's short name."""
    rows = [row for row in rows_of(results) if row["label"].startswith("PPL ")]
    return {
        row["label"].removeprefix("PPL "): row["value"]
        for row in rows
        if not isinstance(row["value"], str) and math.isfinite(row["value"])
    }


def curve_panels(all_results: Sequence[dict]) -> dict[str, Series]:
    """Dataset -> series -> [(ratio, perplexity)] by rising ratio.

    A series begins at the unpruned model, loaded the same way, where that is among the results.
    """
    panels: dict[str, Series] = {}
    starts: dict[tuple, tuple[float, float]] = {}
    loads: dict[str, tuple] = {}
    for results in all_results:
        removed, load = ratio(results), tuple(_load(results))
        for dataset, value in perplexities(results).items() if removed is not None else ():
            if not steps_of(results):
                starts[dataset, load] = (0.0, value)
                continue
            name = series(results)
            loads[name] = load
            panels.setdefault(dataset, {}).setdefault(name, []).append((removed, value))
    for dataset, lines in panels.items():
        for name, points in lines.items():
            start = starts.get((dataset, loads[name]))
            lines[name] = sorted([*([start] if start else []), *points])
    return panels


def bubbles(all_results: Sequence[dict]) -> tuple[str, Series]:
    """(dataset, series -> [(name, milliseconds per decoded token, perplexity, megabytes)]).

    The dataset is the one that most of the models with a measured speed were read on; megabytes are
    those of the table: files on disk, or memory where the model was quantized on load.
    """
    timed = [r for r in all_results if "speed" in r["metrics"] and perplexities(r)]
    counts: dict[str, int] = {}
    for results in timed:
        for dataset in perplexities(results):
            counts[dataset] = counts.get(dataset, 0) + 1
    if not counts:
        return "", {}
    dataset = max(counts, key=counts.__getitem__)
    found: Series = {}
    for results in timed:
        size = next((row["value"] for row in rows_of(results) if row["label"] == "MB"), None)
        value = perplexities(results).get(dataset)
        if size is None or value is None:
            continue
        speed = results["metrics"]["speed"]["details"]
        milliseconds = 1e3 * speed["batch_size"] / speed["decode_tokens_s"]
        point = (results["model"]["name"], milliseconds, value, size)
        found.setdefault(series(results), []).append(point)
    return dataset, found


def curve(all_results: Sequence[dict], path: Path) -> None:
    """Draw perplexity against the ratio, one panel per dataset, into a PNG file, atomically.

    Raises UserError when no pruned model with a perplexity is among the results.
    """
    panels = curve_panels(all_results)
    if not panels:
        raise UserError(
            "nothing to plot: none of these results has both a perplexity and a pruning step in "
            "its recipe"
        )
    pyplot = _pyplot()
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.0 * len(panels), 5.2), squeeze=False, layout="constrained"
    )
    for axis, (dataset, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot(
                *zip(*points, strict=True), color=_colour(names, name), marker=_marker(names, name),
                markersize=5, linewidth=1.6,
            )  # fmt: skip
        values = [value for points in lines.values() for _, value in points]
        if max(values) > 3 * min(values) > 0:
            logarithmic(axis.yaxis, axis.set_yscale)
        axis.set_title(f"perplexity on {dataset}", fontsize=12)
        axis.set_xlabel("pruning ratio, as asked for")
        axis.set_ylabel("perplexity (lower is better)")
        _plain(axis)
    handles = [
        pyplot.Line2D([], [], color=_colour(names, n), marker=_marker(names, n), label=n)
        for n in names
    ]
    columns = min(len(names), 2 * len(panels))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    write(path, lambda beside: figure.savefig(beside, dpi=150, format="png"))
    pyplot.close(figure)


def bubble(all_results: Sequence[dict], path: Path) -> None:
    """Draw perplexity against decoding time, areas in proportion to size, into a PNG file,
    atomically.

    Raises UserError when no model has both a speed and a perplexity.
    """
    dataset, models = bubbles(all_results)
    if not models:
        raise UserError(
            "nothing to plot: none of these results has both a speed and a perplexity; "
            "measure them with: harness eval MODEL --ppl --speed"
        )
    pyplot = _pyplot()
    names = list(models)
    points = [point for some in models.values() for point in some]
    largest = max(size for *_, size in points)
    figure, axis = pyplot.subplots(figsize=(8.6, 6.4), layout="constrained")
    for name, some in models.items():
        _, times, values, sizes = zip(*some, strict=True)
        areas = [LARGEST * size / largest for size in sizes]
        axis.scatter(times, values, s=areas, color=_colour(names, name), alpha=0.35, linewidth=0)
        axis.scatter(
            times, values, s=14, color=_colour(names, name), marker=_marker(names, name), zorder=3
        )
    values = [value for _, _, value, _ in points]
    if max(values) > 3 * min(values) > 0:
        logarithmic(axis.yaxis, axis.set_yscale)
    axis.set_title(f"perplexity on {dataset}, decoding time and size", fontsize=12)
    axis.set_xlabel("decoding, ms per token (less is faster)")
    axis.set_ylabel("perplexity (lower is better)")
    _plain(axis)
    axis.margins(0.2, 0.2)
    figure.canvas.draw()
    if len(points) <= NAMED:
        annotate(axis, [(time, value, name) for name, time, value, _ in points])
    _legends(pyplot, axis, names, largest)
    write(path, lambda beside: figure.savefig(beside, dpi=150, format="png"))
    pyplot.close(figure)


def _legends(pyplot, axis, names: Sequence[str], largest: float) -> None:
    """Below the axis what the colours mean, beside it what the areas mean."""
    handles = [
        pyplot.Line2D(
            [], [], marker=_marker(names, n), linestyle="", color=_colour(names, n), label=n
        )
        for n in names
    ]
    axis.figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(names), 3), frameon=False
    )
    # A marker's size is its diameter in points, a scattered point's its area.
    handles = [
        pyplot.Line2D(
            [], [], marker="o", linestyle="", color="#c3cad3", label=f"{share * largest:,.3g} MB",
            markersize=math.sqrt(LARGEST * share),
        )
        for share in (1, 0.25)
    ]  # fmt: skip
    axis.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(1.02, 0), frameon=False,
        labelspacing=1.8, handletextpad=1.6, borderpad=1.2,
    )  # fmt: skip


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _marker(names: Sequence[str], name: str) -> str:
    """Another shape once the colours begin again."""
    return "os^Dv"[names.index(name) // len(COLOURS) % 5]


def _plain(axis) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
