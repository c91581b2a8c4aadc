"""Open a page on which to try the served models: `bundle page` starts this in the page's own environment."""

import argparse
import contextlib
import os
import socket
import sys
import webbrowser
from pathlib import Path

# before gradio is imported: it reads these once, and would report to its makers
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}

import uvicorn

from bundle.errors import BundleError
from page.served import Proxied, Recorded, Served

ENDING_SECONDS = 1  # for open connections of browsers


class Server(uvicorn.Server):
    """The web server, which says where the page is once it can be opened."""

    def __init__(self, config: uvicorn.Config, url: str, browser: bool):
        super().__init__(config)
        self.url, self.browser = url, browser

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, then print the address and open a browser."""
        await super().startup(sockets=sockets)
        if self.started:
            print(f"The page is at {self.url} (Ctrl-C ends it).", flush=True)
            if self.browser:
                webbrowser.open(self.url)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="page", description=__doc__)
    parser.add_argument("--record", type=Path, default=Path("build/run/server.json"), help="of the server")
    parser.add_argument("--proxy", metavar="URL", help="the Docker stack's proxy; the page is behind it, at /page/")
    parser.add_argument("--names", type=str.split, default=[], help="of the proxy; without any, all over TLS")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--files", type=Path, default=Path("build/page"), help="folder for the files that are sent")
    parser.add_argument("--browser", action="store_true", help="open a browser")
    return parser.parse_args()


def check_port(host: str, port: int) -> None:
    """Check that the page can listen, before gradio is loaded.

    Raises:
        BundleError: another program has the port, or the address is not of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise BundleError(
                f"The page cannot listen on {host}:{port}: {exc.strerror}. Set another port: make page PAGE_PORT=7861"
            ) from exc


def main() -> None:
    """Serve the page until Ctrl-C."""
    given = arguments()
    files = given.files.absolute()
    os.environ["GRADIO_TEMP_DIR"] = str(files)
    served: Served = Proxied(given.proxy) if given.proxy else Recorded(given.record)
    try:
        if not given.proxy:  # the stack starts its services in any order
            served.models()
        check_port(given.host, given.port)
    except (BundleError, OSError) as error:
        sys.exit(f"error: {error}")
    from page.site import site  # imports gradio, which takes seconds

    loopback = given.host in ("127.0.0.1", "localhost")
    config = uvicorn.Config(
        site(served, files, given.names if given.proxy or loopback else None),
        host=given.host,
        port=given.port,
        log_level="warning",
        proxy_headers=bool(given.proxy),
        forwarded_allow_ips="*",  # with a proxy, only it reaches this server
        timeout_graceful_shutdown=ENDING_SECONDS,
    )
    url = f"http://{given.host}:{given.port}{served.path.rstrip('/')}"
    with contextlib.suppress(KeyboardInterrupt):
        Server(config, url, given.browser).run()
    print("\nThe page has ended.")


if __name__ == "__main__":
    main()
