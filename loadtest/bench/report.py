"""The report: tables of the results for the terminal and for BENCHMARKS.md."""

import math
import os
from collections import defaultdict
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from loadtest.bench.results import (
    CONNECTIONS,
    FEWEST,
    FLAT,
    FLOOR,
    LIMIT,
    OURS,
    TOLERANCE,
    TOLERATED,
    UTILISATION,
    WINDOWS,
    Failure,
    Limit,
    Measurement,
    Results,
    is_peer,
)
from loadtest.bench.rows import closed_rows, measured_cases, throughput

SECTION, TITLE = "bench", "# Benchmarks\n"  # name of the generated section, and the first line of a new document
DISTURBED = 0.05  # share of the CPU that other processes used; above it, the numbers are not reliable
WRONG = "†"  # marks a system whose answer differs from the reference's
CROWDED = "‡"  # marks an open loop that used many of the load generator's connections
CROWD = 0.5  # share of the connections in use, by the median latency; during peaks all are

METHOD = """\
{rounds}, {seconds:g} s for each number of clients.{medians} Before, every system gets load from the most clients until
its rate changes by less than {flat:.0%} between two windows of {window:g} s, for {shortest:g} to {longest:g} s.
The load generator runs on the same machine. MB: the memory of all processes of a server right after the load
(proportional set size). Best peer: the peer with the highest throughput at this number of clients, among those with
correct answers and at most {tolerated:.0%} failed requests. Floor: the bundle's server with a handler that returns a
constant, which is no peer. Own limit of the bundle: the throughput if each request took the time of the floor, with the
same number of clients, plus the time of the handler in a loop without a server. Own limit of all others: the throughput
of the reference pipeline in a loop without a server."""
MEDIANS = """ Numbers are medians over the rounds, and throughput is shown with its range. Failures are sums. MB and the
longest latency are maxima."""

LOOPS = {"pipeline": "the reference pipeline", "handler": "the bundle's handler"}
CLOSED = (
    "system",
    "clients",
    "req/s",
    "p50 ms",
    "p99 ms",
    "failed",
    "× best peer",
    "of own limit",
    "CPU ms/req",
    "MB",
)
OPEN = (
    "system",
    "req/s sent",
    f"{UTILISATION:.0%} of",
    "req/s answered",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "longest ms",
    "failed",
)


def wrong_systems(results: Results, case: str) -> dict[str, str]:
    """Return the systems whose answer differs from the reference's, each with a description."""
    return {
        answer.system: "answers class {} with {:.3f}; the reference answers {} with {:.3f}".format(
            *answer.seen, *answer.expected
        )
        for answer in results.wrong_answers(case)
    }


def closed_table(results: Results, case: str) -> list[tuple[str, ...]]:
    wrong = wrong_systems(results, case)
    rows = [
        (
            row.system + (WRONG if row.system in wrong else ""),
            str(row.clients),
            number(row.throughput) + (f" ({number(row.spread[0])}-{number(row.spread[1])})" if row.spread else ""),
            milliseconds(row.p50),
            milliseconds(row.p99),
            f"{row.failed:,}",
            f"{row.to_best_peer:.2f}" if row.to_best_peer is not None else "",
            f"{row.to_limit:.0%}" if row.to_limit is not None else "",
            f"{1000 * row.cpu_per_request:.3g}" if math.isfinite(row.cpu_per_request) else "-",
            number(row.memory / 1e6),
        )
        for row in closed_rows(results, case)
    ]
    return rows + [(system, "", "failed", *[""] * (len(CLOSED) - 3)) for system in unmeasured(results, case)]


def unmeasured(results: Results, case: str) -> list[str]:
    """Return the systems that failed without a measurement; the list of failures has the reasons."""
    seen = {one.system for one in results.measurements if one.case == case}
    failed = [one.system for one in results.failures if one.case in (case, None) and one.system != LIMIT]
    return [system for system in dict.fromkeys(failed) if system not in seen]


def open_table(results: Results, case: str) -> list[tuple[str, ...]]:
    """Return the rows of the open loops, the bundle first; its second row is at the best peer's rate."""
    wrong = wrong_systems(results, case)
    groups: dict[tuple[str, bool], list[Measurement]] = defaultdict(list)
    for one in results.measurements:
        if one.case == case and one.rate is not None:
            groups[one.system, one.rate_of != one.system].append(one)
    return [
        (
            system + (WRONG if system in wrong else "") + (CROWDED if is_crowded(seen) else ""),
            number(median([one.rate for one in seen if one.rate is not None])),
            "best peer" if at_a_peers_rate else "itself",
            number(throughput(seen)),
            *(milliseconds(median([getattr(one.load, name) for one in seen])) for name in ("p50", "p95", "p99")),
            milliseconds(max(one.load.longest for one in seen)),
            f"{sum(one.load.failed for one in seen):,}",
        )
        for (system, at_a_peers_rate), seen in sorted(groups.items(), key=lambda group: (group[0][0] != OURS, group[0]))
    ]


def is_crowded(seen: list[Measurement]) -> bool:
    """Return whether some requests may have waited for a connection, because many were in flight."""
    return any((one.rate or 0) * one.load.p50 >= CROWD * CONNECTIONS for one in seen)


def best_table(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the best throughput of each system: a row for each system, a column for each case."""
    cases = measured_cases(results)
    rows = {case: closed_rows(results, case) for case in cases}
    seen = {row.system for held in rows.values() for row in held}
    systems = [name for name in results.versions if name in seen and name != FLOOR]

    def best(case: str, names: list[str]) -> float | None:
        return max((row.throughput for row in rows[case] if row.system in names and row.is_sound), default=None)

    table = [
        (name, *("-" if (found := best(case, [name])) is None else number(found) for case in cases)) for name in systems
    ]
    ratios = []
    for case in cases:
        ours, theirs = best(case, [OURS]), best(case, [*filter(is_peer, systems)])
        ratios.append(f"{ours / theirs:.2f}" if ours and theirs else "")
    if any(ratios):
        table.append(("bundle × best peer", *ratios))
    return ["system", *cases], table


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    return number(1000 * seconds) if math.isfinite(seconds) else "-"


def rounds_done(results: Results) -> str:
    """Return the number of rounds as text; if it differs between systems, the lowest and the highest."""
    groups: dict[tuple[str, str], set[int]] = defaultdict(set)
    for one in results.measurements:
        groups[one.case, one.system].add(one.round)
    counts = [len(rounds) for rounds in groups.values()]
    fewest, most = min(counts), max(counts)
    return (f"{fewest} to " if fewest < most else "") + plural(most, "round")


def limit_line(limits: dict[str, Limit]) -> str:
    parts = [
        f"{LOOPS[kind]} {number(limit.rate)} requests/s (batch {limit.batch}, "
        f"{limit.processes} {'process' if limit.processes == 1 else 'processes'} × {limit.threads} "
        f"{'thread' if limit.threads == 1 else 'threads'})"
        for kind, limit in limits.items()
    ]
    return "In-process limit: " + "; ".join(parts) + "."


def warm_up_line(results: Results, case: str) -> str:
    """Return a sentence on how long the systems got load before they were measured; "" if they got none."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in results.warm_ups:
        if one.case == case:
            seconds[one.system].append(one.seconds)
    if not seconds:
        return ""
    text = "Warm-up: " + ", ".join(f"{system} {median(times):.0f} s" for system, times in seconds.items()) + "."
    unsteady = {one.system for one in results.warm_ups if one.case == case and not one.is_flat}
    return text + (
        f" The rate still changed at its end, in some round: {', '.join(sorted(unsteady))}." if unsteady else ""
    )


def disturbance(results: Results) -> str:
    """Return a sentence on the CPU that other processes used."""
    shares = [one.others for one in results.measurements]
    sentence = (
        f"During the run, other processes used {median(shares):.0%} of the CPU (median), at most {max(shares):.0%}."
    )
    if median(shares) > DISTURBED:
        sentence += " The machine was not idle, so these numbers are not reliable."
    return sentence


# --- the terminal ------------------------------------------------------------------------------------------------


def terminal_tables(results: Results) -> list[Table]:
    tables = []
    for case in measured_cases(results):
        limits = results.limits.get(case)
        tables.append(rich_table(case, CLOSED, closed_table(results, case), limit_line(limits) if limits else ""))
        if rows := open_table(results, case):
            tables.append(rich_table(f"{case}, open loop", OPEN, rows))
    header, rows = best_table(results)
    tables.append(rich_table("best requests/s", header, rows))
    return tables


def rich_table(
    title: str, header: list[str] | tuple[str, ...], rows: list[tuple[str, ...]], caption: str = ""
) -> Table:
    # without edges, the range of several rounds fits into 80 columns
    table = Table(
        title=title, caption=caption or None, header_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False
    )
    for index, name in enumerate(header):
        justify: JustifyMethod = "right" if index else "left"
        table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=not index, overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0].rstrip(WRONG + CROWDED) == OURS else "")
    return table


# --- BENCHMARKS.md -------------------------------------------------------------------------------------------------


def markdown(results: Results, chart: str | None) -> str:
    """Return the generated section of the document.

    Args:
        results: the results.
        chart: path of the chart, relative to the document; None without a chart.
    """
    parts = ["\n".join(f"- {name}: {value}" for name, value in results.about.items())]
    parts.append("Systems: " + ", ".join(f"{name} {version}" for name, version in results.versions.items()) + ".")
    parts.append(method(results))
    parts.append(disturbance(results))
    header, rows = best_table(results)
    parts += ["Requests per second, at the number of clients where each system is fastest:"]
    parts += [markdown_table(header, rows)]
    if chart:
        parts.append(f"![Requests per second by number of clients, one panel per case]({chart})")
    for case in measured_cases(results):
        parts += case_section(results, case)
    if results.failures:
        parts += ["### Failures", "\n".join(map(failure_text, results.failures))]
    return "\n\n".join(parts)


def method(results: Results) -> str:
    medians = MEDIANS if any(one.round > 1 for one in results.measurements) else ""
    return METHOD.format(
        rounds=rounds_done(results),
        seconds=results.seconds,
        medians=medians,
        flat=FLAT,
        window=results.warm_up / WINDOWS,
        shortest=FEWEST * results.warm_up / WINDOWS,
        longest=results.warm_up,
        tolerated=TOLERATED,
    )


def case_section(results: Results, case: str) -> list[str]:
    parts = [f"### {case}"]
    if limits := results.limits.get(case):
        parts.append(limit_line(limits))
    if line := warm_up_line(results, case):
        parts.append(line)
    parts.append(markdown_table(CLOSED, closed_table(results, case)))
    if wrong := wrong_systems(results, case):
        descriptions = "; ".join(f"{system} {how}" for system, how in wrong.items())
        parts.append(
            f"{WRONG} The answer differs from the reference's, in its first class or by more than {TOLERANCE:g} in its "
            f"probability: {descriptions}."
        )
    if rows := open_table(results, case):
        parts.append(
            f"Open loop: requests come at random times, at {UTILISATION:.0%} of the system's best throughput. The "
            "bundle is also measured at the best peer's rate. Latency counts from a request's scheduled time."
        )
        parts.append(markdown_table(OPEN, rows))
        if any(CROWDED in row[0] for row in rows):
            parts.append(
                f"{CROWDED} Some requests may have waited for one of the load generator's {CONNECTIONS} connections, "
                "so these latencies may include time outside the server."
            )
    return parts


def markdown_table(header: list[str] | tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: list[str] | tuple[str, ...]) -> str:
        return "| " + " | ".join(cells) + " |"

    def emphasised(row: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"**{cell}**" if cell else "" for cell in row) if row[0].rstrip(WRONG + CROWDED) == OURS else row

    return "\n".join([line(header), "|---|" + "---:|" * (len(header) - 1), *(line(emphasised(row)) for row in rows)])


def failure_text(failure: Failure) -> str:
    where = ", ".join(filter(None, [failure.case, f"round {failure.round}" if failure.round else ""]))
    text = f"- {failure.system}{f' ({where})' if where else ''}: {failure.message}"
    if failure.details:
        indented = "\n".join("  " + line.replace("```", "'''") for line in failure.details.splitlines())
        text += f"\n\n  ```\n{indented}\n  ```\n"
    return text


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def relative_to(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()
