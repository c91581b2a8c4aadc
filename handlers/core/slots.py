"""The slots of a batch: each holds one request and its decoded samples."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import JsonValue
from torch import Tensor

from handlers.core.errors import AnswerTooLarge, NonFiniteOutput, ServingError, UnsupportedInput
from handlers.core.inputs import Options
from handlers.core.outputs import tensors

# the check for values that contain themselves takes a sixth of the time
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode


def encode_json(value: object) -> bytes:
    r"""Return the text that `json.dumps(ensure_ascii=False)` returns, in UTF-8; lone surrogates are escaped (\ud800).

    Raises:
        TypeError: JSON has no such type.
        ValueError: the value contains NaN or infinity, which JSON does not have.
        RecursionError: the value contains itself.
    """
    return to_json(value).encode(errors="backslashreplace")


@dataclass(slots=True)
class Sample:
    """One decoded input.

    Attributes:
        tensors: the input of `collate`, on the CPU.
        info: anything else about the input that `encode` needs: an image's original size, a graph's node names.
        inputs: what it was decoded from. Only set for explanations, which may draw it.
    """

    tensors: Tensor | tuple[Tensor, ...]
    info: object = None
    inputs: Any = None

    def is_finite(self) -> bool:
        return all(bool(each.isfinite().all()) for each in tensors(self.tensors))


@dataclass(frozen=True, slots=True)
class Picture:
    """An answer that is an image file instead of JSON."""

    content: bytes
    content_type: str = "image/png"


class Response(NamedTuple):
    """The response to one request.

    Attributes:
        body: as it is sent.
        content_type: of the body.
        json_size: bytes of JSON at the beginning of a body in which binary tensors follow; None in all others.
    """

    body: str | bytes
    content_type: str = "application/json"
    json_size: int | None = None


Answer = JsonValue | Picture


@dataclass(slots=True)
class Slot:
    """One request of a batch, on its way through the stages.

    Attributes:
        open_inference: whether the client speaks the Open Inference Protocol.
        options: the request's options.
        many: whether the body has the form {"predictions": [...]}.
        respond: makes the response of the answers instead, in the form of another protocol.
        samples: the decoded inputs.
        explained: whether the request asks for an explanation instead of a prediction.
        key: the key of the answers in the cache; None if the cache is off.
        response: empty until the request is answered.
        error: the error to respond with instead.
        trace: its `tracing.Traced`; None if traces are off, or if neither a client nor the sampler has asked for one.
    """

    open_inference: bool = False
    options: Options | None = None
    many: bool = False
    respond: Callable[[list[Answer]], Response] | None = None
    samples: list[Sample] = field(default_factory=list)
    explained: bool = False
    key: bytes | None = None
    response: Response = Response("")
    error: ServingError | None = None
    trace: Any = None

    def finish(self, answers: list[Answer]) -> None:
        """Make the response: one answer per sample. A picture is the only answer of its request.

        Raises:
            NonFiniteOutput: an answer contains NaN or infinity, which JSON does not have.
            UnsupportedInput: so does the input, in the precision of its tensors.
        """
        if not self.many and not self.respond and isinstance(answers[0], Picture):
            self.response = Response(answers[0].content, answers[0].content_type)
            return
        try:
            if self.respond:
                self.response = self.respond(answers)
                return
            # encoded here, because TorchServe would indent it, which is longer and uses Python's slow encoder
            self.response = Response(encode_json({"predictions": answers} if self.many else answers[0]))
        except ValueError as exc:
            if "JSON compliant" not in str(exc):
                raise
            if not all(sample.is_finite() for sample in self.samples):
                raise UnsupportedInput("The input has a number that is too large for the model.") from exc
            raise NonFiniteOutput("The model's output for this input is not a finite number.") from exc

    def sent(self, limit: int) -> Response:
        """Return what the client gets: the response, or the error in the form of its protocol.

        Args:
            limit: the most bytes of a response. TorchServe ends a worker that sends more than it accepts.
        """
        if self.error is None and len(self.response.body) > limit:
            self.error = AnswerTooLarge(
                f"The answer has {len(self.response.body)} bytes; at most {limit} are sent. Send several requests."
            )
        if self.error is None:
            return self.response
        return Response(encode_json({"error": str(self.error)} if self.open_inference else self.error.body()))
