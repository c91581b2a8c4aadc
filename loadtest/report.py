"""The output of a run: a progress line, the verdict, and files beside locust's own CSV files."""

import itertools
import signal
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import gevent
from locust import runners
from locust.env import Environment
from locust.event import Events
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest import thresholds
from loadtest.answers import WrongAnswer
from loadtest.record import Record
from loadtest.shapes import Load
from loadtest.targets import Target
from loadtest.thresholds import ModelResult, Thresholds

WINDOWS = 600  # number of time windows of a long run
SHORTEST_SECONDS = 0.25  # length of the shortest window
OPEN_END_SECONDS = 5  # length of a window without a shape, which is what gives all processes the run's length
REPORT_SECONDS = 1.0  # between a worker's reports: with locust's 3 the progress line would be late
WORKER_SECONDS = 2.0  # a worker ends itself this long after Ctrl-C, unless its master has ended it before


def interrupt() -> None:
    """End locust as Ctrl-C does, without gevent's traceback of the greenlet that the signal interrupted."""
    hub = gevent.get_hub()
    hub.loop.run_callback(hub.parent.throw, KeyboardInterrupt)


def width(load: Load | None) -> float:
    """Return the length of a window in seconds."""
    return max(SHORTEST_SECONDS, load.seconds // WINDOWS) if load else OPEN_END_SECONDS


def options_of(environment: Environment) -> Namespace:
    """Return locust's command-line options, which every process of a run has."""
    assert environment.parsed_options is not None
    return environment.parsed_options


def row(result: ModelResult) -> list[str]:
    tally = result.tally
    times = [tally.percentile(share) for share in (0.5, 0.95, 0.99)]
    return [
        result.model,
        f"{tally.requests}",
        f"{result.throughput:.1f}",
        *("-" if time is None else f"{time:.1f}" for time in times),
        f"{tally.failed}",
        f"{tally.wrong}",
    ]


class Report:
    """A listener to the events of locust, in each of its processes.

    Args:
        targets: the models that are tested.
        load: None if locust's own options set the number of users.
        limits: the thresholds of a headless run.
    """

    def __init__(self, targets: list[Target], load: Load | None, limits: Thresholds):
        self.models = [target.name for target in targets]
        self.users = {target.name: target.user for target in targets}
        self.load = load
        self.limits = limits
        self.record = Record(width(load))
        self.classes: dict[str, int] = {}  # number of users by class
        self.received: int = signal.SIGINT  # the signal that interrupted the run, if one did
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.progress = Progress(
            *columns, console=self.console, auto_refresh=False, transient=True, disable=not self.console.is_terminal
        )

    def listen(self, events: Events) -> None:
        events.init.add_listener(self.on_init)
        events.test_start.add_listener(lambda **_: self.record.start(time.time()))
        events.test_stopping.add_listener(self.on_test_stopping)
        events.request.add_listener(self.on_request)
        events.report_to_master.add_listener(lambda data, **_: data.update(bundle=self.record.drain()))
        events.worker_report.add_listener(lambda data, **_: self.record.unpack(data.get("bundle", [])))
        events.quitting.add_listener(self.on_quitting)

    def on_init(self, environment: Environment, **_: object) -> None:
        runners.WORKER_REPORT_INTERVAL = REPORT_SECONDS
        options = options_of(environment)
        worker = isinstance(environment.runner, runners.WorkerRunner)
        if options.headless and self.load:
            self.listen_to_signals(worker)
        if worker:
            return
        gevent.spawn(self.watch_users, environment.runner)
        if options.headless:
            gevent.spawn(self.show_progress, self.load.seconds if self.load else options.run_time)

    def listen_to_signals(self, worker: bool) -> None:
        """Handle signals during a shape, when locust does not: SIGTERM would end it and leave its workers running."""
        if worker:  # Ctrl-C reaches the master, too, which then ends its workers in order
            gevent.signal_handler(signal.SIGINT, gevent.spawn_later, WORKER_SECONDS, interrupt)
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            gevent.signal_handler(number, self.interrupt, number)

    def interrupt(self, number: int) -> None:
        self.received = number
        interrupt()

    def on_test_stopping(self, **_: object) -> None:
        self.record.stopped = self.record.stopped or time.time()

    def on_request(self, response_time: float, exception: Exception | None, context: dict, **_: object) -> None:
        fault = (str(exception) or type(exception).__name__) if exception else None
        self.record.add(time.time(), context["model"], response_time, fault, isinstance(exception, WrongAnswer))

    def watch_users(self, runner: runners.Runner) -> None:
        while True:
            if runner.state in (runners.STATE_SPAWNING, runners.STATE_RUNNING) and not self.record.stopped:
                self.record.note_users(time.time(), runner.target_user_count)
                self.classes = dict(runner.target_user_classes_count)
            gevent.sleep(0.2)

    def show_progress(self, seconds: float | None) -> None:
        """Redraw a progress line each second; if the output is not a terminal, print a line every ten seconds."""
        with self.progress:
            task = self.progress.add_task("waiting for the first answers", total=seconds)
            for tick in itertools.count(1):
                gevent.sleep(1)
                if self.record.stopped:
                    return
                passed = self.record.seconds(time.time())
                self.progress.update(task, completed=passed, description=self.state(), refresh=True)
                if not self.console.is_terminal and tick % 10 == 0:
                    self.console.print(f"{passed:.0f} s: {self.state()}")

    def state(self) -> str:
        """Return the progress line: users, throughput and p99 of the last three seconds, failures so far."""
        width = self.record.width
        last = int(time.time() // width)
        windows = range(last - max(1, int(3 // width)), last)
        tallies = [self.record.of(model, windows) for model in self.models]
        users = self.record.users[-1][1] if self.record.users else 0
        p99 = max((tally.percentile(0.99) or 0 for tally in tallies), default=0)
        rate = sum(tally.right for tally in tallies) / (len(windows) * width)
        failed = sum(self.record.of(model).failed for model in self.models)
        return f"users {users}, {rate:.0f}/s, p99 {p99:.0f} ms, {failed} failed"

    def on_quitting(self, environment: Environment, **_: object) -> None:
        if isinstance(environment.runner, runners.WorkerRunner) or not self.record.started:
            return
        self.on_test_stopping()
        self.progress.stop()
        options = options_of(environment)
        if options.headless:
            environment.process_exit_code = self.verdict()
        if prefix := options.csv_prefix:
            self.save(Path(prefix))

    def verdict(self) -> int:
        """Print the figures of each model and the thresholds that were missed.

        Returns:
            the exit status: 0 if every threshold was met, 1 if one was missed, 130 (Ctrl-C) or 143 (SIGTERM) if the run
            was interrupted.
        """
        table = Table("model", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for head in ("requests", "right/s", "p50 ms", "p95 ms", "p99 ms", "failed", "wrong"):
            table.add_column(head, justify="right")
        table.add_column("verdict")
        missed = []
        for result in self.results():
            faults = thresholds.misses(result, self.limits.of(result.model))
            missed += [f"{result.model}: {fault}" for fault in faults]
            table.add_row(*row(result), "[red]missed" if faults else "[green]met")
        self.console.print(table)
        for model in self.models:
            for kind, count in Counter(self.record.of(model).faults).most_common(5):
                self.console.print(f"  {model}: {count} x {kind}", markup=False)
        for line in missed:
            self.console.print(f"missed: {line}", style="red", markup=False)
        if self.load and self.record.seconds(time.time()) < self.load.seconds - 1:
            self.console.print("The run was interrupted. These are the results until then.")
            return 128 + self.received
        return 1 if missed else 0

    def results(self) -> list[ModelResult]:
        seconds = self.record.seconds(time.time())
        return [ModelResult(model, self.record.of(model), seconds, self.due(model, seconds)) for model in self.models]

    def due(self, model: str, seconds: float) -> float | None:
        """Return the number of requests due for one model at a constant arrival rate; None for other shapes."""
        if not self.load or not self.load.rate:
            return None
        users = self.classes.get(self.users[model], 0)
        return users / self.load.period * seconds

    def save(self, prefix: Path) -> None:
        """Write PREFIX_record.json, PREFIX_points.csv, PREFIX_latency.png and PREFIX_latency.svg."""
        from loadtest import plot  # imports matplotlib, which takes a second and no worker needs

        self.record.save(prefix.with_name(f"{prefix.name}_record.json"))
        files = plot.write(self.record, prefix)
        for file in files:
            self.console.print(f"  {file}", markup=False)
        if len(files) == 1:
            self.console.print(
                "No chart: the number of users never stayed the same for two seconds. Run longer: DURATION=60s"
            )
