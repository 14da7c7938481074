"""The frontier: quality and speed against size, one point per model."""

from collections.abc import Sequence
from pathlib import Path

from harness.checkpoint.card import REPACKED
from harness.commands.report import rows_of
from harness.errors import UserError
from harness.paths import write

SIZE = "MB"
COLOURS = (
    "#33415c", "#c1443c", "#1f7a8c", "#d98e04", "#6a4c93", "#4f772d", "#8d6e63", "#d16ba5",
    "#5b8def", "#7f7f7f",
)  # fmt: skip


def frontier(points: Sequence[tuple[float, float]], better: str) -> list[int]:
    """Indices of the (size, value) points that no other beats, from small to large.

    Sizes within 2 % count as equal: file headers alone differ by as much in small models.
    """
    sign = 1 if better == "lower" else -1

    def beaten(i: int) -> bool:
        size, value = points[i]
        return any(s <= 1.02 * size and sign * v < sign * value for s, v in points)

    kept = [i for i in range(len(points)) if not beaten(i)]
    return sorted(kept, key=lambda i: points[i][0])


def panels(all_results: Sequence[dict]) -> list[tuple[str, str, list[tuple[int, float, float]]]]:
    """(label, better, [(model, MB, value)]) of up to three quantities that two models share.

    The first perplexity, the first accuracy and decoding speed, as far as they were measured.
    """
    wanted = (("lower", "PPL"), ("higher", "%"), ("higher", "tokens/s"))
    found = []
    for better, mark in wanted:
        columns: dict[str, list] = {}
        for model, results in enumerate(all_results):
            rows = [r for r in rows_of(results) if r["main"]]
            size = next((r["value"] for r in rows if r["label"].startswith(SIZE)), None)
            for r in rows:
                if r["better"] == better and mark in r["label"] and size is not None:
                    columns.setdefault(r["label"], []).append((model, size, float(r["value"])))
        shared = [(label, points) for label, points in columns.items() if len(points) > 1]
        if shared:
            label, points = max(shared, key=lambda item: len(item[1]))
            found.append((label, better, points))
    return found


def method(results: dict) -> str:
    """What the points are coloured by: the last step of the recipe that changed a weight, or
    "dense"."""
    methods = [str(step.get("method", "other")) for step in results["recipe"]]
    return next((name for name in reversed(methods) if name not in REPACKED), "dense")


def plot(all_results: Sequence[dict], path: Path) -> None:
    """Draw the panels into a PNG file, atomically.

    Raises UserError when no quantity was measured for two models.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = panels(all_results)
    if not drawn:
        raise UserError("nothing to plot: no quantity was measured for at least two of the models")
    names = [results["model"]["name"] for results in all_results]
    methods = list(dict.fromkeys(map(method, all_results)))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(methods)}
    figure, axes = pyplot.subplots(
        1, len(drawn), figsize=(6.4 * len(drawn), 5.4), squeeze=False, layout="constrained"
    )
    for axis, (label, better, points) in zip(axes[0], drawn, strict=True):
        for kind in methods:
            mine = [p for p in points if method(all_results[p[0]]) == kind]
            axis.scatter(
                [p[1] for p in mine], [p[2] for p in mine], s=52, color=colour[kind], zorder=3
            )
        edge = [points[i] for i in frontier([p[1:] for p in points], better)]
        axis.plot(
            [p[1] for p in edge], [p[2] for p in edge], color="#9aa5b1", linewidth=1.5, zorder=2
        )
        sizes, values = ([p[i] for p in points] for i in (1, 2))
        if max(sizes) > 3 * min(sizes) > 0:
            logarithmic(axis.xaxis, axis.set_xscale)
        if better == "lower" and max(values) > 3 * min(values) > 0:
            logarithmic(axis.yaxis, axis.set_yscale)
        axis.set_title(f"{label} against size", fontsize=12)
        axis.set_xlabel("weights, MB (1e6 bytes)")
        axis.set_ylabel(f"{label} ({better} is better)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(0.2, 0.14)
        figure.canvas.draw()
        annotate(axis, [(p[1], p[2], names[p[0]]) for p in points])
    handles = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=colour[m], label=m) for m in methods
    ]
    handles.append(pyplot.Line2D([], [], color="#9aa5b1", label="frontier"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    write(path, lambda beside: figure.savefig(beside, dpi=150, format="png"))
    pyplot.close(figure)


def logarithmic(direction, set_scale) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log")
    direction.set_major_locator(LogLocator(subs=(1, 2, 5)))
    direction.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    direction.set_minor_formatter(NullFormatter())


def annotate(axis, points: Sequence[tuple[float, float, str]]) -> None:
    """Put each name beside its point, where it covers no other point or name if that can be."""
    from matplotlib.transforms import Bbox

    renderer = axis.figure.canvas.get_renderer()
    taken = []
    for x, y, _ in points:
        px, py = axis.transData.transform((x, y))
        taken.append(Bbox.from_extents(px - 5, py - 5, px + 5, py + 5))
    inside = axis.get_window_extent(renderer)
    directions = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
    spots = [(d * dx, d * dy) for d in (8, 16, 28, 42) for dx, dy in directions]
    for x, y, name in points:
        text = axis.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
        )

        def cost(spot: tuple[int, int], text=text) -> int:
            _move(text, spot)
            box = text.get_window_extent(renderer)
            covered = sum(box.overlaps(other) for other in taken)
            whole = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
            return covered + (0 if whole else 100)

        _move(text, min(spots, key=cost))
        taken.append(text.get_window_extent(renderer))


def _move(text, spot: tuple[int, int]) -> None:
    text.set_position(spot)
    text.set_horizontalalignment("left" if spot[0] > 0 else "right" if spot[0] < 0 else "center")
