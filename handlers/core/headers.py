"""What a request's headers say."""

import re
import time
from collections.abc import Mapping

PREDICT, EXPLAIN, DESCRIBE = "predict", "explain", "describe"


def lowered(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if isinstance(value, str)}


def verb(headers: Mapping[str, str]) -> str:
    for name in (DESCRIBE, EXPLAIN):
        if headers.get(name) == "True":
            return name
    return PREDICT


def arrival(headers: Mapping[str, str]) -> float | None:
    """When a proxy took the request: its X-Request-Start, `t=` and s since the epoch, as nginx's "t=${msec}" writes it.
    None where there is none, or one that another clock or a client's hand wrote."""
    text = headers.get("x-request-start", "").removeprefix("t=")
    if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text):
        return None
    seconds = float(text)
    return seconds if 0 <= time.time() - seconds < 3600 else None
