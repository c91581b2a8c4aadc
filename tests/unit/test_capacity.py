"""The capacity model: the plan, the figures that it is made of, and the answer."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bundle.capacity import figures as figures_module
from bundle.capacity import queueing
from bundle.capacity.figures import Figures, Identity, Point, keep, kept, tuned
from bundle.capacity.measurement import clients, whole
from bundle.capacity.planning import plan, smallest
from bundle.capacity.queueing import HIGHEST_LOAD, Replica, closed_loop, latency
from bundle.capacity.report import as_dict, lines, table
from bundle.catalog import ModelFolder
from bundle.cli import capacity as command
from bundle.errors import BundleError
from bundle.load.generator import LoadResult
from bundle.paths import ROOT
from bundle.tuning import report
from bundle.tuning.search import UTILISATION, Arrivals, Score, Verdict
from bundle.tuning.search import Point as TunerPoint
from bundle.tuning.space import Candidate
from bundle.tuning.trial_server import Service

BATCHES = Replica(service=tuple(0.004 + 0.001 * size for size in range(1, 9)), workers=2)


@pytest.fixture(autouse=True)
def short_simulations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queueing, "REQUESTS", 20_000)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_keeps_the_target_without_the_spare_replicas_and_one_fewer_would_not():
    questions = ((5000, 0.012, 1), (5000, 0.012, 0), (300, 0.030, 2), (90_000, 0.025, 1), (2466, 10, 2))
    for rate, target, spare in questions:
        found = plan(BATCHES, rate, target, spare)
        assert found.left.p99 <= target
        assert found.whole.p99 <= target
        assert found.load <= UTILISATION
        assert found.load_left <= HIGHEST_LOAD
        fewer = found.replicas - 1
        too_few = fewer - spare < 1 or latency(BATCHES, fewer - spare, rate).p99 > target
        too_busy = rate > UTILISATION * fewer * BATCHES.capacity
        assert too_few or too_busy or rate > HIGHEST_LOAD * (fewer - spare) * BATCHES.capacity


def test_plan_grows_with_the_rate_the_spare_replicas_and_a_shorter_target():
    rates = [plan(BATCHES, rate, 0.030, 1).replicas for rate in (10, 1000, 5000, 50_000)]
    assert rates == sorted(rates)
    assert rates[0] == 2
    spares = [plan(BATCHES, 5000, 0.030, spare).replicas for spare in (0, 1, 2, 5)]
    assert all(later >= earlier for earlier, later in pairwise(spares))
    assert plan(BATCHES, 5000, 0.009, 1).replicas > plan(BATCHES, 5000, 0.030, 1).replicas


def test_target_below_the_service_time_is_impossible():
    with pytest.raises(BundleError, match="No number of replicas keeps a p99 of 4 ms: a request that waits for no"):
        plan(BATCHES, 10, 0.004, 1)


@pytest.mark.parametrize("wanted", [3, 4, 5, 17, 100])
def test_smallest_number_is_found(wanted: int):
    assert smallest(lambda number: number >= wanted, 3) == wanted


# --- figures ----------------------------------------------------------------------------------------------------------

MACHINE = {"cpu": "A", "cores": 2, "gpus": [], "versions": {"torch": "2"}, "memory_gib": 8.0, "system": "Linux"}
SETTINGS = Candidate(workers=2, threads=1, batch_size=8, delay=1)
OF = Identity("toy", MACHINE, "digest", SETTINGS, ("input",))


def figures(replica: Replica, numbers: tuple[int, ...]) -> Figures:
    """Figures of a replica that is exactly what the model takes it for."""
    lone = replica.service[0] + replica.transit
    points = tuple(Point(clients, closed_loop(replica, clients), lone, lone, lone) for clients in numbers)
    settings = replace(SETTINGS, workers=replica.workers, batch_size=len(replica.service))
    return Figures(replace(OF, settings=settings), "simulated", "today", 5000, 100, 2**30, 0.02, points, None, 0.01)


SLOW, FAST = (0.004, 0.001, 8), (0.0005, 0.00005, 64)  # fixed time, time of a request, batch size
SINGLE = (0.005, 0.0, 1)


@pytest.mark.parametrize("transit", [0.1, 1, 3], ids=lambda share: f"transit {share} x service")
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", [SLOW, FAST, SINGLE], ids=["slow", "fast", "single"])
def test_replica_is_recovered_from_closed_loops(kind: tuple[float, float, int], workers: int, transit: float):
    """A client that needs long to return leaves workers idle: a throughput alone does not tell the service time."""
    fixed, each, largest = kind
    service = tuple(fixed + each * size for size in range(1, largest + 1))
    replica = Replica(service, workers, transit * service[0])
    settings = Candidate(workers=workers, threads=1, batch_size=largest, delay=1)
    found = figures(replica, tuple(clients(settings))).replica
    assert found.capacity == pytest.approx(replica.capacity, rel=0.02)
    assert found.service[0] + found.transit == pytest.approx(service[0] + replica.transit)
    for load in (0.3, 0.7):
        said, true = (latency(each, 1, load * replica.capacity) for each in (found, replica))
        assert (said.p50, said.p99) == pytest.approx((true.p50, true.p99), rel=0.13)


def test_closed_loop_of_a_known_system_has_its_throughput():
    """Two workers, 10 ms: four clients keep both busy, and two that need 30 ms to return are answered every 40 ms."""
    assert closed_loop(Replica((0.010,), 2), 4) == pytest.approx(200)
    assert closed_loop(Replica((0.010,), 2, transit=0.030), 2) == pytest.approx(50, rel=0.01)
    assert closed_loop(Replica((0.010, 0.015), 1), 4) == pytest.approx(2 / 0.015)


def test_full_batch_that_seems_faster_than_a_single_request_takes_as_long():
    measured = ((1, 90), (2, 100), (8, 800))
    points = tuple(Point(number, rate, 0.01, 0.01, 0.01) for number, rate in measured)
    settings = replace(SETTINGS, workers=1, batch_size=4)
    found = Figures(replace(OF, settings=settings), "", "", 0, 0, 0, 0.0, points, None, None).replica
    assert found.service[-1] == pytest.approx(found.service[0], rel=0.01)


def test_spread_has_the_quantiles_of_a_single_client():
    point = Point(clients=1, throughput=100, p50=0.010, p95=0.014, p99=0.030)
    found = np.array(figures_module.spread(point))
    assert found.mean() == pytest.approx(0)
    assert np.quantile(found, 0.99) - np.quantile(found, 0.5) == pytest.approx(0.020, rel=0.06)


def test_kept_figures_are_read_again(tmp_path: Path):
    written = replace(figures(BATCHES, (1, 3, 24)), check=Point(0, 700.0, 0.01, 0.015, 0.02))
    keep(written, tmp_path)
    assert kept("toy", tmp_path) == written
    assert kept("other", tmp_path) is None
    without = json.loads((tmp_path / "toy.json").read_text())
    del without["others"]
    (tmp_path / "toy.json").write_text(json.dumps(without))
    assert kept("toy", tmp_path) is None  # nobody knows whether they were disturbed
    (tmp_path / "toy.json").write_text('{"of": 3}')
    assert kept("toy", tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"archive": "another"}, "of another archive"),
        ({"settings": replace(SETTINGS, workers=4)}, "of other settings: workers 4"),
        ({"inputs": ("another",)}, "of other inputs"),
        ({"machine": MACHINE | {"cpu": "B"}}, "of another machine, or of other versions: B, 2 cores"),
        ({"machine": MACHINE | {"versions": {"torch": "3"}}}, "of another machine, or of other versions"),
        ({"machine": MACHINE | {"memory_gib": 7.9}}, ""),
    ],
)
def test_figures_of_something_else_are_recognised(changed: dict, message: str):
    assert OF.difference(replace(OF, **changed)).startswith(message)
    assert bool(OF.difference(replace(OF, **changed))) == bool(message)


def load(throughput: float, seconds: float) -> LoadResult:
    return LoadResult(1.0, round(throughput), 0, throughput, seconds, seconds, seconds, seconds)


def evidence(folder: ModelFolder, points: list[TunerPoint], settings: Candidate) -> None:
    """Write what the tuner writes."""
    verdict = Verdict(settings, {settings: Score(600.0, -0.02, 24)}, False, "")
    found = {
        "model": folder.name,
        "inputs": [{"file": "a", "bytes": 5, "sha256": "input"}],
        "archive": "digest",
        "machine": MACHINE,
        **report.outcome(settings, verdict, {settings: Arrivals(24, load(420, 0.015))}),
        **report.measured(points, {}, {}),
    }
    (folder.path / "tuning.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    (tmp_path / "toy").mkdir()
    config = "minWorkers: 2\nmaxWorkers: 2\nbatchSize: 8\nmaxBatchDelay: 1\nhandler: {threads: 1}\n"
    (tmp_path / "toy" / "model-config.yaml").write_text(f"{config}bundle: {{handler: mnist}}\n")
    return ModelFolder(tmp_path / "toy")


def test_figures_of_the_tuner_are_those_of_the_models_own_settings(folder: ModelFolder):
    points = [
        TunerPoint(SETTINGS, "round 1", clients, load(*seen))
        for clients, seen in ((1, (100, 0.010)), (4, (300, 0.012)), (24, (500, 0.040)))
    ]
    points.append(TunerPoint(replace(SETTINGS, workers=1), "round 1", 1, load(900, 0.001)))
    points.append(TunerPoint(SETTINGS, "final", 24, load(600, 0.038)))
    evidence(folder, points, SETTINGS)
    found = tuned(folder)
    assert found is not None
    assert OF.difference(found.of) == ""
    assert [(point.clients, point.throughput) for point in found.points] == [(1, 100), (4, 300), (24, 600)]
    assert found.check == Point(0, 420, 0.015, 0.015, 0.015)
    assert found.replica.capacity == pytest.approx(600, rel=0.01)
    assert (found.others, found.disturbed) == (None, False)


def test_too_few_figures_of_the_tuner_are_none(folder: ModelFolder):
    assert tuned(folder) is None
    evidence(folder, [TunerPoint(SETTINGS, "final", clients, load(100, 0.01)) for clients in (1, 24)], SETTINGS)
    assert tuned(folder) is None
    evidence(folder, [TunerPoint(SETTINGS, "final", clients, load(100, 0.01)) for clients in (4, 8, 24)], SETTINGS)
    assert tuned(folder) is None


def test_shipped_evidence_without_a_digest_of_its_archive_is_not_used():
    from bundle.catalog import select

    assert tuned(select(["image"])[0]) is None


def test_failed_requests_are_an_error_that_names_the_logs_of_the_measured_server():
    service = Service(SETTINGS, "", [], 0.0, 0, "", 0, ROOT / "build" / "run" / "capacity" / "logs")
    complete = load(100, 0.010)
    assert whole(complete, service) == complete
    with pytest.raises(BundleError, match=r"^11 requests failed .* model_log.log .* in build/run/capacity/logs$"):
        whole(replace(complete, failed=11), service)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_plan_is_shown_with_its_replica_its_figures_and_a_check():
    seen = replace(figures(BATCHES, (1, 3, 24)), check=Point(0, 900.0, 0.01, 0.015, 0.02), load_cores=0.3)
    found = plan(seen.replica, 5000, 0.030, 1)
    shown = table(found, "toy")
    assert shown.title == f"toy: 5,000 requests/s with a p99 of 30 ms need {found.replicas} replicas"
    assert shown.row_count == 2
    text = "\n".join(lines(found, seen))
    assert "a replica: 2 cores, no GPU, workers 2, threads 1, batch 8, batch delay 1 ms, precision auto, " in text
    each = f"{2 * found.replicas / 5:.3g}"
    assert f"in all: {2 * found.replicas} cores, which is {each} for each 1,000 requests/s; " in text
    assert "204 Mbit/s of bodies" in text
    assert "p50 10.0 ms, p99 20.0 ms; the model says" in text
    assert "The load generator took 0.30 of the cores" in text
    assert "warning" not in text
    values = json.loads(json.dumps(as_dict(found, seen)))
    assert values["warnings"] == []
    assert values["replicas"] == found.replicas
    assert values["figures"]["of"]["settings"]["workers"] == 2


def test_busy_machine_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu: [90.0, 0.0, 10.0, 60.0])
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 3})
    with pytest.raises(BundleError, match="The figures would be too low: other processes use 75 % of the CPU"):
        command.check_idle()


@pytest.mark.parametrize(
    ("rate", "target", "p99", "faults"),
    [
        (50_000, 0.020, 0.020, ""),
        (50_000, 0.020, 0.021, "21.0 ms, above the target of 20 ms. The plan's"),
        (
            50_000,
            0.020,
            0.352,
            r"352.0 ms, above the target of 20 ms and \d\d\.\d times what the model says. The plan's",
        ),
        (50_000, 1, 0.352, r"352.0 ms, \d\d\.\d times what the model says. The plan's"),
        (100, 0.020, 0.021, ""),  # the two replicas have nearly nothing to do
    ],
)
def test_check_that_contradicts_the_plan_ends_the_answer_with_a_warning(
    rate: float, target: float, p99: float, faults: str
):
    seen = figures(BATCHES, (1, 3, 24))
    seen = replace(seen, check=Point(0, 0.7 * seen.replica.capacity, 0.01, p99, p99), load_cores=0.3)
    found = plan(seen.replica, rate, target, 1)
    last = lines(found, seen)[-1]
    assert last.startswith("warning: ") == bool(faults)
    assert as_dict(found, seen)["warnings"] == ([last] if faults else [])
    if faults:
        assert re.search(faults, last)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_check_says_why_its_p99_is_longer_than_the_plans(load: float):
    """The same replica at the same load of each: only the choice of the fewest in flight makes the difference."""
    seen = figures(BATCHES, (1, 3, 24))
    rate = load * seen.replica.capacity
    seen = replace(seen, check=Point(0, rate, 0.01, 0.02, 0.02))
    assert seen.predicted is not None
    assert latency(seen.replica, 16, 16 * rate, "random") == seen.predicted
    assert latency(seen.replica, 16, 16 * rate, "least").p99 < seen.predicted.p99
    reason = "The check is of one replica alone."
    many = 3 * seen.replica.capacity
    for planned, balance, explained in ((many, "least", True), (10, "least", False), (many, "random", False)):
        text = "\n".join(lines(plan(seen.replica, planned, 1, 1, balance), seen))
        assert (reason in text) == explained


@pytest.mark.parametrize(("others", "used"), [(0.10, True), (0.34, False), (None, True)])
def test_figures_of_a_busy_machine_are_used_with_anyway_only(
    others: float | None, used: bool, folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr(figures_module, "KEPT", tmp_path / "capacity")
    written = replace(figures(BATCHES, (1, 3, 24)), others=others)
    keep(written, tmp_path / "capacity")
    assert command.usable(folder, written.of, anyway=True) == written
    assert capsys.readouterr().err == ""
    assert command.usable(folder, written.of, anyway=False) == (written if used else None)
    said = capsys.readouterr().err
    assert (
        "toy.json is not used: other processes used 34% of the CPU while it was measured. To use it" in said
    ) != used


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (0.034, "; other processes used 3% of the CPU meanwhile"),
        (0.61, "; other processes used 61% of the CPU meanwhile, accepted with --anyway"),
        (None, "; how much of the CPU other processes used meanwhile is unknown"),
    ],
)
def test_figures_are_shown_with_what_other_processes_used(others: float | None, said: str):
    seen = replace(figures(BATCHES, (1, 3, 24)), others=others)
    [line] = [line for line in lines(plan(seen.replica, 5000, 0.030, 1), seen) if line.startswith("figures: ")]
    assert line.endswith(said)
