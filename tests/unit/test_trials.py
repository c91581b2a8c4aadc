"""What the fault trials and the soak count, and where they write it."""

import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.catalog import select
from bundle.load.generator import LoadResult
from models.mnist.model import build
from tests.support import wait_for
from tests.trials import memory, soak
from tests.trials.faults.load import recovery_time
from tests.trials.faults.traffic import Answer, Connections, error_type, longest_silence, p99, statuses
from tests.trials.faults.trial import Outcome
from tests.trials.faults.workers import given_up
from tests.trials.reliability import TITLE, write_section

RIGHT = Answer(due=0, done=0.1, status=200, right=True)
REFUSED = Answer(due=1, done=1.1, status=429, retry_after=True, problem="Overloaded")
FAILED = Answer(due=2, done=2.1, status=500, problem="PredictionFailed")
WRONG = Answer(due=2, done=2.1, status=200)
NO_RETRY_AFTER = Answer(due=3, done=3.1, status=503)
DIED = Answer(due=3, done=3.1, status=503, retry_after=True, problem="WorkerDied")
NONE = "no error body"
LOST = Answer(due=4, done=44, status=None, problem="TimeoutError")


def test_every_answer_is_counted_once():
    outcome = Outcome([RIGHT, RIGHT, REFUSED, FAILED, WRONG, NO_RETRY_AFTER, DIED, LOST])
    counted = (outcome.answered, outcome.refused, outcome.failed, outcome.lost)
    assert counted == (2, 1, 4, 1)
    assert outcome.row()["sent"] == sum(counted)
    assert statuses(outcome.answers)["429 Overloaded"] == 1
    assert statuses(outcome.answers)["TimeoutError"] == 1


def test_broken_limit_is_recorded():
    outcome = Outcome([RIGHT])
    outcome.require(True, "this holds")
    outcome.require(False, "that holds")
    assert outcome.broken == ["that holds"]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5), st.booleans()), min_size=1))
def test_longest_silence_is_the_longest_time_without_a_correct_answer(drawn: list[tuple[int, int, bool]]):
    answers = [Answer(due, due + took, 200 if right else 500, right) for due, took, right in drawn]
    begin, end = min(due for due, *_ in drawn), max(due for due, *_ in drawn)
    correct = {due + took for due, took, right in drawn if right} - {begin}
    longest = silence = 0
    for second in range(begin + 1, end + 1):
        silence += 1
        longest = max(longest, silence)
        if second in correct:
            silence = 0
    assert longest_silence(answers) == longest


def test_longest_silence_counts_from_and_to_correct_answers():
    moments = (0, 1, 2, 7, 8)
    answers = [Answer(moment, moment, 200, True) for moment in moments]
    assert longest_silence([*answers, Answer(4, 4, 500)]) == 5
    assert longest_silence([answers[0], Answer(6, 6, 500)]) == 6
    assert longest_silence([]) == 0


class Holding(BaseHTTPRequestHandler):
    """Answer at once, except the first request: it waits until the others have got forty answers."""

    protocol_version = "HTTP/1.1"
    held = threading.Lock()
    others = threading.Semaphore(0)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.held.acquire(blocking=False):  # once: the lock is never released
            for _ in range(40):
                self.others.acquire()
        self.others.release()
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"right")

    def log_message(self, *_: object) -> None:
        pass


def test_connection_that_is_held_is_seen_although_the_others_go_on():
    with ThreadingHTTPServer(("127.0.0.1", 0), Holding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Connections(f"http://127.0.0.1:{server.server_port}", b"x", "right", count=4, pause=0.02) as connections:
            wait_for(lambda: all(len(answers) >= 2 for answers in connections.answers))
        server.shutdown()
    everything = [answer for answers in connections.answers for answer in answers]
    assert all(answer.right for answer in everything)
    longest = max(answer.seconds for answer in everything)
    assert connections.silence >= longest > longest_silence(everything)


def test_p99_is_the_latency_of_an_answer():
    answers = [Answer(0, seconds, 200, True) for seconds in range(1, 201)]
    assert p99(answers) == 198
    assert p99(answers[:1]) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"type": "Overloaded"}', "Overloaded"),
        ("<html>", "no error body"),
        ("[1]", "no error body"),
        ("{}", "no error body"),
    ],
)
def test_error_type_is_read_from_the_body(body: str, expected: str):
    assert error_type(body) == expected


def test_given_up_worker_is_not_restarted():
    first, again = "Auto recovery start timestamp: 1763900000000", "Auto recovery failed again"
    retry = "Retry worker: c0ffee in 1 seconds."
    events = [
        ("faulty", first),
        ("faulty", retry),
        ("mnist", first),
        ("faulty", again),
        ("faulty", "Auto recovery succeeded"),
    ]
    log = "\n".join(
        f"2026-01-01T00:00:00,000 [INFO ] W-9000-{model}_1.0 WorkerThread - {line}" for model, line in events
    )
    assert given_up(log, "faulty") == 1
    assert given_up(f"{log}\n2026-01-01T00:00:01,000 [INFO ] W-9000-faulty_1.0 WorkerThread - {retry}", "faulty") == 0
    assert given_up(log, "text") == 0


def test_recovery_time_is_the_end_of_the_last_slow_second():
    def second(begin: float, *took: float, right: bool = True) -> list[Answer]:
        return [Answer(begin + 0.1, begin + 0.1 + seconds, 200 if right else 429, right) for seconds in took]

    fast, slow = second(102, 0.1, 0.1, 9.0), second(100, 0.1, 0.5, 0.5)
    assert recovery_time(fast, ended=100, usual=0.1) == 0
    assert recovery_time([*slow, *fast], ended=100, usual=0.1) == 1
    assert recovery_time([*slow, *fast], ended=100, usual=0.5) == 0
    assert recovery_time([], ended=100, usual=0.1) == math.inf
    assert recovery_time([*fast, *second(103, 0.1, right=False)], ended=100, usual=0.1) == 4


def test_written_section_replaces_the_earlier_one(tmp_path: Path):
    document = tmp_path / "RELIABILITY.md"
    write_section("faults", "## Faults\nfirst", document)
    write_section("soak", "## Long run\nfirst", document)
    write_section("faults", "## Faults\nsecond", document)
    text = document.read_text()
    assert text.startswith(TITLE)
    assert text.count("## Faults") == text.count("## Long run") == 1
    assert "second" in text
    assert text.index("## Faults") < text.index("## Long run")


def slices_of_a_run(count: int, **changes) -> list[soak.Slice]:
    load = LoadResult(20, 1000, 0, 50, 0.01, 0.02, 0.03, 0.04)
    steady = soak.Slice(0, {"mnist": load}, {"frontend": 500.0, "mnist": 600.0}, 100, frozenset({1, 2}))
    return [replace(steady, hours=index / 60, **changes) for index in range(count)]


def test_steady_soak_has_no_fault():
    assert soak.faults(slices_of_a_run(10), ["mnist"]) == []


def test_growth_during_soak_is_named():
    slices = slices_of_a_run(10)
    failing = LoadResult(20, 999, 1, 50, 0.01, 0.02, 0.2, 0.4)
    slices[5:] = [
        replace(
            kept,
            loads={"mnist": failing},
            memory={"frontend": 500.0, "mnist": 600.0 + 20 * index},
            descriptors=100 + 200 * index,
            workers=frozenset({1, 3}),
        )
        for index, kept in enumerate(slices[5:])
    ]
    found = " ".join(soak.faults(slices, ["mnist"]))
    for named in ("5 requests failed", "a worker was replaced", "memory of mnist", "open files", "p99 of mnist"):
        assert named in found
    assert "frontend" not in found


def test_memory_slope_is_in_megabytes_per_hour():
    slices = [replace(kept, memory={"mnist": 600 + 30 * kept.hours}) for kept in slices_of_a_run(10)]
    assert soak.memory_slope(slices, "mnist") == pytest.approx(30)


@pytest.mark.slow
def test_memory_of_a_worker_is_measured_beside_its_weights():
    [folder] = select(["mnist"])
    weights, size, found = memory.measured(folder)
    model = build()
    assert weights == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert size == folder.config["batchSize"]
    assert 0 < weights < found.loaded - found.bare < 500e6
    assert found.bare < min(found.single, found.full)
    assert weights < found.used - found.bare
    assert found.used <= found.full + 1e6  # pages that the allocator takes back meanwhile
