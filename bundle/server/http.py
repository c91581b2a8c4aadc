"""The HTTP sessions of the commands: whom they trust, and how they say that they do not trust a server."""

import os
import ssl
from functools import cache
from urllib.parse import urlsplit

import requests

from bundle.errors import BundleError

SECONDS = 30  # timeout of one request
CA_FILE = "CA_FILE"  # names the only authorities to trust; by default, these are the public ones
UNKNOWN_AUTHORITY = range(18, 22)  # OpenSSL's codes: the certificate or its authority is not a trusted one


class Untrusted(BundleError, requests.RequestException):
    """A server does not speak TLS, or its certificate is not trusted."""


class Session(requests.Session):
    """A session that trusts the authorities in CA_FILE, and sends nothing through a proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False  # an internet proxy cannot reach this machine's loopback

    def send(self, request: requests.PreparedRequest, **options) -> requests.Response:
        """Send a request.

        Raises:
            Untrusted: CA_FILE is invalid, or the server's certificate is not trusted.
            requests.RequestException: the request failed for another reason.
        """
        if (request.url or "").startswith("https:"):
            options["verify"] = ca_file() or True
        try:
            return super().send(request, **options)
        except requests.exceptions.SSLError as exc:
            raise Untrusted(describe_failure(request.url or "", exc)) from exc


def ca_file() -> str | None:
    """Return the file that CA_FILE names, or None.

    Raises:
        Untrusted: the file is missing or has no certificate.
    """
    named = os.environ.get(CA_FILE) or None
    if named and (problem := unreadable(named)):
        raise Untrusted(f"{CA_FILE} is {named!r}, and must be a PEM file of certificates: {problem}.")
    return named


def is_url(text: str) -> bool:
    """Return whether a text is a URL that can be split and requested."""
    try:
        urlsplit(text)
        requests.Request("GET", text).prepare()
    except ValueError:  # InvalidURL of requests is one, too; its message has the URL with its secrets
        return False
    return True


@cache
def unreadable(file: str) -> str:
    """Return why a file of certificates cannot be read, or ""."""
    try:
        ssl.create_default_context(cafile=file)
    except ssl.SSLError:
        return "it has no certificate"
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def check_certificate(url: str) -> None:
    """Check the certificate of a server, for a client that does not check it itself; plain HTTP has none.

    Raises:
        Untrusted: see `Session`.
        requests.RequestException: the server does not answer.
    """
    if url.startswith("https:"):
        parts = urlsplit(url)
        session.head(f"{parts.scheme}://{parts.netloc}/ping", timeout=SECONDS)


def describe_failure(url: str, error: BaseException) -> str:
    """Return why there was no TLS connection, and what to do."""
    parts = urlsplit(url)
    server = f"{parts.scheme}://{parts.netloc}"
    cause: BaseException | None = error
    while cause and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, ssl.SSLCertVerificationError):
        return f"{server} does not answer with TLS: {cause or error}. Check the URL and its port."
    advice = (
        f"Set {CA_FILE} to a PEM file with the certificate of its authority."
        if cause.verify_code in UNKNOWN_AUTHORITY
        else "Use a host name that it names."
        if "not valid for" in cause.verify_message
        else "Renew it."
        if "expired" in cause.verify_message
        else ""
    )
    return f"The certificate of {server} is not trusted: {cause.verify_message.rstrip('.')}. {advice}".rstrip()


session = Session()
