"""What a run shows while it lasts and leaves when it ends: a progress line, the verdict, files beside locust's CSV."""

import itertools
import signal
import time
from collections import Counter
from pathlib import Path

import gevent
from locust import runners
from locust.env import Environment
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest import thresholds
from loadtest.answers import WrongAnswer
from loadtest.record import Record
from loadtest.shapes import Load
from loadtest.targets import Target
from loadtest.thresholds import Outcome, Thresholds

WINDOWS = 600  # of a long run
SHORTEST_SECONDS = 0.25  # of a window
OPEN_END_SECONDS = 5  # a window's length where no shape says when the run ends: all processes must know
REPORT_SECONDS = 1.0  # between a worker's reports: locust's 3 would make the progress line late
WORKER_SECONDS = 2.0  # that a worker has left after a Ctrl-C, unless its master ends it


def interrupt() -> None:
    """Ends locust as Ctrl-C does, without gevent's traceback of whatever greenlet the signal happened to meet."""
    hub = gevent.get_hub()
    hub.loop.run_callback(hub.parent.throw, KeyboardInterrupt)


def width(load: Load | None) -> float:
    """Seconds of a window."""
    return max(SHORTEST_SECONDS, load.seconds // WINDOWS) if load else OPEN_END_SECONDS


def row(outcome: Outcome) -> list[str]:
    tally = outcome.tally
    times = [tally.percentile(share) for share in (0.5, 0.95, 0.99)]
    return [
        outcome.model,
        f"{tally.requests}",
        f"{outcome.throughput:.1f}",
        *("-" if time is None else f"{time:.1f}" for time in times),
        f"{tally.failed}",
        f"{tally.wrong}",
    ]


class Report:
    """Listens to a run of locust, in each of its processes.

    Args:
        targets: the models that are asked.
        load: None where locust's own options say how many users there are.
        limits: what a headless run must hold.
    """

    def __init__(self, targets: list[Target], load: Load | None, limits: Thresholds):
        self.models = [target.name for target in targets]
        self.users = {target.name: target.user for target in targets}
        self.load = load
        self.limits = limits
        self.record = Record(width(load))
        self.classes: dict[str, int] = {}  # users by class
        self.received = signal.SIGINT  # the signal that interrupted the run, if one did
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.progress = Progress(
            *columns, console=self.console, auto_refresh=False, transient=True, disable=not self.console.is_terminal
        )

    def listen(self, events) -> None:
        events.init.add_listener(self.on_init)
        events.test_start.add_listener(lambda **_: self.record.start(time.time()))
        events.test_stopping.add_listener(self.on_test_stopping)
        events.request.add_listener(self.on_request)
        events.report_to_master.add_listener(lambda data, **_: data.update(bundle=self.record.drain()))
        events.worker_report.add_listener(lambda data, **_: self.record.unpack(data.get("bundle", [])))
        events.quitting.add_listener(self.on_quitting)

    def on_init(self, environment: Environment, **_: object) -> None:
        runners.WORKER_REPORT_INTERVAL = REPORT_SECONDS
        worker = isinstance(environment.runner, runners.WorkerRunner)
        if environment.parsed_options.headless and self.load:
            self.listen_to_signals(worker)
        if worker:
            return
        options = environment.parsed_options
        gevent.spawn(self.watch_users, environment.runner)
        if options.headless:
            gevent.spawn(self.show_progress, self.load.seconds if self.load else options.run_time)

    def listen_to_signals(self, worker: bool) -> None:
        """Until a shape has ended, locust does not listen to SIGTERM: it would die and leave its workers running."""
        if worker:  # Ctrl-C reaches it together with the master, which will end it in order
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
        fault = exception and (str(exception) or type(exception).__name__)
        self.record.add(time.time(), context["model"], response_time, fault, isinstance(exception, WrongAnswer))

    def watch_users(self, runner: runners.Runner) -> None:
        while True:
            if runner.state in (runners.STATE_SPAWNING, runners.STATE_RUNNING) and not self.record.stopped:
                self.record.note_users(time.time(), runner.target_user_count)
                self.classes = dict(runner.target_user_classes_count)
            gevent.sleep(0.2)

    def show_progress(self, seconds: float | None) -> None:
        """One line, drawn again each second; where output is no terminal, a line every ten."""
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
        """Users now, throughput and p99 of the last seconds, failures so far."""
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
        if environment.parsed_options.headless:
            environment.process_exit_code = self.verdict()
        if prefix := environment.parsed_options.csv_prefix:
            self.save(Path(prefix))

    def verdict(self) -> int:
        """Prints what each model did and what it had to.

        Returns:
            the exit status: 0 when every threshold was met, 1 when not, 130 (Ctrl-C) or 143 (SIGTERM) when the run was
            interrupted.
        """
        table = Table("model", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for head in ("requests", "right/s", "p50 ms", "p95 ms", "p99 ms", "failed", "wrong"):
            table.add_column(head, justify="right")
        table.add_column("verdict")
        missed = []
        for outcome in self.outcomes():
            limits = self.limits.of(outcome.model)
            faults = thresholds.misses(outcome, limits)
            missed += [f"{outcome.model}: {fault}" for fault in faults]
            table.add_row(*row(outcome), "[red]missed" if faults else "[green]met")
        self.console.print(table)
        for model in self.models:
            for kind, count in Counter(self.record.of(model).faults).most_common(5):
                self.console.print(f"  {model}: {count} x {kind}", markup=False)
        for line in missed:
            self.console.print(f"missed: {line}", style="red", markup=False)
        if self.load and self.record.seconds(time.time()) < self.load.seconds - 1:
            self.console.print("The run was interrupted: this is what it had seen until then.")
            return 128 + self.received
        return 1 if missed else 0

    def outcomes(self) -> list[Outcome]:
        seconds = self.record.seconds(time.time())
        return [Outcome(model, self.record.of(model), seconds, self.asked(model, seconds)) for model in self.models]

    def asked(self, model: str, seconds: float) -> float | None:
        """The requests that an arrival rate would have made of one model's users."""
        if not self.load or not self.load.rate:
            return None
        users = self.classes.get(self.users[model], 0)
        return users / self.load.period * seconds

    def save(self, prefix: Path) -> None:
        """Writes PREFIX_record.json, PREFIX_points.csv, PREFIX_latency.png and .svg."""
        from loadtest import plot  # imports matplotlib: a second that no worker needs to wait

        self.record.save(prefix.with_name(f"{prefix.name}_record.json"))
        files = plot.write(self.record, prefix)
        for file in files:
            self.console.print(f"  {file}", markup=False)
        if len(files) == 1:
            self.console.print("No picture: no number of users stayed for two seconds. Run for longer: DURATION=60s")
