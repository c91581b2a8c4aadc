"""The template that every handler of the bundle fills in: a batch of requests in, one answer a request out.

A request's way: row -> `read` (inputs, options) -> `decode` (one input -> one `Sample`) -> `collate` (one batch) -> one
copy to the device -> the module -> `reduce` on the device -> one copy back -> `encode` (one row -> one JSON value) ->
its slot. The template knows neither what the inputs are nor what an answer looks like.

A request that cannot be served takes its own slot out of the batch, with its own status; its neighbours are untouched.
An unexpected exception is a bug. Its traceback is logged, and it is answered 500: to one request where that can be
told, else to the batch. (TorchServe's own answer, 503, would read as "overloaded, retry".) After a fault of the
accelerator itself the worker exits, and TorchServe starts another one.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handlers.core import admission, device, inputs, memory, precision, settings, wire
from handlers.core.cache import AnswerCache
from handlers.core.errors import (
    InsufficientMemory,
    InternalError,
    NonFiniteOutput,
    RequestError,
    ServingError,
    UnsupportedOperation,
)
from handlers.core.headers import Verb, behind_proxy, proxy_arrival, requested_verb
from handlers.core.metrics import HandlerMetrics
from handlers.core.outputs import Outputs, rows, to_host
from handlers.core.request import Request, RequestReader
from handlers.core.slots import Sample, Slot

logger = logging.getLogger(__name__)

Part = tuple[Outputs, int]  # what `reduce` returned, and for how many samples

LARGEST_TRIAL = 8  # inputs on which precisions are compared,
TRIAL_SECONDS = 0.5  # or as many as take so long
WARM_UP_SECONDS = 2.0
TO_WRITE = """{handler} must define `{method}`. The least that a handler writes:

    class {handler}(BatchHandler):
        class Inputs(inputs.Inputs):
            data: Text

        def decode(self, inputs):
            return Sample(torch.tensor([float(len(inputs.data))]))

        def example(self):
            return Sample(torch.zeros(1))

        def encode(self, row, info, options):
            return {{"score": row.item()}}
"""


class BatchHandler(BaseHandler):
    """Serves a TorchScript module. A subclass declares `Inputs`, fills in `decode`, `example` and `encode`, and
    overrides whatever else differs.
    """

    Settings: type[settings.Settings] = settings.Settings
    Inputs: type[inputs.Inputs] = inputs.Inputs
    Options: type[inputs.Options] = inputs.Options

    def __init__(self):
        super().__init__()
        del self.explain  # a flag of BaseHandler, which would hide the method

    # --- what a subclass fills in ------------------------------------------------------------------------------

    def load_assets(self, folder: Path) -> None:
        """Load what the archive carries beside the module (a tokenizer, say) from the unpacked `folder`."""

    def decode(self, inputs: inputs.Inputs) -> Sample:
        """Decode the inputs of one sample.

        Raises:
            RequestError: an input cannot be decoded. The error is answered to this request alone.
        """
        raise NotImplementedError(TO_WRITE.format(handler=type(self).__name__, method="decode"))

    def example(self) -> Sample:
        """Return a sample of typical shape, to warm the model up with."""
        raise NotImplementedError(TO_WRITE.format(handler=type(self).__name__, method="example"))

    def encode(self, row: object, info: object, options: inputs.Options) -> JsonValue:
        """Make the JSON value of an answer.

        Args:
            row: of `reduce`, on the host.
            info: the sample's.
            options: the request's.
        """
        raise NotImplementedError(TO_WRITE.format(handler=type(self).__name__, method="encode"))

    # --- what a subclass may override --------------------------------------------------------------------------

    def read(self, row: dict, headers: Mapping) -> Request:
        """Read one row of a batch. By default, as `Inputs` and `Options` declare it.

        Args:
            row: {field: value}, as TorchServe hands it over.
            headers: the request's own, as its client sent them.

        Raises:
            RequestError: the request is malformed.
        """
        return self.reader.read(row, headers)

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Make the module's inputs, the batch as first dimension. By default, samples of one shape are stacked."""
        tensors = (s.tensors if isinstance(s.tensors, tuple) else (s.tensors,) for s in samples)
        return tuple(torch.stack(column) for column in zip(*tensors, strict=True))

    def reduce(self, outputs: Outputs) -> Outputs:
        """Reduce the module's outputs, on the device, to what is copied to the host: exactly one row a sample.

        A row is one of a tensor [N, ...], of a tuple or dict of such tensors, or of a list with N entries. By default,
        the outputs as they are. Pad ragged outputs here, and cut them in `encode`.
        """
        return outputs

    def predict(self, samples: list[Sample]) -> list[object]:
        """Run the samples in batches of at most the configured size.

        Returns:
            a row of `reduce` for each sample, on the host; or the ServingError that its request is answered.
        """
        size = self.batch_size
        parts = [part for start in range(0, len(samples), size) for part in self.run(samples[start : start + size])]
        return [row for part in parts for row in ([part] if isinstance(part, ServingError) else self.fetch(*part))]

    def explain(self, sample: Sample, options: inputs.Options) -> JsonValue:
        """Make the JSON value of an explanation."""
        raise UnsupportedOperation("This model gives no explanations. Use /predictions.")

    def describe(self) -> dict:
        """Return what `GET /models/NAME/VERSION?customized=true` shows."""
        return {
            "handler": type(self).__name__,
            "precision": self.precision,
            "settings": self.settings.model_dump(),
        }

    # --- the stages of BaseHandler, once for all -----------------------------------------------------------------

    def initialize(self, context: Context) -> None:
        """Load the model onto the worker's device, and run it at the batch sizes that it will see.

        Raises:
            pydantic.ValidationError: the `handler:` section of model-config.yaml is wrong.
            TypeError: `Inputs` or `Options` is declared wrongly.
        """
        self.settings = self.Settings.model_validate((context.model_yaml_config or {}).get("handler") or {})
        self.behind_proxy = behind_proxy()
        self.reader = RequestReader(self.Inputs, self.Options, self.settings.max_instances)
        torch.set_num_threads(self.settings.threads)
        memory.keep_freed_memory()
        super().initialize(context)
        self.context = context
        self.metrics = HandlerMetrics(context)
        self.cache = AnswerCache(self.settings.cache_entries)
        self.batch_size = max(1, context.system_properties["batch_size"] or 1)
        self.load_assets(Path(context.system_properties["model_dir"]))
        self.optimize()
        self.warm_up()
        wire.buffer_reads()
        memory.settle()

    @torch.inference_mode()
    def optimize(self) -> None:
        """Put the fastest equivalent in the model's place."""
        for _ in range(3):  # TorchScript profiles the first run, and optimises in the second
            start = time.perf_counter()
            self.model(*self.trial(1))
        affordable = int(TRIAL_SECONDS / (time.perf_counter() - start))
        batch = self.trial(max(1, min(self.batch_size, LARGEST_TRIAL, affordable)))
        folder = Path(self.context.system_properties["model_dir"])
        wanted = self.settings.precision
        self.precision, self.model = precision.fastest(self.model, wanted, self.device, batch, folder)
        logger.info("%s computes in %s", self.context.model_name, self.precision)

    def trial(self, size: int) -> tuple[Tensor, ...]:
        return tuple(map(self.to_device, self.collate([self.example()] * size)))

    def warm_up(self) -> None:
        """Run the batch sizes that there is time for: TorchScript and oneDNN specialise in the first runs of each.

        Raises:
            Exception: whatever the model or `reduce` raises: such a model does not start.
        """
        deadline = time.monotonic() + WARM_UP_SECONDS
        for size in dict.fromkeys([1, self.batch_size, *range(2, self.batch_size)]):
            for _ in range(3):
                for row in self.predict([self.example()] * size):
                    if isinstance(row, InternalError):
                        raise RuntimeError(f"{self.context.model_name} fails on its own example: see above")
                if time.monotonic() > deadline:
                    return

    def handle(self, data: list[dict], context: Context) -> list[str]:
        """Answer a batch: one entry of `data` a request -> one JSON text a request, in the same order."""
        self.context = context
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        arrivals = [proxy_arrival(each) for each in headers] if self.behind_proxy else [None] * len(data)
        first_arrival = min(filter(None, arrivals), default=None)
        if first_arrival is not None:
            self.metrics.observe("queue", time.time() - first_arrival)
        self.metrics.count_batch(len(data))
        try:
            slots = self.serve(data, headers, arrivals)
        except MemoryError:
            raise  # TorchServe has a status for it: 507
        except Exception as exc:
            if device.is_broken(exc):
                logger.exception("the device failed under %s: this worker exits", self.context.model_name)
                raise SystemExit(1) from exc
            logger.exception("a bug failed a batch of %s", self.context.model_name)
            slots = [Slot(error=internal_error("this batch of requests")) for _ in data]
        answers = self.postprocess(slots)
        if first_arrival is not None:
            self.metrics.observe("request", time.time() - first_arrival)
        self.metrics.emit()
        memory.trim()
        return answers

    def serve(self, data: list[dict], headers: list[Mapping], arrivals: list[float | None]) -> list[Slot]:
        """Run the stages, each timed: the predictions as one batch, then the explanations, one after the other."""
        with self.metrics.timed("decode"):
            slots = self.preprocess(data, headers, arrivals)
        predicted = [slot for slot in slots if slot.samples and not slot.explained]
        predictions: list[object] = []
        if predicted:
            with self.metrics.timed("inference"):
                predictions = self.predict([sample for slot in predicted for sample in slot.samples])
        with self.metrics.timed("encode"):
            self.scatter(predicted, predictions)
        for slot in slots:
            if slot.samples and slot.explained:
                self.isolate(slot, self.explain_slot)
        return slots

    def preprocess(self, data: list[dict], headers: list[Mapping], arrivals: list[float | None]) -> list[Slot]:
        """Read and decode each request by itself."""
        slots = [Slot() for _ in data]
        deadline = admission.Deadline.after(self.settings.max_decode_seconds)
        if len(data) < self.batch_size:
            arrivals = [None] * len(data)  # nobody waits behind this batch
        for slot, row, own, arrival in zip(slots, data, headers, arrivals, strict=True):
            self.isolate(slot, self.open_slot, row, own, deadline, arrival)
        return slots

    def isolate(self, slot: Slot, stage: Callable[..., None], *arguments: object) -> None:
        """Run a stage of one request. What goes wrong is this request's error alone."""
        try:
            stage(slot, *arguments)
        except MemoryError:
            raise
        except ServingError as error:
            slot.error = error
        except Exception as exc:
            if device.is_broken(exc):
                raise
            logger.exception("a bug failed one request of %s", self.context.model_name)
            slot.error = internal_error("this request")

    def open_slot(
        self, slot: Slot, row: dict, headers: Mapping, deadline: admission.Deadline, arrival: float | None
    ) -> None:
        admission.check_wait(arrival, self.settings.max_wait_seconds)
        verb = requested_verb(row, headers)  # TorchServe mixes predictions and explanations in one batch
        if verb is Verb.DESCRIBE:
            slot.finish([self.describe()])
            return
        slot.explained = verb is Verb.EXPLAIN
        if slot.explained and type(self).explain is BatchHandler.explain:
            BatchHandler.explain(self, None, None)  # says so before anything is decoded
        request = self.read(row, headers)
        slot.options, slot.many = request.options, request.many
        slot.key = self.cache.key(request.inputs, request.options, request.many, verb)
        if known := self.cache.get(slot.key):
            slot.body = known
            return
        for each in request.inputs:
            deadline.check()
            slot.samples.append(self.decode(each))

    def run(self, samples: list[Sample]) -> list[Part | ServingError]:
        """Run one batch. Where it fails, run its halves, so that only the inputs that it fails with are lost.

        Raises:
            Exception: the device is broken.
        """
        try:
            with torch.inference_mode():
                batch = map(self.to_device, self.collate(samples))
                return [(self.reduce(self.model(*batch)), len(samples))]
        except Exception as exc:
            if device.is_broken(exc) or isinstance(exc, MemoryError):
                raise
            exhausted = device.is_out_of_memory(exc)
            if exhausted:
                logger.warning("%d inputs of %s do not fit: %s", len(samples), self.context.model_name, exc)
            elif len(samples) == 1:
                logger.exception("a bug failed one input of %s", self.context.model_name)
        # out of the `except`: the exception holds the frames, and they hold the tensors
        if exhausted:
            torch.cuda.empty_cache()
        if len(samples) == 1:
            too_large = "The device has not enough memory for this input. Send a smaller one."
            return [InsufficientMemory(too_large) if exhausted else internal_error("this input")]
        middle = len(samples) // 2
        return self.run(samples[:middle]) + self.run(samples[middle:])

    def fetch(self, reduced: Outputs, count: int) -> list[object]:
        """Copy what `reduce` returned to the host, and split it into a row a sample.

        Raises:
            RuntimeError: the number of rows is another: requests would get each other's answers.
        """
        fetched = rows(to_host(reduced))
        if len(fetched) != count:
            raise RuntimeError(
                f"{type(self).__name__}.reduce returned {len(fetched)} rows for {count} samples. It must return "
                "exactly one row a sample: pad what differs in length, and cut it in `encode`."
            )
        return fetched

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy without waiting, where there is a GPU: only pinned memory is copied while the CPU goes on."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def scatter(self, slots: list[Slot], predictions: list[object]) -> None:
        """Encode the rows into the slots that they came from.

        Raises:
            RuntimeError: there are not as many rows as samples.
        """
        wanted = sum(len(slot.samples) for slot in slots)
        if len(predictions) != wanted:
            raise RuntimeError(f"{type(self).__name__}.predict returned {len(predictions)} rows for {wanted} samples.")
        remaining = iter(predictions)
        for slot in slots:
            self.isolate(slot, self.encode_slot, [next(remaining) for _ in slot.samples])

    def encode_slot(self, slot: Slot, rows: list[object]) -> None:
        for row in rows:
            if isinstance(row, ServingError):
                raise row
        answers = [self.encode(row, sample.info, slot.options) for row, sample in zip(rows, slot.samples, strict=True)]
        slot.finish(answers)
        self.cache.put(slot.key, slot.body)

    def explain_slot(self, slot: Slot) -> None:
        slot.finish([self.explain(sample, slot.options) for sample in slot.samples])
        self.cache.put(slot.key, slot.body)

    def postprocess(self, slots: list[Slot]) -> list[str]:
        """Set each request's status and content type, and return its body."""
        answers, statuses, rejections = [], [], []
        for index, slot in enumerate(slots):
            self.context.set_response_content_type(index, "application/json")
            error = slot.error
            if error is None:
                statuses.append(200)
                answers.append(slot.body)
                continue
            if isinstance(error, RequestError):
                rejections.append(type(error).__name__)
            elif isinstance(error, NonFiniteOutput):
                logger.error("%s returned a number that is not finite", self.context.model_name)
            statuses.append(error.code)
            self.context.set_response_status(error.code, type(error).__name__, index)
            answers.append(json.dumps(error.body()))
        self.metrics.count_answers(statuses, rejections)
        return answers


def internal_error(failed: str) -> InternalError:
    return InternalError(f"The handler failed on {failed}. The server's log has the traceback.")
