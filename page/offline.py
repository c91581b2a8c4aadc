"""Keep browsers on the server that the page comes from: Gradio's scripts name hosts of fonts, maps and libraries."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# what a browser may load and run: only what comes from this server, or is in the page
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
Message = MutableMapping[str, Any]


class Offline:
    """An ASGI application that sends each answer of another one with `POLICY`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answer one request."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)
