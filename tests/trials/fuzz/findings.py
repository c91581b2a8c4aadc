"""Save the findings of a run, each with the request's body and the command that repeats it."""

import json
from pathlib import Path

from bundle.paths import ROOT
from tests.trials.fuzz.cases import Case
from tests.trials.fuzz.verdict import Answer

FOLDER = ROOT / "build" / "fuzz"
MOST = 200  # findings with files; all are counted


class Findings:
    """The findings of a run, in a folder.

    Attributes:
        found: one entry per finding: case, kind, answer, command.
    """

    def __init__(self, folder: Path = FOLDER):
        self.folder = folder
        self.found: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, case: Case, kind: str, base: str = "", answer: Answer | None = None, details: str = "") -> None:
        """Add a finding, and write the request's body and a shell script that sends it.

        Args:
            case: the request.
            kind: what is wrong with the answer.
            base: URL of the server; "" if the handler was called without a server.
            answer: of the server, if there is one.
            details: text to use instead of the answer.
        """
        self.add(
            kind=kind,
            case={"seed": case.seed, "number": case.number, "model": case.model, "origin": case.origin},
            answer=details or summary(answer),
            repeat=self.write(case, base) if len(self.found) < MOST else "",
        )

    def save_neighbour(self, good: Case, expected: str, answer: Answer, beside: list[Case], base: str) -> None:
        """Add a valid request that got a wrong answer, with the cases that were sent at the same time."""
        commands = [self.write(one, base) for one in beside] if len(self.found) < MOST else []
        self.add(
            kind="wrong neighbour",
            case={"model": good.model, "expected": expected, "beside": [one.number for one in beside]},
            answer=summary(answer),
            repeat=" & ".join(commands),
        )

    def add(self, **entry: object) -> None:
        self.found.append(entry)
        (self.folder / "findings.json").write_text(json.dumps(self.found, indent=2))

    def write(self, case: Case, base: str) -> str:
        """Write the request's files, and return the command that repeats it."""
        body = self.folder / f"{case.name}.body"
        body.write_bytes(case.body)
        command = case.curl(base or "http://127.0.0.1:8080", body)
        (self.folder / f"{case.name}.sh").write_text(f"{command}\n", errors="surrogateescape")
        return command


def summary(answer: Answer | None) -> str:
    if answer is None:
        return ""
    return f"{answer.status or 'none'} after {answer.seconds:.2f} s: {answer.body[:300].decode(errors='replace')}"
