"""Reject requests whose Host another site could own (DNS rebinding)."""

import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

UNKNOWN = "The page does not answer under this name, which could be that of another site. See docs/page.md.\n"


class KnownNames:
    """An ASGI application that rejects the requests to another one that come under unknown names.

    A site can have its own name resolve to the address of this page. A browser then lets the site read whatever the
    page answers under that name. No site can do this with an address, nor with a name over TLS, because it has no
    certificate for this server. But only a header says that TLS was used, so it does not count where names are given.

    Args:
        names: that are known, besides localhost. Without any, all names are known over TLS.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], names: Iterable[str] = ()):
        given = frozenset(name.lower() for name in names)
        self.app, self.names, self.trusts_tls = app, given | {"localhost"}, not given

    async def __call__(
        self, scope: dict, receive: Callable, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]
    ) -> None:
        """Answer one request."""
        if scope["type"] != "http" or self.accepts(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": UNKNOWN.encode()})

    def accepts(self, scope: dict) -> bool:
        """Return whether a request came under a name that no other site can own."""
        proven = self.trusts_tls and scope["scheme"] == "https"
        return proven or self.knows(dict(scope["headers"]).get(b"host"))

    def knows(self, host: bytes | None) -> bool:
        """Return whether a Host header has a known name, or an address."""
        try:
            name = urlsplit(f"//{(host or b'').decode('latin-1')}").hostname or ""
        except ValueError:  # such as "[::1"
            return False
        return name in self.names or is_address(name)


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
