"""mosec, LitServe, BentoML and MLServer; each runs `loadtest.bench.peers.NAME` in its own environment."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bundle.server.ports import free_ports
from loadtest.bench import resnet
from loadtest.bench.cases import Case
from loadtest.bench.paths import WORK
from loadtest.bench.systems.base import Endpoint, batching, first
from loadtest.bench.systems.environment import Environment
from loadtest.bench.systems.processes import wait_for_answer, workplace

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"


@dataclass(frozen=True)
class Wire:
    """The form of a server's requests and answers.

    Attributes:
        path: path of the URL.
        content_type: content type of every request; None for that of the case.
        pack: converts the case's input to the body of a request.
        top: returns the first class and its probability of an answer.
    """

    path: str = "/predict"
    content_type: str | None = None
    pack: Callable[[bytes], bytes] = bytes
    top: Callable[[bytes], tuple[int, float]] = first


def v2_request(body: bytes) -> bytes:
    """Return a request of the Open Inference Protocol in JSON: a batch of one input, as base64."""
    data = [base64.b64encode(body).decode()]
    return json.dumps({"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": data}]}).encode()


def v2_first(answer: bytes) -> tuple[int, float]:
    return first_of(answer, lambda parsed: json.loads(parsed["outputs"][0]["data"][0]))


def bento_request(body: bytes) -> bytes:
    """Return a request of BentoML in JSON: a batchable endpoint takes a list."""
    return json.dumps({"inputs": [base64.b64encode(body).decode()]}).encode()


def bento_first(answer: bytes) -> tuple[int, float]:
    return first_of(answer, lambda parsed: parsed[0])


def first_of(answer: bytes, ranking: Callable[[Any], Any]) -> tuple[int, float]:
    """Return the first class and its probability of an answer that contains the ranking."""
    try:
        inside = json.dumps(ranking(json.loads(answer))).encode()
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise ValueError(f"The answer is not in this server's form: {answer[:200]!r}") from exc
    return first(inside)


@dataclass(frozen=True)
class Peer:
    """A server with its own environment.

    Attributes:
        package: the package whose version is reported.
        module: the module of `loadtest.bench.peers` that runs it.
    """

    name: str
    package: str
    module: str
    wire: Wire = field(default_factory=Wire)

    @property
    def environment(self) -> Environment:
        return Environment(WORK / "env" / self.name, REQUIREMENTS / f"{self.name}.txt")

    @property
    def version(self) -> str:
        return self.environment.version(self.package)

    def install(self) -> None:
        self.environment.install()

    @contextmanager
    def serve(self, case: Case) -> Iterator[Endpoint]:
        self.install()
        if case.model == resnet.NAME:
            resnet.make()
        headers = {"Content-Type": self.wire.content_type or case.content_type}
        body = self.wire.pack(case.body)
        with workplace(f"{self.name}-{case.name}") as place:
            [port] = free_ports(1)
            url = f"http://127.0.0.1:{port}{self.wire.path}"
            module = f"loadtest.bench.peers.{self.module}"
            wanted = batching(case)
            task = map(str, (port, case.name, wanted.size, wanted.delay))
            server = place.start([self.environment.python, "-m", module, *task])
            wait_for_answer(place, server, url, headers, body, self.wire.top)
            yield Endpoint(url, headers, body, server.pid, top=self.wire.top)


PEERS = (
    Peer("mosec", "mosec", "mos", Wire(path="/inference")),
    # with the content type of JSON, FastAPI would parse the body
    Peer("litserve", "litserve", "lit", Wire(content_type="application/octet-stream")),
    Peer("bentoml", "bentoml", "bento", Wire(content_type="application/json", pack=bento_request, top=bento_first)),
    Peer(
        "mlserver",
        "mlserver",
        "mls",
        Wire("/v2/models/model/infer", "application/json", v2_request, v2_first),
    ),
)
