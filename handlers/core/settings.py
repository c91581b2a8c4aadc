"""The `handler:` section of model-config.yaml, checked once when the worker starts.

The error message of pydantic names the wrong setting, its value and what is accepted.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from handlers.core.precision import RequestedPrecision

PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """The settings of every handler. A handler adds its own in a nested `Settings` class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: PositiveInt = 1  # intra-op CPU threads of a worker: workers x threads should not exceed the cores
    precision: RequestedPrecision = "auto"  # "auto" or a list: the fastest, measured when the worker starts
    cuda_graphs: bool = False  # on a GPU, replay the module as CUDA graphs: fewer calls, more memory
    max_instances: PositiveInt = 32  # inputs in one {"instances": [...]} request
    max_answer_bytes: PositiveInt = 16_000_000  # below `max_response_size` of the server, which ends the worker
    # s; in a full batch, a request that waited longer gets 429. None: no limit
    max_wait_seconds: PositiveFloat | None = None
    # s, after which no further input of a batch is decoded; well below responseTimeout, at which a worker is killed
    max_decode_seconds: PositiveFloat = 10.0
    # s, after which no further run of the module is started for a batch: instances and tiles can be many runs
    max_inference_seconds: PositiveFloat = 10.0
    # s, after which the explanations of a batch that are not finished get 429: so long they may delay the next batch
    max_explain_seconds: PositiveFloat = 5.0
    cache_entries: NaturalInt = 0  # answers to repeated inputs that a worker keeps; 0 turns the cache off
    # classes that have a counter of their own in the metrics of predictions; the others share one. 0: no such metrics
    counted_classes: NaturalInt = 32
