"""What a batch is made of: requests in their slots, each with its decoded samples."""

import json
from dataclasses import dataclass, field

from pydantic import JsonValue
from torch import Tensor

from handlers.core.errors import NonFiniteOutput, ServingError
from handlers.core.inputs import Options

encode = json.JSONEncoder(allow_nan=False).encode


@dataclass(slots=True)
class Sample:
    """One decoded input.

    Attributes:
        tensors: what the batch is collated of, on the CPU.
        info: anything about the input that `encode` needs: an image's original size, a graph's node names.
    """

    tensors: Tensor | tuple[Tensor, ...]
    info: object = None


@dataclass(slots=True)
class Slot:
    """One request of a batch, on its way through the stages.

    Attributes:
        options: of the request.
        many: whether it is answered as {"predictions": [...]}.
        samples: its decoded inputs.
        explained: whether it asks for an explanation rather than for a prediction.
        key: of its answer in the cache, where one is kept.
        body: the JSON text that it is answered.
        error: why it is answered an error instead.
    """

    options: Options | None = None
    many: bool = False
    samples: list[Sample] = field(default_factory=list)
    explained: bool = False
    key: bytes | None = None
    body: str = ""
    error: ServingError | None = None

    def finish(self, answers: list[JsonValue]) -> None:
        """Encode an answer a sample.

        Raises:
            NonFiniteOutput: there is NaN or infinity in it, which JSON cannot carry.
        """
        try:
            # as text, because TorchServe would indent it, which is longer and takes Python's slow encoder
            self.body = encode({"predictions": answers} if self.many else answers[0])
        except ValueError as exc:
            if "JSON compliant" not in str(exc):
                raise
            raise NonFiniteOutput("The model's output for this input is not a finite number.") from exc
