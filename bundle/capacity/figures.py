"""What was measured of one replica: what its queue needs of it, where it is kept, and what the tuner has of it."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from math import log
from pathlib import Path

import numpy as np

from bundle.capacity.queueing import Latency, Replica, closed_loop, latency
from bundle.catalog import ModelFolder
from bundle.files import write_atomically
from bundle.load.generator import LoadResult
from bundle.paths import ROOT
from bundle.tuning import report, tuner
from bundle.tuning.search import UTILISATION
from bundle.tuning.space import Candidate
from bundle.tuning.trial_server import Input

KEPT = ROOT / "build" / "capacity"
MACHINE = ("cpu", "cores", "gpus", "versions")  # what decides the speed
QUANTILES = 1000  # of the spread
DISTURBED = 0.1  # share of the usable cores that other processes may take while figures are measured
GRID = 40  # times of a batch of one that are tried, twice; the second ones lie between two of the first
SHORTEST = 0.01  # of them, as a share of the time that one client waits
HALVINGS = 12  # of the interval in which the time of each further request lies


@dataclass(frozen=True)
class Point:
    """A measured load.

    Attributes:
        clients: each waits for its answer; 0 if the requests came at random times instead.
        throughput: answers/s.
        p50, p95, p99: latency in seconds.
    """

    clients: int
    throughput: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, clients: int, load: LoadResult) -> "Point":
        """Return what was measured."""
        return cls(clients, load.throughput, load.p50, load.p95, load.p99)


@dataclass(frozen=True)
class Identity:
    """What figures are of.

    Attributes:
        model: its name.
        machine: of `bundle.machine.record`.
        archive: digest of its content without its settings.
        settings: workers, threads, batch size and so on.
        inputs: digests of what is sent.
    """

    model: str
    machine: dict
    archive: str
    settings: Candidate
    inputs: tuple[str, ...]

    @classmethod
    def of(cls, folder: ModelFolder, archive: Path, inputs: list[Input]) -> "Identity":
        """Return the identity of figures that are measured here and now."""
        settings, machine = tuner.current_settings(folder), dict(report.machine(tuner.cores()))
        digests = tuple(each["sha256"] for each in report.sent(inputs))
        return cls(folder.name, machine, report.content(archive), settings, digests)

    def difference(self, other: "Identity") -> str:
        """Return in which way the other is not the same, in words: "of another archive"; "" if it is."""
        if self.archive != other.archive:
            return "of another archive"
        if self.settings != other.settings:
            return f"of other settings: {other.settings}"
        if self.inputs != other.inputs:
            return "of other inputs"
        if any(self.machine[key] != other.machine[key] for key in MACHINE):
            return f"of another machine, or of other versions: {other.machine['cpu']}, {other.machine['cores']} cores"
        return ""


@dataclass(frozen=True)
class Figures:
    """What was measured of one replica.

    Attributes:
        source: what has measured it, in words.
        date: when.
        request_bytes, answer_bytes: length of the longest bodies; 0 if unknown.
        memory: resident memory of the workers, in bytes; 0 if unknown.
        load_cores: processor time of the load generator at full load, in cores; 0 if unknown.
        points: closed loops, by number of clients; the first is of one client.
        check: requests at random times, from which the model of the queue is not made; None if not measured.
        others: share of the usable cores that other processes took meanwhile; None if unknown.
    """

    of: Identity
    source: str
    date: str
    request_bytes: int
    answer_bytes: int
    memory: int
    load_cores: float
    points: tuple[Point, ...]
    check: Point | None
    others: float | None

    @property
    def disturbed(self) -> bool:
        """Whether other processes took so much that the figures are too low: they are kept with --anyway only."""
        return self.others is not None and self.others > DISTURBED

    @cached_property
    def predicted(self) -> Latency | None:
        """What the model of the queue predicts for the load of the check."""
        return latency(self.replica, 1, self.check.throughput) if self.check else None

    @cached_property
    def replica(self) -> Replica:
        """What a replica needs for its requests: the one whose closed loops, simulated, are most like those measured.

        A batch takes a time, and a time for each further request in it. Each client waits for a further time in which
        it occupies no worker. One client measures their sum, full batches the time of each request, and loads in
        between how the sum is divided. The times include the frontend's share, and whatever workers and frontend take
        from each other.

        Raises:
            ValueError: a load is missing.
        """
        workers, largest = self.of.settings.workers, self.of.settings.batch_size
        lone, full = self.points[0], (workers + 1) * largest
        between = [point for point in self.points if workers < point.clients < full]
        many = [point for point in self.points if point.clients >= full]
        if lone.clients != 1 or not many or not (between or largest == 1):
            raise ValueError("Figures need one client, more than workers, and a batch more than they take.")
        fastest = max(many, key=lambda point: point.throughput)
        alone, around = 1 / lone.throughput, spread(lone)

        def replica(first: float) -> Replica:
            """Return the replica whose batches of one take `first`, and whose full ones are as fast as measured."""

            def with_each(each: float) -> Replica:
                service = tuple((first + each * np.arange(largest)).tolist())
                return Replica(service, workers, alone - first, around)

            low, high = 0.0, workers * largest / fastest.throughput / max(1, largest - 1)
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                too_fast = closed_loop(with_each(middle), fastest.clients) > fastest.throughput
                low, high = (middle, high) if too_fast else (low, middle)
            return with_each(low)

        def miss(first: float) -> float:
            found = replica(first)
            return sum(log(closed_loop(found, point.clients) / point.throughput) ** 2 for point in self.points[1:])

        grid = alone * np.geomspace(SHORTEST, 1, GRID)
        best = min(grid.tolist(), key=miss)
        step = SHORTEST ** (-1 / (GRID - 1))
        finer = np.linspace(best / step, min(alone, best * step), GRID)
        return replica(min(finer.tolist(), key=miss))


def spread(lone: Point) -> tuple[float, ...]:
    """Return by how many seconds the answers to one client differ from their mean; all are equally likely.

    Such a client never waits for other requests: what delays it is the machine, the garbage collector and the like.
    """
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    seconds = np.interp(at, (0, 0.5, 0.95, 0.99), (lone.p50, lone.p50, lone.p95, lone.p99))
    return tuple((seconds - seconds.mean()).tolist())


def keep(figures: Figures, folder: Path | None = None) -> Path:
    """Write the figures down for later questions, and return the file."""
    folder = folder or KEPT
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{figures.of.model}.json"
    write_atomically(file, json.dumps(asdict(figures), indent=1) + "\n")
    return file


def kept(model: str, folder: Path | None = None) -> Figures | None:
    """Return the figures of an earlier question; None if there are none, or they are not what is needed."""
    try:
        values = json.loads(((folder or KEPT) / f"{model}.json").read_text())
        of = values.pop("of")
        of |= {"settings": Candidate(**of["settings"]), "inputs": tuple(of["inputs"])}
        points = tuple(Point(**each) for each in values.pop("points"))
        check = values.pop("check")
        figures = Figures(**values, of=Identity(**of), points=points, check=Point(**check) if check else None)
        return figures if figures.replica else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError):
        return None


def tuned(folder: ModelFolder) -> Figures | None:
    """Return the tuner's figures of the model's settings; None if it has not measured the loads that are needed."""
    try:
        found = json.loads((folder.path / "tuning.json").read_text())
        settings = tuner.current_settings(folder)
        points: dict[int, Point] = {}
        for each in found["measurements"]:
            if Candidate(**each["settings"]) == settings and not each["failed"]:
                point = point_of_tuner(each["clients"], each)
                best = points.get(point.clients)  # what disturbs a measurement makes it slower
                if best is None or point.throughput > best.throughput:
                    points[point.clients] = point
        digests = tuple(each["sha256"] for each in found["inputs"])
        figures = Figures(
            of=Identity(found["model"], found["machine"], found["archive"], settings, digests),
            source="measured by make tune",
            date=found["date"],
            request_bytes=max(each["bytes"] for each in found["inputs"]),
            answer_bytes=0,
            memory=0,
            load_cores=0.0,
            points=tuple(points[clients] for clients in sorted(points)),
            check=checked_by_tuner(found, settings),
            others=None,
        )
        return figures if figures.replica else None
    except (OSError, ValueError, TypeError, KeyError, IndexError, ZeroDivisionError):
        return None


def point_of_tuner(clients: int, load: dict) -> Point:
    """Return a load of the tuner's evidence."""
    return Point(clients, load["throughput"], *(load[f"{name}_ms"] / 1000 for name in ("p50", "p95", "p99")))


def checked_by_tuner(found: dict, settings: Candidate) -> Point | None:
    """Return the tuner's measurement of these settings with requests at random times; None if it has none."""
    for each in found["final"]:
        load = each[f"at_{UTILISATION:.0%}"]
        if Candidate(**each["settings"]) == settings and load and load["p99_ms"]:
            return point_of_tuner(0, load)
    return None
