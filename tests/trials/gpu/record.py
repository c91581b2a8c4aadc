"""What the checks found: one JSON line each, written at once, and a Markdown report of all of them."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bundle.files import write_atomically

RESULTS, REPORT = "results.jsonl", "report.md"
END = ""  # the name of the record that ends a step


@dataclass(frozen=True)
class Result:
    """The outcome of one check; or, with the name `END`, of a step.

    Attributes:
        passed: None for a measurement without a limit, and for a check that this device does not have.
        cause: why it failed.
        values: what was measured, by name.
    """

    step: str
    name: str
    passed: bool | None
    seconds: float = 0.0
    cause: str = ""
    values: dict[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return {True: "passed", False: "**failed**", None: "-"}[self.passed]


class Record:
    """The results in a folder. Several processes may add some, one at a time.

    Args:
        folder: made if it is missing.
        titles: of the steps, in their order.
        about: lines at the top of the report, by name.
    """

    def __init__(self, folder: Path, titles: dict[str, str], about: dict[str, str] | None = None):
        self.folder, self.titles, self.about = folder, titles, about or {}
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / RESULTS

    def results(self) -> list[Result]:
        """Return the latest result of each check, in the order in which they first came."""
        latest: dict[tuple[str, str], Result] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            try:
                result = Result(**json.loads(line))
            except (ValueError, TypeError):  # the last line of a process that was killed
                continue
            latest[result.step, result.name] = result
        return list(latest.values())

    def add(self, result: Result) -> None:
        """Write a result, and the report again."""
        text = self.file.read_bytes() if self.file.exists() else b""
        with self.file.open("a") as file:
            file.write("\n" * (bool(text) and not text.endswith(b"\n")) + json.dumps(asdict(result)) + "\n")
        self.write_report()

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)

    def of(self, step: str) -> list[Result]:
        return [result for result in self.results() if result.step == step and result.name != END]

    def has_passed(self, step: str) -> bool:
        """Return whether a step ended, and all of its checks passed."""
        return any(each.step == step and each.name == END and each.passed for each in self.results())

    def write_report(self) -> None:
        results = self.results()
        ends = {each.step: each for each in results if each.name == END}
        lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in self.about.items()), ""]
        lines += ["| step | result | checks that passed | seconds |", "|---|---|---|---|"]
        for step, title in self.titles.items():
            judged = [each for each in self.of(step) if each.passed is not None]
            end = ends.get(step)
            row = (end.verdict, f"{end.seconds:.0f}") if end else ("not run", "")
            lines.append(f"| {title} | {row[0]} | {sum(map(passed, judged))} of {len(judged)} | {row[1]} |")
        for step, title in self.titles.items():
            if not (found := self.of(step)) and step not in ends:
                continue
            lines += ["", f"## {title}", ""]
            if found:
                lines += ["| check | result | seconds | measured |", "|---|---|---|---|"]
            lines += [f"| {r.name} | {r.verdict} | {r.seconds:.1f} | {in_words(r.values)} |" for r in found]
            for each in [*found, *([ends[step]] if step in ends else [])]:
                if each.cause:
                    lines += ["", f"{each.name or 'The step'}:", "", "```", each.cause.replace("```", "'''"), "```"]
        write_atomically(self.folder / REPORT, "\n".join(lines) + "\n")


class Checks:
    """The checks of one step. A check that passed in an earlier run is not repeated."""

    def __init__(self, record: Record, step: str):
        self.record, self.step = record, step
        self.done = {each.name for each in record.of(step) if each.passed}

    def run(self, name: str, check, needed: bool = False) -> bool:
        """Run a check, and record its outcome.

        Args:
            name: of the check.
            check: a function that returns what it measured, by name, or None; an exception is a failure.
            needed: run it also if it passed before, because later checks build on it.

        Returns:
            whether it passed.
        """
        if name in self.done and not needed:
            return True
        start, passed, cause, values = time.monotonic(), True, "", None
        try:
            values = check()
        except (Exception, SystemExit) as exc:  # a worker exits when its device is broken
            passed, cause = False, describe(exc)
        self.record.add(Result(self.step, name, passed, time.monotonic() - start, cause, values or {}))
        return passed

    def note(self, name: str, **values: object) -> None:
        """Record a measurement that has no limit."""
        self.record.add(Result(self.step, name, None, values=values))


def passed(result: Result) -> bool:
    return bool(result.passed)


def describe(error: BaseException) -> str:
    details = getattr(error, "details", "")  # of a BundleError
    return f"{type(error).__name__}: {error}" + (f"\n{details}" if details else "")


def in_words(values: dict[str, object]) -> str:
    def shown(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    return ", ".join(f"{name} {shown(value)}" for name, value in values.items()).replace("|", "/").replace("\n", " ")
