"""Describe what a search found: as a table, in words, and as JSON for the evidence."""

import json
import math
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bundle import mar, signing
from bundle.digests import digest
from bundle.load.generator import LoadResult, wrk
from bundle.machine import Record, record
from bundle.tuning.search import UTILISATION, Arrivals, Point, Score, Verdict, front, meets
from bundle.tuning.space import Candidate
from bundle.tuning.trial_server import Input


def table(points: list[Point], current: Candidate, best: Candidate, target: float) -> Table:
    """Return the Pareto front as a table.

    Args:
        points: one for each candidate and concurrency.
        target: of the p99 latency, in seconds.
    """
    heads = ("answers/s", "p99 ms", "clients", "workers", "threads", "batch", "delay", "precision", "")
    shown = Table(title="Pareto front", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for head in heads:
        shown.add_column(head, justify="left" if head in ("precision", "") else "right", no_wrap=True)
    names = {current: "now", best: "best"} if current != best else {best: "now"}
    for point in front(points):
        candidate, load = point.candidate, point.load
        cells = (candidate.workers, candidate.threads, candidate.batch_size)
        delay = f"{candidate.delay} ms" if candidate.batch_size > 1 else ""
        numbers = (f"{load.throughput:.1f}", f"{1000 * load.p99:.1f}", point.concurrency, *cells, delay)
        style = "" if meets(load, target) else "dim"
        style = "bold green" if candidate == best and not style else style
        shown.add_row(*map(str, numbers), candidate.precision, names.get(candidate, ""), style=style)
    return shown


def describe(score: Score) -> str:
    """Return a candidate's score in words."""
    if not score.throughput:
        return "target missed" if math.isinf(score.nearness) else f"target missed: p99 {-1000 * score.nearness:.1f} ms"
    return f"{score.throughput:.1f} answers/s, p99 {-1000 * score.nearness:.1f} ms, {score.concurrency} clients"


def describe_steady(load: LoadResult) -> str:
    """Return what a finalist did with requests at random times, in words."""
    latencies = f"p50 {1000 * load.p50:.1f} ms, p99 {1000 * load.p99:.1f} ms"
    return f"at {UTILISATION:.0%} of this rate, with requests at random times: {latencies}"


def outcome(current: Candidate, verdict: Verdict, steady: dict[Candidate, Arrivals]) -> dict:
    """Return the decision and its reason, for the evidence.

    Args:
        steady: results with requests at random times, of the finalists that kept the target.
    """
    ranked = sorted(verdict.scores.items(), key=lambda item: item[1], reverse=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "current": asdict(current),
        "best": asdict(verdict.best),
        "replaces": verdict.replaces,
        "reason": verdict.reason,
        "final": [
            {
                "settings": asdict(candidate),
                **as_milliseconds(score),
                f"at_{UTILISATION:.0%}": numbers(steady[candidate].load) if candidate in steady else None,
            }
            for candidate, score in ranked
        ],
    }


def measured(points: list[Point], broken: dict[Candidate, str], precisions: dict[Candidate, str]) -> dict:
    """Return every measurement in order, for the evidence.

    Args:
        broken: the candidates that could not be served, and why.
        precisions: the precision that each candidate computed in.
    """
    return {
        "method": "successive halving; closed loops; the final in turns, compared by medians, and an open loop",
        "measurements": [measurement(point, precisions) for point in points],
        "not_servable": [{"settings": asdict(candidate), "error": error} for candidate, error in broken.items()],
    }


def as_milliseconds(score: Score) -> dict:
    """Return a score, with its p99 in milliseconds."""
    p99 = None if math.isinf(score.nearness) else round(-1000 * score.nearness, 3)
    return {"throughput": round(score.throughput, 2), "p99_ms": p99, "clients": score.concurrency}


def measurement(point: Point, precisions: dict[Candidate, str]) -> dict:
    """Return one measurement, with its settings."""
    return {
        "stage": point.stage,
        "settings": asdict(point.candidate),
        "computed_in": precisions.get(point.candidate, ""),
        "clients": point.concurrency,
        **numbers(point.load),
    }


def numbers(load: LoadResult) -> dict[str, float | int | None]:
    """Return a load's counts, throughput and latencies (ms; None if no answer was good)."""
    latencies = {
        f"{name}_ms": round(1000 * getattr(load, name), 3) if math.isfinite(getattr(load, name)) else None
        for name in ("p50", "p95", "p99", "longest")
    }
    counts = {"answered": load.answered, "failed": load.failed, "throughput": round(load.throughput, 2)}
    return {"seconds": round(load.seconds, 2), **counts, **latencies}


def sent(inputs: list[Input]) -> list[dict]:
    """Return what was sent, for the evidence."""
    return [{"file": each.file.name, "bytes": len(each.body), "sha256": digest(each.body)} for each in inputs]


def content(archive: Path) -> str:
    """Return a digest of an archive's content, without its settings and the time of its build."""
    left_out = {mar.MANIFEST, mar.manifest(archive).get("configFile")}
    members = signing.read(archive).digests
    return digest(json.dumps({name: members[name] for name in sorted(members) if name not in left_out}))


def machine(cores: int) -> Record:
    """Return the machine and the versions, with that of wrk."""
    found = record(cores)
    found["versions"]["wrk"] = wrk_version()
    return found


def wrk_version() -> str:
    """Return the version that `wrk --version` prints."""
    words = subprocess.run([wrk(), "--version"], capture_output=True, text=True, check=False).stdout.split()
    return words[1] if len(words) > 1 else "unknown"
