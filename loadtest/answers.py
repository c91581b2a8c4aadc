"""What an answer must be."""

import json

from bundle.samples import first


class Failure(Exception):
    """An answer that does not count: its message names the kind, in few different words, for it is counted by them."""


class WrongAnswer(Failure):
    """Status 200, and not the right answer."""


def fault(status: int, text: str | None, expect: str | None, error: Exception | None = None) -> Failure | None:
    """What is wrong with an answer; None for a right one.

    Args:
        status: HTTP's; 0 where there was no answer.
        expect: what it must rank first; None where any JSON will do.
        error: why there was none.
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
