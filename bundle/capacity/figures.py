"""What was measured of one replica: what its queue needs of it, where it is kept, and what the tuner has of it."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bundle.capacity.queueing import Replica
from bundle.catalog import ModelFolder
from bundle.files import write_atomically
from bundle.paths import ROOT
from bundle.tuning import report, tuner
from bundle.tuning.search import UTILISATION
from bundle.tuning.space import Candidate
from bundle.tuning.trial_server import Input

KEPT = ROOT / "build" / "capacity"
MACHINE = ("cpu", "cores", "gpus", "versions")  # what decides the speed
QUANTILES = 200  # of the spread


@dataclass(frozen=True)
class Point:
    """A closed loop: clients that each wait for their answer.

    Attributes:
        throughput: answers/s.
        p50, p95, p99: latency in seconds.
    """

    clients: int
    throughput: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Check:
    """A measurement with requests at random times, which the model of the queue is not made of.

    Attributes:
        rate: requests/s.
        p50, p99: latency in seconds.
    """

    rate: float
    p50: float
    p99: float


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
        check: None if it was not measured.
    """

    of: Identity
    source: str
    date: str
    request_bytes: int
    answer_bytes: int
    memory: int
    load_cores: float
    points: tuple[Point, ...]
    check: Check | None

    @cached_property
    def replica(self) -> Replica:
        """What a replica needs for its requests: a time for each batch, and a time for each request in it.

        Two loads tell them apart. With one client more than workers, a worker that becomes free finds one request: W
        workers answer W requests in the time of a batch of one. With a batch more than the workers take, it finds a
        full batch. In between, batches are equal only with one worker. The times include the frontend's
        share, and whatever workers and frontend take from each other.

        Raises:
            ValueError: a load is missing.
        """
        workers, largest = self.of.settings.workers, self.of.settings.batch_size
        lone = self.points[0]
        few = next((point for point in self.points if point.clients > workers), None)
        many = [point for point in self.points if point.clients >= (workers + 1) * largest]
        if lone.clients != 1 or few is None or not many or (workers > 1 and few.clients >= 2 * (workers + 1)):
            raise ValueError("Figures need one client, one more than workers, and a batch more than they take.")
        small = min(float(largest), few.clients / (workers + 1))
        seconds = workers * small / few.throughput
        full = workers * largest / max(point.throughput for point in many)
        # a full batch takes no less time: where it seems so, something disturbed the measurement
        each = max(0.0, full - seconds) / max(1.0, largest - small)
        service = np.maximum(seconds + each * (np.arange(1, largest + 1) - small), each)
        transit = max(0.0, 1 / lone.throughput - service[0])
        return Replica(tuple(service.tolist()), workers, float(transit), spread(lone))


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
    """Return the figures of an earlier question; None if there are none, or another bundle wrote them."""
    try:
        values = json.loads(((folder or KEPT) / f"{model}.json").read_text())
        of = values.pop("of")
        of |= {"settings": Candidate(**of["settings"]), "inputs": tuple(of["inputs"])}
        points = tuple(Point(**each) for each in values.pop("points"))
        check = values.pop("check")
        return Figures(**values, of=Identity(**of), points=points, check=Check(**check) if check else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def tuned(folder: ModelFolder) -> Figures | None:
    """Return the tuner's figures of the model's settings; None if it has not measured the loads that are needed."""
    try:
        found = json.loads((folder.path / "tuning.json").read_text())
        settings = tuner.current_settings(folder)
        points: dict[int, Point] = {}
        for each in found["measurements"]:
            if Candidate(**each["settings"]) == settings and not each["failed"]:
                seconds = [each[f"{name}_ms"] / 1000 for name in ("p50", "p95", "p99")]
                point = Point(each["clients"], each["throughput"], *seconds)
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
        )
        return figures if figures.replica else None
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


def checked_by_tuner(found: dict, settings: Candidate) -> Check | None:
    """Return the tuner's measurement of these settings with requests at random times; None if it has none."""
    for each in found["final"]:
        load = each[f"at_{UTILISATION:.0%}"]
        if Candidate(**each["settings"]) == settings and load and load["p99_ms"]:
            return Check(load["throughput"], load["p50_ms"] / 1000, load["p99_ms"] / 1000)
    return None
