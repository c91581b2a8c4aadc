"""The `handler:` section of model-config.yaml, checked once when the worker starts.

pydantic, because a wrong setting then names itself, what it got and what it takes.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from handlers.core.precision import Wanted

PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """What every handler can be told. A handler adds its own in a nested `Settings` class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: PositiveInt = 1  # intra-op CPU threads of a worker: workers x threads should not exceed the cores
    precision: Wanted = "auto"  # of the arithmetic: "auto", and a list, are measured when the worker starts
    max_instances: PositiveInt = 32  # inputs in one {"instances": [...]} request
    max_wait_seconds: PositiveFloat | None = None  # while others wait, what waited longer gets 429
    # s, after which no further input of a batch is decoded; well below responseTimeout, at which a worker is killed
    max_decode_seconds: PositiveFloat = 10.0
    cache_entries: NaturalInt = 0  # answers that a worker keeps, for inputs that come again; 0 keeps none
