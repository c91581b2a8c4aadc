"""Judge the answers to mutated requests."""

import json
from collections import Counter
from dataclasses import dataclass, field

from bundle.samples import ranking
from tests.trials.fuzz.cases import BODY_LIMIT, Case

FAULTS = ("5xx", "late", "no answer", "wrong body")
ERROR_KEYS = {"code", "type", "message"}
OPEN_INFERENCE = "of the Open Inference Protocol"
OPEN_INFERENCE_ERROR_KEYS = {"error"}
CUT_OFF = (b"ContentLengthError: 400", b"ClientOSError(104")  # closed in the middle of the answer, or before it
HEADER_LIMIT = 8192  # Netty's limit, in bytes, for all headers together
FORMS = ("application/x-www-form-urlencoded", "multipart/")


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        status: HTTP status; 0 without an answer.
        body: the body, or the text of the exception without an answer.
        seconds: from the first byte sent to the last byte read.
    """

    status: int
    body: bytes
    seconds: float


@dataclass
class Tally:
    """The counted answers to one model's cases.

    Attributes:
        sent: all cases.
        served: 2xx.
        rejected: 4xx, by type; those of the Open Inference Protocol have none.
        known: known frontend errors, by reason.
        failed: invalid answers, by kind (one of FAULTS).
        neighbours: valid requests that were sent at the same time.
        wrong_neighbours: those of them that got a wrong answer.
        seconds: the longest time until an answer.
    """

    sent: int = 0
    served: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    neighbours: int = 0
    wrong_neighbours: int = 0
    seconds: float = 0.0

    def add(self, case: Case, answer: Answer, deadline: float) -> str | None:
        """Count an answer, and return its fault (one of FAULTS), or None if it is valid."""
        self.sent += 1
        self.seconds = max(self.seconds, answer.seconds)
        if reason := known_frontend_error(case, answer):
            self.known[reason] += 1
            return None
        problem = fault(answer, deadline, case.open_inference)
        if problem:
            self.failed[problem] += 1
        elif answer.status >= 400:
            self.rejected[json.loads(answer.body).get("type", OPEN_INFERENCE)] += 1
        else:
            self.served += 1
        return problem


def known_frontend_error(case: Case, answer: Answer) -> str | None:
    """Return the reason if TorchServe's frontend returned a known error before a handler saw the request, else None.

    A handler cannot change these answers. In production, the proxy of the Docker stack is in front of the frontend.
    """
    if answer.status == 413 and not answer.body and len(case.body) > BODY_LIMIT // 2:
        return "bare 413: a body over 16 MiB, or a form whose parts come near it"
    if not answer.status and b"ClientOSError(104" in answer.body and header_bytes(case) > HEADER_LIMIT:
        return "reset: headers of more than 8 KiB, answered before the body is read"
    if not answer.status and len(case.body) > BODY_LIMIT and b"ClientOSError" in answer.body:
        return "cut off: a body over 16 MiB, answered 413 and closed while it was still being sent"
    if not answer.status and is_form(case) and any(end in answer.body for end in CUT_OFF):
        return "cut off: a form that Netty cannot parse, answered 400 with the form in the message, and closed"
    return None


def header_bytes(case: Case) -> int:
    return sum(len(name) + len(value) + 4 for name, value in case.headers)


def is_form(case: Case) -> bool:
    return case.content_type.lower().startswith(FORMS)


def fault(answer: Answer, deadline: float, open_inference: bool = False) -> str | None:
    """Return what is wrong with an answer (one of FAULTS), or None.

    Args:
        answer: to a mutated request.
        deadline: in seconds.
        open_inference: whether the request was one of the Open Inference Protocol.
    """
    if not answer.status:
        return "no answer"
    if answer.status >= 500 or answer.status < 200:
        return "5xx"
    if answer.seconds > deadline:
        return "late"
    try:
        body = parsed(answer, open_inference)
    except (ValueError, RecursionError):
        return "wrong body"
    if answer.status < 300:
        return None
    right = answer.status >= 400 and is_error(body, answer.status, open_inference)
    return None if right else "wrong body"


def parsed(answer: Answer, open_inference: bool) -> object:
    """Return the JSON of an answer; binary tensors may follow that of the Open Inference Protocol."""
    if not open_inference:
        return json.loads(answer.body, parse_constant=not_json)
    return json.JSONDecoder(parse_constant=not_json).raw_decode(answer.body.decode(errors="replace"))[0]


def is_error(body: object, status: int, open_inference: bool) -> bool:
    if not isinstance(body, dict):
        return False
    if open_inference:
        return body.keys() == OPEN_INFERENCE_ERROR_KEYS and bool(body["error"])
    return body.keys() == ERROR_KEYS and body["code"] == status and bool(body["message"])


def not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def scores(answer: object) -> dict[str, float]:
    """Return the best score of each class in an answer (parsed JSON)."""
    best: dict[str, float] = {}
    for each in ranking(answer):
        best.setdefault(each.label, each.probability)
    return best


def agree(seen: dict[str, float], expected: dict[str, float], tolerance: float) -> bool:
    """Return whether no class's score differs by more than the tolerance. A class that is missing has the score 0."""
    return all(abs(seen.get(label, 0.0) - expected.get(label, 0.0)) <= tolerance for label in {*seen, *expected})
