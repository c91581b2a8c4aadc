"""The chart of the results: requests a second by number of clients, with a panel for each case."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from loadtest.bench.results import FLOOR, OURS, Results  # noqa: E402
from loadtest.bench.rows import closed_rows, measured_cases  # noqa: E402

COLUMNS = 3
LIMIT = "in-process limit of the peers' pipeline"
OUR_COLOUR = "#d1495b"
INK, FAINT = "#333333", "#bbbbbb"
# distinguishable with colour blindness; each system also has a marker of its own
PEERS = (("#0072b2", "s"), ("#56b4e9", "D"), ("#009e73", "^"), ("#e69f00", "v"), ("#7f5ba8", "P"), ("#8c8c8c", "X"))


def draw(results: Results, file: Path) -> None:
    """Write the chart as PNG."""
    cases = measured_cases(results)
    columns = min(COLUMNS, len(cases))
    lines = -(-len(cases) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3.3 * lines + 0.5), squeeze=False)
    peers = [name for name in results.versions if name not in (OURS, FLOOR)]
    styles = {OURS: (OUR_COLOUR, "o")} | dict(zip(peers, PEERS * len(peers), strict=False))
    panels = [axes for row in grid for axes in row]
    for axes, case in zip(panels, cases, strict=False):
        panel(axes, results, case, styles)
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(entries, key=[*styles, LIMIT].index)
    across = min(len(labels), 3 * columns - 1)
    height = 0.28 * -(-len(labels) // across) / figure.get_figheight()
    figure.legend(
        [entries[label] for label in labels], labels, loc="lower center", ncols=across, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, height, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def panel(axes: Axes, results: Results, case: str, styles: dict[str, tuple[str, str]]) -> None:
    rows = closed_rows(results, case)
    clients = sorted({row.clients for row in rows})
    for system, (colour, marker) in styles.items():
        points = [(clients.index(row.clients), row.throughput) for row in rows if row.system == system]
        if points:
            ours = system == OURS
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=6 if ours else 5,
                linewidth=2.4 if ours else 1.3,
                zorder=3 if ours else 2,
                label=system,
            )
    if limit := results.limits.get(case, {}).get("pipeline"):
        axes.axhline(limit.rate, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=LIMIT, zorder=1)
    axes.set_title(case, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xticks(range(len(clients)), [str(count) for count in clients])
    axes.set_xlim(-0.25, len(clients) - 0.75)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients", fontsize=9, color=INK)
    axes.set_ylabel("requests/s", fontsize=9, color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
