"""The web application that serves the page."""

from collections.abc import Iterable
from pathlib import Path

import gradio
from fastapi import FastAPI

from page.app import CSS, page
from page.names import KnownNames
from page.offline import Offline
from page.served import Served


def site(served: Served, files: Path, names: Iterable[str] | None) -> Offline:
    """Return the application.

    Args:
        files: the folder for example files.
        names: under which it answers, besides localhost and its addresses; without any, under all names over TLS, too.
            None for all names.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = page(served, files / "examples")
    mounted = gradio.mount_gradio_app(
        app, blocks, path=served.path, theme=theme, css=CSS, footer_links=[], show_error=True
    )
    return Offline(mounted if names is None else KnownNames(mounted, names))
