"""Read the headers of a request: those that TorchServe or a trusted proxy set, and those of the client.

TorchServe (0.12.0) passes the client's headers to the worker unchanged, in one case-sensitive mapping with its own. So
a search that ignores case may find the client's header, and a header that TorchServe did not set may be the client's.
"""

import functools
import os
import re
import time
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

BEHIND_PROXY = "BUNDLE_BEHIND_PROXY"
CHARSET = re.compile(r"(?:^|;)\s*charset\s*=\s*[\"']?([^\s;\"']+)", re.IGNORECASE)


class Verb(Enum):
    """What a request asks for."""

    PREDICT = "predict"
    EXPLAIN = "explain"
    DESCRIBE = "describe"


def requested_verb(row: Mapping, headers: Mapping) -> Verb:
    """Read the verb from the headers that TorchServe itself sets.

    - Description: the management APIs, HTTP and gRPC, replace a client's `describe` header by `describe: True`, and
      send no input. The inference API gives every request an input named "body", unless it parses the body as a form.
      That needs a Content-Type, which a client cannot hide from the worker. A request for a description has none.
    - Explanation: TorchServe replaces a client's `explain` header, except on its older route /NAME/predict: a client
      that sends exactly `explain: True` there asks for an explanation, as it could on /explanations.

    gRPC passes no headers of the client. A field named "describe" or "explain" is a mapping here, not a str.
    """
    if headers.get("describe") == "True" and not row and not any(name.lower() == "content-type" for name in headers):
        return Verb.DESCRIBE
    return Verb.EXPLAIN if headers.get("explain") == "True" else Verb.PREDICT


def header(headers: Mapping, name: str) -> str:
    """Return the value of a client's header, ignoring the case of its name; "" if it is missing.

    Args:
        headers: the headers of the request.
        name: in lower case.
    """
    for key, value in headers.items():
        if key.lower() == name and isinstance(value, str):
            return value
    return ""


def own_header(headers: Mapping, name: str) -> str:
    """Return the value of a header that a trusted proxy sets, with exactly this name; "" if it is missing.

    A mapping in its place is what TorchServe says about an input of this name.
    """
    value = headers.get(name)
    return value if isinstance(value, str) else ""


class RequestHeaders(NamedTuple):
    """What the headers say about the request; "" if they say nothing.

    Attributes:
        media_type: in lower case, without parameters.
        charset: in lower case.
        encoding: how the body is compressed, in lower case.
        query: of the URL, still percent-encoded. The frontend's agent writes it into a header.
    """

    media_type: str = ""
    charset: str = ""
    encoding: str = ""
    query: str = ""


@functools.lru_cache(maxsize=64)
def split_content_type(value: str) -> tuple[str, str]:
    """Return media type and charset of a Content-Type, in lower case."""
    media_type, _, parameters = value.partition(";")
    found = CHARSET.search(parameters)
    return media_type.strip().lower(), found[1].lower() if found else ""


def request_headers(headers: Mapping) -> RequestHeaders:
    """Read Content-Type, Content-Encoding and the query in one pass."""
    media_type = charset = encoding = query = ""
    for name, value in headers.items():
        if len(name) not in (12, 16) or not isinstance(value, str):
            continue
        match name.lower():
            case "content-type":
                media_type, charset = split_content_type(value)
            case "content-encoding":
                encoding = value.strip().lower()
            case "bundle-query":
                query = value
    return RequestHeaders(media_type, charset, encoding, query)


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
    this only if `behind_proxy()`; otherwise the client may have set the header.
    """
    text = header(headers, "x-request-start").removeprefix("t=")
    if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text, re.ASCII):
        return None
    seconds = float(text)
    return seconds if 0 <= time.time() - seconds < 3600 else None
