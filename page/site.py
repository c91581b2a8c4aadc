"""The web application that serves the page."""

from pathlib import Path

import gradio
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from page.app import CSS, page
from page.offline import Offline
from page.served import Served


def site(served: Served, files: Path, host: str) -> Offline:
    """Return the application.

    Args:
        files: the folder for example files.
        host: the address that it listens on. On loopback, requests with another Host are rejected, so that no page of
            another site can reach it by a name of its own.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = ["127.0.0.1", "localhost", host] if host in ("127.0.0.1", "localhost") else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = page(served, files / "examples")
    return Offline(
        gradio.mount_gradio_app(app, blocks, path="/", theme=theme, css=CSS, footer_links=[], show_error=True)
    )
