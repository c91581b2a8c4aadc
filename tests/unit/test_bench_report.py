"""The benchmark's report of invented results."""

import io
import math
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from bundle import machine
from bundle.errors import BundleError
from bundle.load.generator import LoadResult
from loadtest.bench import report, rows
from loadtest.bench.results import CONNECTIONS, ComparedAnswer, Failure, Limit, Measurement, Results, WarmUp
from loadtest.bench.runner import connections


def measurement(
    system: str,
    throughput: float,
    clients: int | None = 16,
    round_: int = 1,
    failed: int = 0,
    rate: float | None = None,
    rate_of: str | None = None,
    p99: float = 0.02,
    others: float = 0.01,
) -> Measurement:
    answered = int(throughput * 2)
    load = LoadResult(2, answered, failed, throughput, *((0.01, 0.015, p99, 0.05) if answered else (math.inf,) * 4))
    return Measurement(
        "text", system, round_, clients, rate, rate_of, load, cpu_seconds=1.0, others=others, memory=500_000_000
    )


def results(*measurements: Measurement, **others: object) -> Results:
    names = ("bundle", "litserve", "bentoml", "mlserver")
    held = {"limits": {"text": {"pipeline": Limit(2000, 32, 2, 1), "handler": Limit(3000, 64, 1, 2)}}}
    return Results(
        machine.about(), 2, 5, {name: "1.2.3" for name in names}, **(held | others), measurements=[*measurements]
    )


def row(held: Results, system: str, clients: int = 16) -> rows.Row:
    [found] = [row for row in rows.closed_rows(held, "text") if (row.system, row.clients) == (system, clients)]
    return found


def cells(markdown: str, system: str) -> list[list[str]]:
    """Return the table rows of one system."""
    lines = [line.replace("*", "").strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if line[0].strip() == system]


def test_several_rounds_are_reported_as_median_and_range():
    seen = [measurement("bundle", rate, round_=index, failed=index) for index, rate in enumerate((900, 100, 1000))]
    found = row(results(*seen), "bundle")
    assert found.throughput == 900
    assert found.failed == 3
    assert found.cpu_per_request == 1 / 1800
    text = report.markdown(results(*seen), None)
    assert cells(text, "bundle")[1][2] == "900 (100-1,000)"
    assert "\n3 rounds, 2 s for each number of clients. Numbers are" in text


def test_one_round_is_reported_without_median_and_range():
    text = report.markdown(results(measurement("bundle", 900)), None)
    assert "\n1 round, 2 s" in text
    assert "median" not in report.method(results(measurement("bundle", 900)))
    assert cells(text, "bundle")[1][2] == "900"


def test_unequal_numbers_of_rounds_are_reported_as_a_range():
    """The second round was interrupted."""
    seen = [measurement(name, 900, round_=round_) for name, round_ in (("bundle", 1), ("litserve", 1), ("litserve", 2))]
    assert report.rounds_done(results(*seen)) == "1 to 2 rounds"


def test_ratio_is_to_the_best_peer_at_the_same_number_of_clients():
    held = results(
        measurement("bundle", 1000),
        measurement("litserve", 400),
        measurement("bentoml", 500),
        measurement("bundle", 300, clients=1),
        measurement("litserve", 600, clients=1),
    )
    assert row(held, "bundle").to_best_peer == 2
    assert row(held, "litserve").to_best_peer == 0.8
    assert row(held, "bentoml").to_best_peer == 1
    assert row(held, "bundle", clients=1).to_best_peer == 0.5


def test_own_limit_of_the_bundle_is_floor_and_handler_and_of_a_peer_the_pipeline():
    held = results(
        measurement("bundle", 1000),
        measurement("litserve", 1000),
        *[measurement("floor", rate, round_=index) for index, rate in enumerate((5500, 6000, 7000))],
        measurement("floor", 600, clients=1),
        measurement("bundle", 250, clients=1),
    )
    assert row(held, "bundle").to_limit == pytest.approx(1 / 2)  # 1 / (1 / 6000 + 1 / 3000) = 2000
    assert row(held, "bundle", clients=1).to_limit == pytest.approx(1 / 2)  # 1 / (1 / 600 + 1 / 3000) = 500
    assert row(held, "litserve").to_limit == 1 / 2  # of the pipeline's 2000
    assert row(held, "floor").to_limit is None


@pytest.mark.parametrize("others", [{"limits": {}}, {}])
def test_own_limit_of_the_bundle_is_missing_without_a_floor_or_a_handler(others: dict):
    floor = [measurement("floor", 6000)] if others else [measurement("floor", 6000, clients=1)]
    assert row(results(measurement("bundle", 1000), *floor, **others), "bundle").to_limit is None


def test_floor_is_no_peer():
    names = ("bundle", "floor", "litserve")
    held = results(measurement("bundle", 1000), measurement("floor", 6000), measurement("litserve", 500))
    held.versions = dict.fromkeys(names, "1")
    assert row(held, "bundle").to_best_peer == 2
    assert row(held, "floor").to_best_peer is None
    header, best = report.best_table(held)
    assert [line[0] for line in best] == ["bundle", "litserve", "bundle × best peer"]


def test_warm_up_is_reported_with_its_length_and_the_systems_whose_rate_changed():
    held = results(measurement("bundle", 1000))
    assert report.warm_up_line(held, "text") == ""
    turns = [("bundle", 9, True), ("bundle", 12, True), ("bundle", 18, True), ("litserve", 30, False)]
    held.warm_ups += [WarmUp("text", system, index, *how) for index, (system, *how) in enumerate(turns)]
    held.warm_ups.append(WarmUp("mnist", "bundle", 1, 27, False))
    line = "Warm-up: bundle 12 s, litserve 30 s. The rate still changed at its end, in some round: litserve."
    assert report.warm_up_line(held, "text") == line
    assert f"\n{line}\n" in report.markdown(held, None)
    assert "less than 5% between two windows of 0.5 s, for 1.5 to 5 s" in report.method(held)


def test_rows_are_sorted_by_clients_and_throughput():
    held = results(measurement("litserve", 400), measurement("bundle", 100), measurement("bundle", 900, clients=64))
    assert [(row.clients, row.system) for row in rows.closed_rows(held, "text")] == [
        (16, "litserve"),
        (16, "bundle"),
        (64, "bundle"),
    ]


def test_peer_that_fails_requests_is_not_the_best():
    held = results(measurement("bundle", 1000), measurement("litserve", 900, failed=100), measurement("bentoml", 500))
    assert row(held, "bundle").to_best_peer == 2
    assert cells(report.markdown(held, None), "bundle × best peer") == [["bundle × best peer", "2.00"]]


def test_system_with_wrong_answers_is_marked_and_not_the_best():
    answers = [
        ComparedAnswer("text", "litserve", 1, (7, 0.9), (130, 0.99)),
        ComparedAnswer("text", "bentoml", 1, (130, 0.975), (130, 0.99)),
        ComparedAnswer("text", "bundle", 1, (130, 0.93), (130, 0.99)),
    ]
    held = results(
        measurement("bundle", 1000), measurement("litserve", 900), measurement("bentoml", 500), answers=answers
    )
    text = report.markdown(held, None)
    assert row(held, "bundle").to_best_peer == 2
    assert cells(text, "litserve†")[0][:3] == ["litserve†", "16", "900"]
    assert cells(text, "bundle†")[0][:3] == ["bundle†", "16", "1,000"]
    assert "litserve answers class 7 with 0.900; the reference answers 130 with 0.990" in text
    assert "bentoml answers" not in text


def test_ratio_without_a_peer_or_a_limit_is_missing():
    held = results(measurement("bundle", 1000), limits={})
    assert row(held, "bundle").to_best_peer is row(held, "bundle").to_limit is None
    assert cells(report.markdown(held, None), "bundle × best peer") == []


def test_latencies_without_a_good_answer_are_missing():
    [_, found] = cells(report.markdown(results(measurement("litserve", 0, failed=50)), None), "litserve")
    assert found[2:6] == ["0", "-", "-", "50"]


def test_failure_is_reported_in_the_table_and_with_its_log():
    failures = [
        Failure("mlserver", None, None, "uv cannot make build/bench/env/mlserver.", "no such package\nhint: check it"),
        Failure("bentoml", "text", 1, "The server ended with status 3 before it answered.", "Traceback\n```\nboom"),
        Failure("bundle", "text", 2, "wrk could not load it."),
    ]
    text = report.markdown(results(measurement("bundle", 1000), failures=failures), None)
    assert cells(text, "mlserver")[0][:3] == ["mlserver", "", "failed"]
    assert cells(text, "bentoml")[0][:3] == ["bentoml", "", "failed"]
    assert [line[2] for line in cells(text, "bundle")[1:]] == ["1,000"]
    assert "- bentoml (text, round 1): The server ended with status 3 before it answered.\n\n  ```\n  Traceback" in text
    assert "hint: check it" in text
    assert text.count("```") == 4  # a log cannot end the code block that it is in


def test_open_loop_at_a_peers_rate_has_its_own_row():
    held = results(
        measurement("bundle", 699, None, rate=700, rate_of="bundle"),
        measurement("bundle", 349, None, rate=350, rate_of="litserve", p99=0.012),
        measurement("litserve", 348, None, rate=350, rate_of="litserve"),
    )
    assert [line[:7] for line in report.open_table(held, "text")] == [
        ("bundle", "700", "itself", "699", "10", "15", "20"),
        ("bundle", "350", "best peer", "349", "10", "15", "12"),
        ("litserve", "350", "itself", "348", "10", "15", "20"),
    ]


@pytest.mark.parametrize(("rate", "is_crowded"), [(10_000, False), (60_000, True)])
def test_open_loop_with_too_few_connections_is_marked(rate: int, is_crowded: bool):
    """At a median latency of 10 ms, 100 or 600 of the 1,024 connections are busy."""
    text = report.markdown(results(measurement("bundle", rate, None, rate=rate, rate_of="bundle")), None)
    assert ("| **bundle‡** |" in text) == ("may have waited" in text) == is_crowded


@pytest.mark.parametrize(("requests", "expected"), [(0.5, 5), (21, 44), (7200, CONNECTIONS)])
def test_open_loop_has_a_connection_for_each_request_up_to_the_limit(requests: float, expected: int):
    assert connections(requests) == expected


@pytest.mark.parametrize("rounds", [1, 2])
def test_terminal_tables_fit_80_columns(rounds: int):
    held = results(
        *[
            measurement(system, rate, 256, round_)
            for round_ in range(1, rounds + 1)
            for system, rate in (("torchserve-batched", 12345), ("bundle", 54321))
        ]
    )
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    for table in report.terminal_tables(held):
        console.print(table)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    ranges = ("(12,345-12,345)", "(54,321-54,321)") if rounds > 1 else ()
    for whole in ("torchserve-batched", "12,345", "54,321", *ranges):
        assert whole in shown, "nothing is cut off"
    assert "…" not in shown


@pytest.mark.parametrize(("others", "is_idle"), [(0.01, True), (0.3, False)])
def test_busy_machine_is_reported(others: float, is_idle: bool):
    held = results(measurement("bundle", 1000, others=others), measurement("litserve", 500, others=others))
    assert ("not idle" not in report.markdown(held, None)) == is_idle


def test_results_read_back_are_equal(tmp_path: Path):
    held = results(
        measurement("bundle", 1000),
        measurement("litserve", 0, failed=3),
        measurement("bundle", 349, None, rate=350, rate_of="litserve"),
        answers=[ComparedAnswer("text", "litserve", 1, (7, 0.9), (130, 0.99))],
        failures=[Failure("mlserver", None, None, "no", "log")],
        warm_ups=[WarmUp("text", "bundle", 1, 9, True)],
    )
    held.save(tmp_path / "results.json")
    assert "Infinity" not in (tmp_path / "results.json").read_text()
    assert Results.read(tmp_path / "results.json") == held


@pytest.mark.parametrize("content", [None, "{", "[]", '{"limits": {}}'])
def test_invalid_results_file_is_rejected(tmp_path: Path, content: str | None):
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BundleError, match="make bench"):
        Results.read(file)


@pytest.mark.parametrize("systems", [1, 4])
def test_chart_is_small_and_shows_each_system(tmp_path: Path, systems: int):
    chart = pytest.importorskip("loadtest.bench.chart", reason="the chart needs requirements/loadtest.txt")
    names = ("bundle", "litserve", "bentoml", "mlserver")[:systems]
    held = results(*[measurement(name, 100 * count, count) for name in names for count in (1, 16, 64)])
    chart.draw(held, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size < 150_000
    with Image.open(tmp_path / "chart.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    expected = [chart.OUR_COLOUR, *(colour for colour, _ in chart.PEERS[: systems - 1])]
    assert {ImageColor.getrgb(colour) for colour in expected} <= colours
