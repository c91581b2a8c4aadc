"""Send the same cases to the handlers in this process, through TorchServe's own worker code."""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bundle.build.dryrun import DryRun
from bundle.paths import MODEL_STORE
from handlers.core.open_inference import PROTOCOL
from tests.trials.fuzz import corpus
from tests.trials.fuzz.cases import Case, case, model_of
from tests.trials.fuzz.findings import FOLDER, Findings
from tests.trials.fuzz.verdict import OPEN_INFERENCE, agree, is_error, scores

BATCH = 8  # requests
NEIGHBOURS = 2  # valid requests in a batch
TOLERANCE = 0.02  # of a probability: the order of additions depends on the batch size
TOO_SLOW = 10.0  # s for a batch

Answers = list[tuple[int, object]]


@dataclass
class InProcess:
    """The counted answers of one model's handler."""

    model: str
    requests: int = 0
    batches: int = 0
    served: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    wrong_neighbours: int = 0
    slowest: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failed and not self.wrong_neighbours


def fuzz(
    model: str, models: tuple[str, ...], seed: int, cases: int, findings: Findings, progress: Callable[[int], None]
) -> InProcess:
    """Send batches of mutated requests with valid ones at random positions to a model's handler.

    A valid request must get the same answer as in a batch of its own.

    Args:
        model: whose handler to call.
        models: all models of the run, which take turns by the case's number.
        seed: of the run.
        cases: of all models together.
        findings: get the failures.
        progress: is called after each batch with its number of cases.
    """
    result = InProcess(model)
    numbers = [number for number in range(cases) if model_of(number, models) == model]
    own_headers = corpus.headers(model)
    with quiet(FOLDER / f"{model}.decoders.log"), DryRun(MODEL_STORE / f"{model}.mar") as worker:
        asked = [{"body": content} for content in corpus.good(model).values()]
        found = [(row, answer) for row in asked for answer in worker.predict([row], [own_headers]) if answer[0] == 200]
        rows, alone = [row for row, _ in found], [answer for _, answer in found]
        for start in range(0, len(numbers), BATCH - NEIGHBOURS):
            part = numbers[start : start + BATCH - NEIGHBOURS]
            mutated = [one for one in (case(seed, number, models) for number in part) if one.row is not None]
            batch: list[Case | int] = [*mutated, *Random(f"{seed} {start}").choices(range(len(rows)), k=NEIGHBOURS)]
            Random(f"{seed} {start} order").shuffle(batch)
            begin = time.monotonic()
            answers = worker.predict(
                [rows[one] if isinstance(one, int) else one.row for one in batch],
                [own_headers if isinstance(one, int) else headers(one) for one in batch],
            )
            seconds = time.monotonic() - begin
            result.slowest = max(result.slowest, seconds)
            result.batches += 1
            check(result, batch, answers, alone, seconds, findings)
            progress(len(part))
    return result


def check(
    result: InProcess, batch: list[Case | int], answers: Answers, alone: Answers, seconds: float, findings: Findings
) -> None:
    mutated = [one for one in batch if isinstance(one, Case)]
    if seconds > TOO_SLOW:
        result.failed += 1
        findings.save(mutated[0], "slow batch", details=f"{seconds:.1f} s with {[one.number for one in mutated]}")
    for one, (status, body) in zip(batch, answers, strict=True):
        if isinstance(one, int):
            if not alike((status, body), alone[one]):
                result.wrong_neighbours += 1
                findings.save(mutated[0], "wrong neighbour", details=f"{status} {body} for valid request {one}")
            continue
        result.requests += 1
        if status == 200:
            result.served += 1
        elif 400 <= status < 500 and isinstance(body, dict) and is_error(body, status, one.open_inference):
            result.rejected[body.get("type", OPEN_INFERENCE)] += 1
        else:
            result.failed += 1
            findings.save(one, "5xx of the handler", details=f"{status} {str(body)[:300]}")


def headers(one: Case) -> dict[str, str]:
    """Return the headers as the frontend passes them on: only its own mark explanations and the protocol."""
    asked = {name: value for name, value in one.headers if name != "explain"}
    if one.path.startswith("/explanations") or (one.open_inference and one.path.endswith("/explain")):
        asked["explain"] = "True"
    return asked | ({PROTOCOL: "v2"} if one.open_inference else {})


def alike(seen: tuple[int, object], expected: tuple[int, object]) -> bool:
    return seen[0] == expected[0] and agree(scores(seen[1]), scores(expected[1]), TOLERANCE)


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Suppress the logs of handlers and TorchServe, and redirect stderr to `log`.

    Native decoders write their warnings to file descriptor 2, not to Python's `sys.stderr`.
    """
    sys.stderr.flush()
    shown = os.dup(2)
    logging.disable(logging.WARNING)
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)
        logging.disable(logging.NOTSET)
