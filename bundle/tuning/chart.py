"""Draw a search: latency against throughput, of everything that was measured."""

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402
from matplotlib.typing import RcKeyType  # noqa: E402

from bundle.tuning.search import Point, front  # noqa: E402
from bundle.tuning.space import Candidate  # noqa: E402

GREEN, AMBER, RED, GREY = "#1b7f5c", "#d98a00", "#b3261e", "#b8b8b8"
# text stays text in the SVG; with a fixed salt, the same picture is the same file
STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tuning",
    "font.family": "sans-serif",
    "font.size": 10,
}


def draw(
    title: str, points: list[Point], current: Candidate, best: Candidate, target: float, formats: tuple[str, ...]
) -> dict[str, bytes]:
    """Draw the chart.

    Args:
        points: one for each candidate and concurrency.
        target: of the p99 latency, in seconds.
        formats: svg, png.

    Returns:
        the picture in each format.
    """
    answered = [point for point in points if point.load.answered]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        axes.scatter(*coordinates(answered), s=14, color=GREY, label="measured", zorder=2)
        failed = [point for point in answered if point.load.failed]
        if failed:
            axes.scatter(*coordinates(failed), marker="x", color="black", label="with failures", zorder=3)
        axes.step(*coordinates(front(points)), where="post", color="black", linewidth=1, label="Pareto front", zorder=3)
        if current != best:
            curve(axes, answered, current, AMBER, "s", f"now: {current}")
        curve(axes, answered, best, GREEN, "o", f"best: {best}")
        axes.axhline(1000 * target, color=RED, linestyle="--", linewidth=1, label=f"target: {1000 * target:g} ms")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.set(title=title, xlabel="answers a second", ylabel="p99 latency, ms (log)")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        pictures = {}
        for kind in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
            pictures[kind] = buffer.getvalue()
        pyplot.close(figure)
    return pictures


def coordinates(points: list[Point]) -> tuple[list[float], list[float]]:
    """Return throughput (answers/s) and p99 (ms) of the points."""
    return [point.load.throughput for point in points], [1000 * point.load.p99 for point in points]


def curve(axes: Axes, points: list[Point], candidate: Candidate, colour: str, marker: str, label: str) -> None:
    """Draw one candidate's points, each with its number of clients."""
    own = sorted((point for point in points if point.candidate == candidate), key=lambda point: point.concurrency)
    axes.plot(*coordinates(own), color=colour, marker=marker, markersize=5, linewidth=1.2, label=label, zorder=4)
    for point, x, y in zip(own, *coordinates(own), strict=True):
        axes.annotate(f"{point.concurrency}", (x, y), (5, -10), textcoords="offset points", fontsize=8, color=colour)
