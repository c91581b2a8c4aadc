"""The template of every handler: it takes a batch of requests and returns one response per request.

The path of a request: row -> `read` (inputs, options) -> `decode` (one input -> one `Sample`) -> `collate` (one batch)
-> one copy to the device -> the module -> `reduce` on the device -> one copy back -> `encode` (one row -> one JSON
value) -> its slot. The template knows neither the inputs nor the format of an answer.

A request that fails is rejected in its own slot, with its own status. The other requests of the batch are unaffected.
An unexpected exception is a bug. Its traceback is logged, and the response is 500: for one request if it belongs to
one, otherwise for the batch. After a fault of the accelerator itself the worker exits, and TorchServe starts another
one, which gets the batch's requests.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handlers.core import admission, batching, device, inputs, memory, open_inference, precision, replay, settings, wire
from handlers.core import tracing as traces
from handlers.core.cache import AnswerCache
from handlers.core.errors import (
    InternalError,
    NonFiniteOutput,
    Overloaded,
    ServingError,
    explanation_unsupported,
    input_too_large,
    internal_error,
    missing_method,
)
from handlers.core.headers import Verb, behind_proxy, proxy_arrival, requested_verb
from handlers.core.metrics import HandlerMetrics
from handlers.core.outputs import Outputs, check_rows, split_rows, to_host
from handlers.core.request import Request
from handlers.core.slots import Picture, Sample, Slot
from handlers.core.staging import Staging

logger = logging.getLogger(__name__)

MAX_TRIAL_SIZE = 8  # samples in the batch on which precisions are compared,
TRIAL_SECONDS = 0.5  # or as many as run in this time, if that is fewer
WARM_UP_SECONDS = 2.0


class BatchHandler(BaseHandler):
    """Serve a TorchScript module.

    A subclass declares `Inputs`, defines `decode`, `example` and `encode`, and overrides other methods as needed. The
    type of a parameter that is `Any` here is defined by the subclass: its `Inputs`, `Options`, rows and `info`.
    """

    Settings: type[settings.Settings] = settings.Settings  # a subclass with its own also declares `settings: Settings`
    Inputs: type[inputs.Inputs] = inputs.Inputs
    Options: type[inputs.Options] = inputs.Options
    ExplainOptions: type[inputs.Options] | None = None  # of /explanations; None: those of predictions
    Answer: Any = JsonValue  # the type of what `encode` returns, for the schema only; not that of a picture
    ExplainAnswer: Any = JsonValue  # of what `explain` returns
    model: Any  # a torch.jit.ScriptModule, or a `Replayed` one
    staging = Staging(torch.device("cpu"))  # until `initialize`: an archive is built with `collate` alone
    tracing = traces.Off()

    def __init__(self):
        super().__init__()
        del self.explain  # BaseHandler sets a flag of this name, which would hide the method
        self.inference_deadline = admission.Deadline(math.inf, "Running")  # none while the worker starts

    # --- what a subclass defines -------------------------------------------------------------------------------

    def load_assets(self, folder: Path) -> None:
        """Load the other files of the archive, such as a tokenizer, from the unpacked `folder`."""

    def decode(self, inputs: Any) -> Sample:
        """Decode the inputs of one sample.

        Raises:
            RequestError: an input cannot be decoded. Only this request is rejected.
        """
        raise missing_method(self, "decode")

    def example(self) -> Sample:
        """Return a sample of typical shape, for warming up the model."""
        raise missing_method(self, "example")

    def encode(self, row: Any, info: Any, options: Any) -> JsonValue | Picture:
        """Return the JSON value of an answer, or a picture if the option `format` asks for one.

        Args:
            row: one row of what `reduce` returned, on the host.
            info: `Sample.info` of the sample.
            options: the options of the request.
        """
        raise missing_method(self, "encode")

    # --- what a subclass may override --------------------------------------------------------------------------

    def read(self, row: dict, headers: Mapping) -> Request:
        """Read one row of a batch; by default, as `Inputs` and `Options`, or `ExplainOptions`, declare it.

        Args:
            row: {field: value}, as TorchServe passes it.
            headers: the headers of this request, as its client sent them.

        Raises:
            RequestError: the request is malformed.
        """
        return self.readers[requested_verb(row, headers), open_inference.is_open_inference(headers)].read(row, headers)

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Make the module's inputs, with the batch as first dimension; by default, stack samples of equal shape."""
        tensors = (s.tensors if isinstance(s.tensors, tuple) else (s.tensors,) for s in samples)
        return tuple(self.staging.stack(column) for column in zip(*tensors, strict=True))

    def reduce(self, outputs: Outputs) -> Outputs:
        """Reduce the module's outputs, on the device, to what is copied to the host: exactly one row per sample.

        A row is one of a tensor [N, ...], of a tuple or dict of such tensors, or of a list with N entries. By default,
        the outputs are returned unchanged. Pad ragged outputs here, and cut them in `encode`.
        """
        return outputs

    def predict(self, samples: list[Sample]) -> list[object]:
        """Run the samples in batches of at most the configured size, or one by one if the module takes no batch.

        Returns:
            for each sample, its row of `reduce`, on the host; or the ServingError of a sample that failed.
        """
        size = self.run_size
        # every batch is started before the first one is fetched, because fetching waits for the device
        parts = [part for start in range(0, len(samples), size) for part in self.run(samples[start : start + size])]
        rows = ([part] if isinstance(part, ServingError) else split_rows(self.staging.to_host(part)) for part in parts)
        return [row for each in rows for row in each]

    def explain(self, sample: Sample, options: Any) -> JsonValue | Picture:
        """Return the JSON value of an explanation, or a picture if the option `format` asks for one.

        `sample.inputs` has what the sample was decoded from. Call `self.explain_deadline.check()` now and then.
        """
        raise explanation_unsupported()

    def describe(self) -> dict:
        """Return what `GET /models/NAME/VERSION?customized=true` shows."""
        return {
            "handler": type(self).__name__,
            "precision": self.precision,
            "settings": self.settings.model_dump(mode="json"),
        }

    # --- the methods that TorchServe and BaseHandler call ------------------------------------------------------

    def initialize(self, context: Context) -> None:
        """Load the model onto the worker's device, and run it at the batch sizes that it will get.

        Raises:
            pydantic.ValidationError: the `handler:` section of model-config.yaml is invalid.
            TypeError: `Inputs` or `Options` is declared wrongly.
            ValueError: a variable of OpenTelemetry is invalid.
        """
        self.settings = self.Settings.model_validate((context.model_yaml_config or {}).get("handler") or {})
        self.behind_proxy = behind_proxy()
        self.readers = open_inference.readers(self)
        torch.set_num_threads(self.settings.threads)
        memory.keep_freed_memory()
        super().initialize(context)
        device.select(self.device)
        self.staging = Staging(self.device)
        self.context = context
        self.metrics = HandlerMetrics(context)
        self.cache = AnswerCache(self.settings.cache_entries)
        self.batch_size = self.run_size = max(1, context.system_properties["batch_size"] or 1)
        self.load_assets(Path(context.system_properties["model_dir"]))
        self.optimize()
        self.warm_up()
        self.tracing = traces.start(self)
        wire.read_in_one_pass(context.model_yaml_config)
        memory.freeze_objects()

    @torch.inference_mode()
    def optimize(self) -> None:
        """Replace the model by its fastest equivalent."""
        for _ in range(3):  # TorchScript profiles the first run, and optimises in the second
            start = time.perf_counter()
            to_host(self.model(*self.example_batch(1)))  # on a GPU, the call alone returns before the result is there
        affordable = int(TRIAL_SECONDS / (time.perf_counter() - start))
        size = min(self.batch_size, MAX_TRIAL_SIZE, max(2, affordable))
        batch = self.example_batch(size)
        name = self.context.model_name
        if size > 1 and not batching.takes_batch(lambda: self.reduce(self.model(*batch)), size, name):
            self.run_size = 1
        if self.run_size == 1 or affordable < 2:
            batch = self.example_batch(1)
        folder = Path(self.context.system_properties["model_dir"])
        self.precision, self.model = precision.fastest(self.model, self.settings.precision, self.device, batch, folder)
        logger.info("%s computes in %s", name, self.precision)
        if self.settings.cuda_graphs:
            self.model = replay.replayed(self.model, self.example_batch, self.run_size, self.device, name)

    def example_batch(self, size: int) -> tuple[Tensor, ...]:
        return tuple(map(self.staging.to_device, self.collate([self.example()] * size)))

    def warm_up(self) -> None:
        """Run as many batch sizes as time allows: TorchScript and oneDNN specialise in the first runs of each.

        Raises:
            RuntimeError: the model fails on the handler's example. Such a worker must not start.
        """
        deadline = time.monotonic() + WARM_UP_SECONDS
        for size in dict.fromkeys([1, self.run_size, *range(2, self.run_size)]):
            for _ in range(3):
                if any(isinstance(row, InternalError) for row in self.predict([self.example()] * size)):
                    raise RuntimeError(f"{self.context.model_name} fails on the handler's `example`: see the log above")
                if time.monotonic() > deadline:
                    return

    def handle(self, data: list[dict], context: Context) -> list[str | bytes]:
        """Serve a batch: one row per request -> one body per request, in the same order."""
        self.context = context
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        arrivals = [proxy_arrival(each) if self.behind_proxy else None for each in headers]
        self.metrics.begin(arrivals)
        slots = [Slot(open_inference.is_open_inference(each)) for each in headers]
        with self.tracing.batch(slots, data, headers, arrivals, self.metrics.stages):
            try:
                self.serve(slots, data, headers, arrivals)
            except MemoryError:
                raise  # TorchServe's worker responds 507
            except Exception as exc:
                if device.is_broken(exc):
                    name = self.context.model_name + self.tracing.named(slots)
                    logger.exception("the device failed under %s: this worker exits", name)
                    raise SystemExit(1) from exc
                logger.exception("a bug failed a batch of %s%s", self.context.model_name, self.tracing.named(slots))
                for slot in [each for each in slots if not each.response.body and each.error is None]:
                    slot.error = internal_error("this batch of requests")
            bodies = self.postprocess(slots)
            self.metrics.end()
        memory.trim()
        return bodies

    def serve(self, slots: list[Slot], data: list[dict], headers: list[Mapping], arrivals: list[float | None]) -> None:
        """Run the stages, each timed: the predictions as one batch, then the explanations one by one."""
        with self.metrics.timed("decode"):
            self.preprocess(slots, data, headers, arrivals)
        predicted = [slot for slot in slots if slot.samples and not slot.explained]
        predictions: list[object] = []
        if predicted:
            self.inference_deadline = admission.Deadline.after(self.settings.max_inference_seconds, "Running")
            with self.metrics.timed("inference"):
                predictions = self.predict([sample for slot in predicted for sample in slot.samples])
        with self.metrics.timed("encode"):
            self.scatter(predicted, predictions)
        self.explain_deadline = admission.Deadline.after(self.settings.max_explain_seconds, "Explaining")
        for slot in slots:
            if slot.samples and slot.explained:
                with self.metrics.timed("explain"):
                    self.isolate(slot, self.explain_slot)

    def preprocess(
        self, slots: list[Slot], data: list[dict], headers: list[Mapping], arrivals: list[float | None]
    ) -> None:
        """Read and decode each request separately."""
        deadline = admission.Deadline.after(self.settings.max_decode_seconds, "Decoding")
        if len(data) < self.batch_size:
            arrivals = [None] * len(data)  # in a batch that is not full, no request waits for a late one
        for slot, row, own_headers, arrival in zip(slots, data, headers, arrivals, strict=True):
            self.isolate(slot, self.open_slot, row, own_headers, deadline, arrival)

    def isolate(self, slot: Slot, stage: Callable[..., None], *arguments: object) -> None:
        """Run a stage of one request. If it fails, only this request fails."""
        try:
            stage(slot, *arguments)
        except MemoryError:
            raise
        except ServingError as error:
            slot.error = error
        except Exception as exc:
            if device.is_broken(exc):
                raise
            if device.is_out_of_memory(exc):
                slot.error = input_too_large()
                return
            logger.exception("a bug failed one request of %s%s", self.context.model_name, self.tracing.named([slot]))
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
            raise explanation_unsupported()  # before anything is decoded
        deadline.check()
        request = self.read(row, headers)
        slot.options, slot.many, slot.respond = request.options, request.many, request.respond
        slot.key = self.cache.key(request.inputs, request.options, verb)
        if cached := self.cache.get(slot.key):
            slot.finish(cached)
            return
        samples = []  # the slot's only if all are decoded: part of an answer must be neither computed nor cached
        for each in request.inputs:
            deadline.check()
            samples.append(each.sample() if isinstance(each, open_inference.Prepared) else self.decode(each))
            if slot.explained:
                samples[-1].inputs = each
        slot.samples = samples

    def run(self, samples: list[Sample]) -> list[Outputs | ServingError]:
        """Run one batch. If it fails, run its halves, so that only the samples at fault are lost.

        After `max_inference_seconds` the samples are not run: they are `Overloaded`.

        Raises:
            Exception: the device is broken.
        """
        try:
            self.inference_deadline.check()
        except Overloaded as late:
            return [late] * len(samples)
        try:
            with torch.inference_mode():
                batch = map(self.staging.to_device, self.collate(samples))
                reduced = self.reduce(self.model(*batch))
                check_rows(reduced, len(samples), f"{type(self).__name__}.reduce")
                return [reduced]
        except Exception as exc:
            if device.is_broken(exc) or isinstance(exc, MemoryError):
                raise
            exhausted = device.is_out_of_memory(exc)
            if exhausted:
                logger.warning("%d inputs of %s do not fit: %s", len(samples), self.context.model_name, exc)
            elif len(samples) == 1:
                name = self.context.model_name + self.tracing.named_of(samples)
                logger.exception("a bug failed one input of %s", name)
        # outside the `except` block: the exception refers to the frames, and they refer to the tensors
        if exhausted:
            torch.cuda.empty_cache()
        if len(samples) == 1:
            return [input_too_large() if exhausted else internal_error("this input")]
        middle = len(samples) // 2
        return self.run(samples[:middle]) + self.run(samples[middle:])

    def scatter(self, slots: list[Slot], predictions: list[object]) -> None:
        """Encode each slot's share of the predictions.

        Raises:
            RuntimeError: the number of predictions differs from the number of samples.
        """
        expected = sum(len(slot.samples) for slot in slots)
        if len(predictions) != expected:
            raise RuntimeError(f"{type(self).__name__}.predict returned {len(predictions)} rows for {expected} samples")
        remaining = iter(predictions)
        for slot in slots:
            self.isolate(slot, self.encode_slot, [next(remaining) for _ in slot.samples])

    def encode_slot(self, slot: Slot, rows: list[object]) -> None:
        for row in rows:
            if isinstance(row, ServingError):
                raise row
        answers = [self.encode(row, s.info, slot.options) for row, s in zip(rows, slot.samples, strict=True)]
        slot.finish(answers)
        self.metrics.count_predictions(answers)
        self.cache.put(slot.key, answers)

    def explain_slot(self, slot: Slot) -> None:
        explanations = []
        for sample in slot.samples:
            self.explain_deadline.check()
            explanations.append(self.explain(sample, slot.options))
        slot.finish(explanations)
        self.cache.put(slot.key, explanations)

    def postprocess(self, slots: list[Slot]) -> list[str | bytes]:
        """Set each request's status and content type, and return the bodies."""
        bodies = []
        for index, slot in enumerate(slots):
            response, error = slot.sent(self.settings.max_answer_bytes), slot.error
            self.context.set_response_content_type(index, response.content_type)
            if response.json_size is not None:
                self.context.set_response_header(index, open_inference.JSON_SIZE, str(response.json_size))
            bodies.append(response.body)
            if isinstance(error, NonFiniteOutput):
                name = self.context.model_name + self.tracing.named([slot])
                logger.error("%s returned a number that is not finite", name)
            if error is not None:
                self.context.set_response_status(error.code, type(error).__name__, index)
        self.metrics.count_answers([slot.error for slot in slots])
        return bodies
