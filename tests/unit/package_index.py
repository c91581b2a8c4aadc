"""A package index on this machine, with small wheels that are made on the fly."""

import io
import platform
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def wheel(name: str, version: str, requires: tuple[str, ...] = (), binary: bool = False) -> tuple[str, bytes]:
    """Return the file name and the content of a wheel with one module.

    Args:
        requires: what it depends on.
        binary: whether it is for this Python and this machine alone.
    """
    tag = f"{TAG}-{TAG}-manylinux_2_17_{platform.machine()}" if binary else "py3-none-any"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"BUILD = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {required}\n" for required in requires),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,{len(text)}\n" for file, text in files.items()) + f"{info}/RECORD,,\n"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return f"{name}-{version}-{tag}.whl", content.getvalue()


class Index:
    """A running index.

    Attributes:
        url: its address, for pip and uv.
        asked: the paths that were fetched.
        held: names of files that are not sent until the index ends.
    """

    def __init__(self, url: str, wheels: dict[str, bytes], held: set[str]):
        self.url, self.wheels, self.held, self.asked = url, wheels, held, list[str]()

    def names(self) -> set[str]:
        """Return the packages that were asked for."""
        return {path.split("/")[2] for path in self.asked if path.startswith("/simple/")}


@contextmanager
def serving(*wheels: tuple[str, bytes], held: set[str] = frozenset()) -> Iterator[Index]:  # type: ignore[assignment]
    """Serve wheels in the format of PyPI's simple index, on a free port of 127.0.0.1."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.command == "GET":
                index.asked.append(self.path)
            folder, _, rest = self.path.strip("/").partition("/")
            files = [file for file in index.wheels if file.partition("-")[0].replace("_", "-") == rest]
            if folder == "files" and (file := rest.replace("%2B", "+")) in index.wheels:
                if file in index.held and self.command == "GET":
                    ended.wait(60)
                self.answer(index.wheels[file], "application/octet-stream")
            elif folder == "simple" and files:
                links = "".join(f'<a href="/files/{file.replace("+", "%2B")}">{file}</a>\n' for file in files)
                self.answer(f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")
            else:
                self.send_error(404)

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # an interrupted client
                    self.wfile.write(body)

        do_HEAD = do_GET  # uv asks for the sizes first

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    index = Index(f"http://127.0.0.1:{server.server_port}/simple", dict(wheels), set(held))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield index
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
