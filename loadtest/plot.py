"""The chart of a run: latency against throughput for each model, with a point for each step."""

import csv
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

from loadtest.record import Point, Record  # noqa: E402

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
COLOURS = {"p50": "#1b7f5c", "p95": "#d98a00", "p99": "#b3261e"}
MARKERS = {"p50": "o", "p95": "s", "p99": "^"}
COLUMNS = ("model", "users", "seconds", "throughput", *(f"{name}_ms" for name in PERCENTILES), "failed", "wrong")


def write(record: Record, prefix: Path) -> list[Path]:
    """Write PREFIX_points.csv, and if there are points to draw, PREFIX_latency.png and PREFIX_latency.svg.

    Returns:
        the files that were written.
    """
    points = {model: record.points(model) for model in sorted({model for _, model in record.tallies})}
    table = prefix.with_name(f"{prefix.name}_points.csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row(model, point) for model, of in points.items() for point in of)
    drawn = {model: [point for point in of if point.tally.right] for model, of in points.items()}
    drawn = {model: of for model, of in drawn.items() if of}
    if not drawn:
        return [table]
    pictures = [prefix.with_name(f"{prefix.name}_latency.{ending}") for ending in ("png", "svg")]
    figure = draw(drawn)
    for picture in pictures:
        figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    return [table, *pictures]


def row(model: str, point: Point) -> list[str | int | float]:
    times = (point.tally.percentile(share) for share in PERCENTILES.values())
    shown = ["" if time is None else f"{time:.2f}" for time in times]
    rate = f"{point.throughput:.2f}"
    return [model, point.users, point.seconds, rate, *shown, point.tally.failed, point.tally.wrong]


def draw(points: dict[str, list[Point]]) -> pyplot.Figure:
    """Draw a panel for each model."""
    columns = min(2, len(points))
    rows = -(-len(points) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4 * rows + 0.6), squeeze=False, layout="constrained", sharey=True
    )
    for panel in panels.flat[len(points) :]:
        panel.set_visible(False)
    for panel, (model, of) in zip(panels.flat, points.items(), strict=False):
        draw_panel(panel, model, of)
    explained = (
        "numbers: users of all models together"
        if any(numbered(of) for of in points.values())
        else "each point: a part of the run"
    )
    figure.suptitle(f"Latency against throughput; {explained}", fontsize=11)
    handles = {
        label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def numbered(points: list[Point]) -> bool:
    """Return whether the points differ in their numbers of users, so that these can label them."""
    return len(points) < 2 * len({point.users for point in points})


def milliseconds(point: Point, share: float) -> float:
    """Return a percentile of a point; NaN, which is not drawn, if it has no right answers."""
    time = point.tally.percentile(share)
    return math.nan if time is None else time


def draw_panel(panel: Axes, model: str, points: list[Point]) -> None:
    rates = [point.throughput for point in points]
    users = [point.users for point in points]
    stepped = users == sorted(set(users))
    for name, share in PERCENTILES.items():
        times = [milliseconds(point, share) for point in points]
        line = "-" if stepped else "none"  # only increasing numbers of users make a curve
        panel.plot(rates, times, linestyle=line, marker=MARKERS[name], color=COLOURS[name], label=name, markersize=5)
    if numbered(points):
        for point, rate in zip(points, rates, strict=True):
            place = (rate, milliseconds(point, 0.99))
            panel.annotate(f"{point.users}", place, (0, 6), textcoords="offset points", ha="center", fontsize=8)
    failed = [point for point in points if point.tally.failed]
    if failed:
        marks = [point.throughput for point in failed], [milliseconds(point, 0.99) for point in failed]
        panel.plot(*marks, "x", color="black", markersize=11, label="with failures")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_tick_params(labelleft=True)
    panel.set_xlim(left=0, right=1.08 * max(rates))
    panel.margins(y=0.12)
    panel.grid(alpha=0.25)
    panel.set_title(model, fontsize=10, fontweight="bold")
    panel.set_xlabel("right answers a second")
    panel.set_ylabel("milliseconds")
