"""Check the answer to a load test's request."""

import json

from bundle.samples import first


class Failure(Exception):
    """An answer that counts as failed.

    Failures are counted by their messages: a message names a kind of failure and has few variants.
    """


class WrongAnswer(Failure):
    """A wrong answer with status 200."""


def fault(status: int, text: str | None, expect: str | None, error: Exception | None = None) -> Failure | None:
    """Return what is wrong with an answer; None if it is right.

    Args:
        status: the HTTP status; 0 if there was no answer.
        text: the answer's body.
        expect: the label that the answer must rank first; None if any JSON is right.
        error: why there was no answer.
    """
    if status == 0:
        return Failure(f"no answer: {type(error).__name__}" if error else "no answer")
    try:
        answer = json.loads(text or "")
    except ValueError:
        return WrongAnswer("not JSON") if status == 200 else Failure(f"{status}")
    if status != 200:
        kind = answer.get("type", "") if isinstance(answer, dict) else ""
        return Failure(f"{status} {kind}".strip())
    if expect is None:
        return None
    best = first(answer)
    if best is None:
        return WrongAnswer("no ranking")
    return None if best.label == expect else WrongAnswer(f"{best.label} instead of {expect}")
