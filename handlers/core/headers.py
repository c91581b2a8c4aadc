"""A request's headers: which of them TorchServe or a trusted proxy set, and what the others say.

TorchServe (0.12.0) hands a client's headers to the worker as they were sent, beside its own, in one mapping in which
names differ by case. So a name that is searched without regard to case finds what a client wrote, and a header that
TorchServe did not set may be a client's.
"""

import os
import re
import time
from collections.abc import Mapping
from enum import Enum

BEHIND_PROXY = "BUNDLE_BEHIND_PROXY"


class Verb(Enum):
    """What a request asks for."""

    PREDICT = "predict"
    EXPLAIN = "explain"
    DESCRIBE = "describe"


def requested_verb(row: Mapping, headers: Mapping) -> Verb:
    """Read the verb from what TorchServe itself sets.

    - A description: the management APIs, HTTP and gRPC, set `describe: True` over a client's header of that name, and
      send no input. The inference API gives every request an input, called "body", unless it parses the body as a form:
      that takes a Content-Type, which a client cannot hide from the worker. A request for a description has none.
    - An explanation: on /predictions, /explanations, /v1 and /v2, TorchServe sets `explain` over a client's header of
      that name. On its older routes (/invocations, /models/NAME/invoke, /NAME/predict) it does not: a client that sends
      exactly `explain: True` there asks for an explanation, as it could on /explanations.

    gRPC hands no headers of a client over. A field that is called "describe" or "explain" is a mapping here, not a str.
    """
    if headers.get("describe") == "True" and not row and not any(name.lower() == "content-type" for name in headers):
        return Verb.DESCRIBE
    return Verb.EXPLAIN if headers.get("explain") == "True" else Verb.PREDICT


def header(headers: Mapping, name: str) -> str:
    """Return the value of a client's header, whatever the case of its name; "" if it is missing."""
    for key, value in headers.items():
        if key.lower() == name and isinstance(value, str):
            return value
    return ""


def content_type(headers: Mapping) -> str:
    """Return the media type without its parameters, in lower case; "" if the header is missing."""
    return header(headers, "content-type").split(";")[0].strip().lower()


def behind_proxy() -> bool:
    """Return whether every request comes through a proxy that sets X-Request-Start itself: BUNDLE_BEHIND_PROXY=true.

    Raises:
        ValueError: the variable is neither true nor false.
    """
    value = os.environ.get(BEHIND_PROXY, "false")
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{BEHIND_PROXY} is {value!r}, and must be true or false.")
    return value.lower() == "true"


def proxy_arrival(headers: Mapping) -> float | None:
    """Return when the proxy took the request (s since the epoch): X-Request-Start, as nginx's "t=${msec}" writes it.

    None if the header is missing or invalid, or if its time is not within the last hour: then the clocks differ. Call
    it only `behind_proxy`; elsewhere a client may have written the header.
    """
    text = header(headers, "x-request-start").removeprefix("t=")
    if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text, re.ASCII):
        return None
    seconds = float(text)
    return seconds if 0 <= time.time() - seconds < 3600 else None
