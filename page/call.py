"""One request of the page: sent, and written as the curl command and the Python program that send the same."""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import requests

from bundle.paths import relative
from bundle.server.http import Session, ca_file

SECONDS = 120  # timeout; an explanation of a large image takes a minute
KEY = "TORCHSERVE_KEY"  # the variable with the inference key, in what people copy


@dataclass(frozen=True)
class Reply:
    """The answer to a call.

    Attributes:
        status: 200, or that of an error.
        content: the body.
        seconds: from the request to the last byte of the answer.
    """

    status: int
    content: bytes
    seconds: float

    @property
    def is_picture(self) -> bool:
        return self.content.startswith(b"\x89PNG")

    @property
    def refuses_key(self) -> bool:
        """Whether TorchServe requires a key, and the request had none or a wrong one."""
        body = self.json()
        return self.status == 400 and isinstance(body, dict) and body.get("type") == "InvalidKeyException"

    def json(self) -> Any:
        """Return the body's JSON; None if it is not JSON."""
        try:
            return json.loads(self.content)
        except ValueError:
            return None

    def error(self) -> str:
        """Return what the server says of an error, such as "400 MissingField: The field data is missing"."""
        body = self.json()
        if isinstance(body, dict) and "message" in body:
            return f"{self.status} {body.get('type', '')}: {body['message']}"
        said = self.content.decode(errors="replace").strip()[:500]
        if self.status == 413 and not said:
            said = "The request is larger than the server accepts."
        return f"{self.status}: {said or 'The answer has no text.'}"


@dataclass(frozen=True)
class Call:
    """A request for an answer or an explanation.

    Attributes:
        url: without options.
        options: by name.
        files: inputs that are sent as files.
        values: inputs that are sent as text or JSON.
        keyed: whether the server requires a key.
    """

    url: str
    options: dict[str, Any]
    files: dict[str, Path]
    values: dict[str, Any]
    keyed: bool = False

    def but(self, **changes: Any) -> "Call":
        return replace(self, **changes)

    def send(self, auth: Callable[[requests.PreparedRequest], requests.PreparedRequest] | None = None) -> Reply:
        """Send it, and wait for the answer.

        Raises:
            OSError: a file cannot be read, or the server does not answer (a requests.RequestException).
            BundleError: the server's certificate is not trusted, or its key is missing.
        """
        if self.files:
            files = {name: (file.name, file.read_bytes()) for name, file in self.files.items()}
            body: dict[str, Any] = {"files": files, "data": self.form_values()}
        else:
            body = {"json": self.values}
        with Session() as session:
            start = time.perf_counter()
            answer = session.post(self.url, params=self.options, auth=auth, timeout=SECONDS, **body)
            return Reply(answer.status_code, answer.content, time.perf_counter() - start)

    def form_values(self) -> dict[str, str]:
        """Return the values as fields of a form, where each one that is not a text is JSON."""
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.values.items()}

    def curl(self, output: str = "") -> str:
        """Return the command that sends this call.

        Args:
            output: the file for the answer; by default, it is printed.
        """
        words = ["curl"]
        if trusted := ca_file() if self.url.startswith("https:") else None:
            words += ["--cacert", shlex.quote(trusted)]
        if self.keyed:
            words += ["-H", f'"Authorization: Bearer ${KEY}"']
        if self.files:
            for name, file in self.files.items():
                words += ["-F", shlex.quote(f"{name}=@{form_path(file)}")]
            for name, value in self.form_values().items():
                words += ["--form-string", shlex.quote(f"{name}={value}")]
        else:
            words += ["-H", "'Content-Type: application/json'", "-d", shlex.quote(json.dumps(self.values))]
        words += ["-o", shlex.quote(output)] if output else []
        query = f"?{urlencode(self.options)}" if self.options else ""
        return " ".join([*words, shlex.quote(self.url + query)])

    def python(self, output: str = "") -> str:
        """Return the program that sends this call; `output` as in `curl`."""
        lines = ["import os", "", "import requests", ""] if self.keyed else ["import requests", ""]
        lines += ["answer = requests.post(", f"    {self.url!r},"]
        lines += [f"    params={self.options!r},"] if self.options else []
        if self.files:
            opened = (f"{name!r}: open({relative(file)!r}, 'rb')" for name, file in self.files.items())
            lines += [f"    files={{{', '.join(opened)}}},"]
            lines += [f"    data={self.form_values()!r},"] if self.values else []
        else:
            lines += [f"    json={self.values!r},"]
        if self.keyed:
            lines += [f"    headers={{'Authorization': 'Bearer ' + os.environ['{KEY}']}},"]
        if trusted := ca_file() if self.url.startswith("https:") else None:
            lines += [f"    verify={trusted!r},"]
        written = f"with open({output!r}, 'wb') as file:\n    file.write(answer.content)"
        return "\n".join([*lines, ")", "answer.raise_for_status()", written if output else "print(answer.json())"])


def form_path(file: Path) -> str:
    """Return a file's path as curl reads it in a form, where some characters need quotes."""
    path = relative(file)
    if not set(path) & set(';,"\\'):
        return path
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
