"""What a run found, kept so that it can be repeated: bytes and a command."""

import json
from pathlib import Path

from bundle.paths import ROOT
from tests.trials.fuzz.cases import Case
from tests.trials.fuzz.verdict import Answer

FOLDER = ROOT / "build" / "fuzz"
MOST = 200  # are written; all are counted


class Findings:
    """
    Attributes:
        found: one entry each: case, kind, what was answered, the command.
    """

    def __init__(self, folder: Path = FOLDER):
        self.folder = folder
        self.found: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, case: Case, kind: str, base: str = "", answer: Answer | None = None, details: str = "") -> None:
        """Writes the request's body, and a shell script that sends it.

        Args:
            base: URL of the server; "" where the handler was called without one.
        """
        self.add(
            kind=kind,
            case={"seed": case.seed, "number": case.number, "model": case.model, "origin": case.origin},
            answer=details or told(answer),
            repeat=self.write(case, base) if len(self.found) < MOST else "",
        )

    def save_neighbour(self, good: Case, expected: str, answer: Answer, beside: list[Case], base: str) -> None:
        """A good sample that was answered wrong, with the cases that were sent at the same moment."""
        commands = [self.write(one, base) for one in beside] if len(self.found) < MOST else []
        self.add(
            kind="wrong neighbour",
            case={"model": good.model, "expected": expected, "beside": [one.number for one in beside]},
            answer=told(answer),
            repeat=" & ".join(commands),
        )

    def add(self, **entry: object) -> None:
        self.found.append(entry)
        (self.folder / "findings.json").write_text(json.dumps(self.found, indent=2))

    def write(self, case: Case, base: str) -> str:
        """-> the command that repeats the case."""
        body = self.folder / f"{case.name}.body"
        body.write_bytes(case.body)
        command = case.curl(base or "http://127.0.0.1:8080", body)
        (self.folder / f"{case.name}.sh").write_text(f"{command}\n", errors="surrogateescape")
        return command


def told(answer: Answer | None) -> str:
    if answer is None:
        return ""
    return f"{answer.status or 'none'} after {answer.seconds:.2f} s: {answer.body[:300].decode(errors='replace')}"
