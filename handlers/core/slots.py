"""The slots of a batch: each holds one request and its decoded samples."""

import json
from dataclasses import dataclass, field

from pydantic import JsonValue
from torch import Tensor

from handlers.core.errors import NonFiniteOutput, ServingError
from handlers.core.inputs import Options

encode_json = json.JSONEncoder(allow_nan=False).encode


@dataclass(slots=True)
class Sample:
    """One decoded input.

    Attributes:
        tensors: the input of `collate`, on the CPU.
        info: anything else about the input that `encode` needs: an image's original size, a graph's node names.
    """

    tensors: Tensor | tuple[Tensor, ...]
    info: object = None


@dataclass(slots=True)
class Slot:
    """One request of a batch, on its way through the stages.

    Attributes:
        options: the request's options.
        many: whether the body has the form {"predictions": [...]}.
        samples: the decoded inputs.
        explained: whether the request asks for an explanation instead of a prediction.
        key: the key of the body in the cache; None if the cache is off.
        body: the JSON text of the response.
        error: the error to respond with instead of `body`.
    """

    options: Options | None = None
    many: bool = False
    samples: list[Sample] = field(default_factory=list)
    explained: bool = False
    key: bytes | None = None
    body: str = ""
    error: ServingError | None = None

    def finish(self, answers: list[JsonValue]) -> None:
        """Encode the body: one answer per sample.

        Raises:
            NonFiniteOutput: an answer contains NaN or infinity, which JSON does not have.
        """
        try:
            # encoded here, because TorchServe would indent it, which is longer and uses Python's slow encoder
            self.body = encode_json({"predictions": answers} if self.many else answers[0])
        except ValueError as exc:
            if "JSON compliant" not in str(exc):
                raise
            raise NonFiniteOutput("The model's output for this input is not a finite number.") from exc
