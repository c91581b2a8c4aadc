"""The template that every handler of the bundle fills in: a batch of requests in, one answer a request out.

A request's way: bytes -> `read` -> `decode` (one input, one small tensor) -> `collate` (one batch) -> one copy to the
device -> the model -> `reduce` on the device -> one copy back -> `encode` (one output, one JSON value) -> its slot.

A request that cannot be served takes its own slot out of the batch, with its own 4xx; its neighbours go on without
it. Any other exception is a bug: its traceback is logged, and the whole batch is answered 500. TorchServe's own answer
to it, 503, would read as "no room, come again". After a fault of the accelerator itself the worker ends, and TorchServe
starts another one.
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handlers.core import device, memory, payload, precision, settings, topk, wire
from handlers.core.cache import AnswerCache
from handlers.core.errors import (
    InsufficientMemory,
    InternalError,
    InvalidOption,
    NonFiniteOutput,
    Overloaded,
    RequestError,
    ServingError,
    UnsupportedOperation,
)
from handlers.core.headers import Verb, behind_proxy, proxy_arrival, requested_verb
from handlers.core.metrics import HandlerMetrics

logger = logging.getLogger(__name__)

Sample = Tensor | tuple[Tensor, ...]

LARGEST_TRIAL = 8  # inputs on which precisions are compared,
TRIAL_SECONDS = 0.5  # or as many as take so long
WARM_UP_SECONDS = 2.0


@dataclass
class Slot:
    """One request of a batch, on its way through the stages.

    Attributes:
        samples: its decoded inputs.
        many: whether it is answered as {"predictions": [...]}.
        top_k: how many classes it is answered.
        answer: the JSON value it is answered, once there is one.
        error: why it is answered an error instead.
        key: of its answer in the cache, where one is kept.
    """

    samples: list[Sample] = field(default_factory=list)
    many: bool = False
    top_k: int = 1
    answer: dict | None = None
    error: ServingError | None = None
    key: bytes | None = None


class BatchHandler(BaseHandler):
    """Serves a TorchScript classifier. A subclass fills in `decode` and `example`, and whatever else differs."""

    Settings = settings.Settings

    # --- what a subclass fills in ------------------------------------------------------------------------------

    def load_assets(self, folder: Path) -> None:
        """Loads what the archive carries beside model and labels (a tokenizer, say) from the unpacked `folder`."""

    def decode(self, content: payload.Content) -> Sample:
        """One input, as it was sent, -> one sample on the CPU.

        Raises:
            RequestError: the input cannot be decoded; it is answered to this request alone.
        """
        raise NotImplementedError

    def example(self) -> Sample:
        """A sample of typical shape, to warm the model up with."""
        raise NotImplementedError

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Samples -> the model's inputs, the batch as first dimension. By default, samples of one shape are stacked."""
        columns = zip(*(s if isinstance(s, tuple) else (s,) for s in samples), strict=True)
        return tuple(torch.stack(column) for column in columns)

    def reduce(self, outputs: Tensor, k: int) -> Tensor:
        """The model's outputs -> what is copied to the host, on the device, a row an input. By default, the k best."""
        return topk.rank(outputs, k, self.settings.outputs)

    def encode(self, row: Tensor, top_k: int) -> dict:
        """One row of `reduce`, on the host -> the JSON value of its answer."""
        return {"top_k": topk.ranking(row[:top_k], self.mapping)}

    # --- the stages of BaseHandler, once for all -----------------------------------------------------------------

    def initialize(self, context: Context) -> None:
        """Loads the model onto the worker's device, and runs it at the batch sizes that it will see.

        Raises:
            pydantic.ValidationError: the `handler:` section of model-config.yaml is wrong.
            FileNotFoundError: the archive has no index_to_name.json.
        """
        self.settings = self.Settings.model_validate((context.model_yaml_config or {}).get("handler") or {})
        self.behind_proxy = behind_proxy()
        torch.set_num_threads(self.settings.threads)
        memory.keep_freed_memory()
        super().initialize(context)
        if self.mapping is None:
            raise FileNotFoundError("the archive has no index_to_name.json: a classifier needs its labels")
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
        """Puts the fastest equivalent in the model's place."""
        for _ in range(3):  # TorchScript profiles the first run, and optimises in the second
            start = time.perf_counter()
            self.model(*self.trial(1))
        affordable = int(TRIAL_SECONDS / (time.perf_counter() - start))
        inputs = self.trial(max(1, min(self.batch_size, LARGEST_TRIAL, affordable)))
        folder = Path(self.context.system_properties["model_dir"])
        wanted = self.settings.precision
        self.precision, self.model = precision.fastest(self.model, wanted, self.device, inputs, folder)
        logger.info("%s computes in %s", self.context.model_name, self.precision)

    def trial(self, size: int) -> tuple[Tensor, ...]:
        return tuple(map(self.to_device, self.collate([self.example()] * size)))

    def warm_up(self) -> None:
        """TorchScript and oneDNN specialise in the first runs of a batch size: they happen here, not in a request, for
        the sizes that there is time for."""
        deadline = time.monotonic() + WARM_UP_SECONDS
        for size in dict.fromkeys([1, self.batch_size, *range(2, self.batch_size)]):
            for _ in range(3):
                self.inference([self.example()] * size, top_k=1)
                if time.monotonic() > deadline:
                    return

    def handle(self, data: list[dict], context: Context) -> list[str]:
        """One entry of `data` a request -> one JSON text a request, in the same order."""
        self.context = context
        arrival = self.first_arrival(len(data))
        if arrival is not None:
            self.metrics.observe("queue", time.time() - arrival)
        self.metrics.count_batch(len(data))
        try:
            answers = self.serve(data)
        except MemoryError:
            raise  # TorchServe has a status for it: 507
        except Exception as exc:
            if device.is_broken(exc):
                logger.exception("the device failed under %s: this worker ends", self.context.model_name)
                raise SystemExit(1) from exc
            logger.exception("a bug failed a batch of %s", self.context.model_name)
            error = InternalError("The handler failed on this batch of requests. The server's log has the traceback.")
            answers = self.postprocess([Slot(error=error) for _ in data], [])
        if arrival is not None:
            self.metrics.observe("request", time.time() - arrival)
        self.metrics.emit()
        memory.trim()
        return answers

    def first_arrival(self, requests: int) -> float | None:
        """When the first of the batch's requests reached the proxy (s since the epoch), if it came through one."""
        if not self.behind_proxy:
            return None
        headers = map(self.context.get_all_request_header, range(requests))
        return min(filter(None, map(proxy_arrival, headers)), default=None)

    def serve(self, data: list[dict]) -> list[str]:
        """The stages, each timed."""
        with self.metrics.timed("decode"):
            slots = self.preprocess(data)
        samples = [sample for slot in slots for sample in slot.samples]
        rows: list[Tensor | None] = []
        if samples:
            with self.metrics.timed("inference"):
                rows = self.inference(samples, max(slot.top_k for slot in slots))
        with self.metrics.timed("encode"):
            return self.postprocess(slots, rows)

    def preprocess(self, data: list[dict]) -> list[Slot]:
        """Decodes each request by itself."""
        self.decode_until = time.monotonic() + self.settings.max_decode_seconds
        slots = []
        crowded = self.behind_proxy and len(data) >= self.batch_size
        for index, row in enumerate(data):
            headers = self.context.get_all_request_header(index)
            try:
                if crowded:
                    self.check_wait(proxy_arrival(headers))
                slots.append(self.open_slot(row, headers))
            except (RequestError, Overloaded) as error:
                slots.append(Slot(error=error))
        return slots

    def open_slot(self, row: dict, headers: dict) -> Slot:
        # TorchServe mixes predictions and explanations in one batch
        verb = requested_verb(row, headers)
        if verb is Verb.DESCRIBE:
            return Slot(answer=self.describe())
        if verb is Verb.EXPLAIN:
            raise UnsupportedOperation("This model gives no explanations. Use /predictions.")
        request = payload.read(row, headers, self.settings.max_instances)
        top_k = self.check_top_k(request.top_k)
        key = self.cache.key(request.contents, request.many, top_k)
        if known := self.cache.get(key):
            return Slot(answer=known)
        return Slot([self.decode_in_time(content) for content in request.contents], request.many, top_k, key=key)

    def decode_in_time(self, content: payload.Content) -> Sample:
        """Limits bound what one input takes to decode; this bounds the batch, which may hold hundreds at the limit.

        Raises:
            Overloaded: the batch has used up its time.
        """
        if time.monotonic() > self.decode_until:
            raise Overloaded("The inputs that came with this one took too long to decode. Send it again, or fewer.")
        return self.decode(content)

    def check_wait(self, arrival: float | None) -> None:
        """In a full batch, behind which others wait: work on what is late already delays them, until all are late.

        Args:
            arrival: when the request reached the proxy (s since the epoch), if it came through one.

        Raises:
            Overloaded: it has waited longer than `max_wait_seconds`.
        """
        longest = self.settings.max_wait_seconds
        if longest is not None and arrival is not None and time.time() - arrival > longest:
            raise Overloaded(
                f"More requests arrive than this model can answer: this one has waited {longest:g} s and was not "
                "begun. Send it again after the seconds in Retry-After."
            )

    def check_top_k(self, asked: int | None) -> int:
        """How many classes to answer.

        Raises:
            InvalidOption: more than the model has.
        """
        if asked is not None and asked > len(self.mapping):
            raise InvalidOption(f"top_k must be between 1 and {len(self.mapping)}, the number of classes.")
        return asked or min(self.settings.top_k, len(self.mapping))

    @torch.inference_mode()
    def inference(self, samples: list[Sample], top_k: int) -> list[Tensor | None]:
        """Runs the samples in batches of at most the configured size, and returns `reduce`'s rows on the host; None for
        a sample that does not fit the device's memory even by itself."""
        reduced = []
        for start in range(0, len(samples), self.batch_size):
            reduced += self.run(samples[start : start + self.batch_size], top_k)
        return [row for rows in reduced for row in ([None] if rows is None else rows.cpu().unbind())]

    def run(self, samples: list[Sample], top_k: int) -> list[Tensor | None]:
        """One batch -> `reduce`'s rows on the device; of a batch that does not fit its memory, those of its halves."""
        try:
            outputs = self.model(*map(self.to_device, self.collate(samples)))
            return [self.reduce(precision.main_output(outputs), top_k)]
        except RuntimeError as exc:
            if not device.is_out_of_memory(exc):
                raise
            logger.warning("%d inputs of %s do not fit: %s", len(samples), self.context.model_name, exc)
        # out of the `except`: the exception holds the frames, and they hold the tensors
        torch.cuda.empty_cache()
        if len(samples) == 1:
            return [None]
        middle = len(samples) // 2
        return self.run(samples[:middle], top_k) + self.run(samples[middle:], top_k)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Without waiting for the copy, where there is one: only pinned memory is copied while the CPU goes on."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def postprocess(self, slots: list[Slot], rows: list[Tensor | None]) -> list[str]:
        """Scatters the rows into the slots they came from, and sets each slot's status and content type.

        Answers leave here as text: TorchServe would indent them, which is longer and takes Python's slow encoder.
        """
        answers, statuses, rejections = [], [], []
        remaining = iter(rows)
        for index, slot in enumerate(slots):
            slot_rows = [next(remaining) for _ in slot.samples]
            if any(row is None for row in slot_rows):
                slot.error = InsufficientMemory("The device has not enough memory for this input. Send a smaller one.")
            elif slot_rows:
                try:
                    predictions = [self.encode(row, slot.top_k) for row in slot_rows]
                    slot.answer = {"predictions": predictions} if slot.many else predictions[0]
                    self.cache.put(slot.key, slot.answer)
                except NonFiniteOutput as error:
                    logger.error("%s answered a number that is not finite", self.context.model_name)
                    slot.error = error
            self.context.set_response_content_type(index, "application/json")
            if slot.error is not None:
                if isinstance(slot.error, RequestError):
                    rejections.append(type(slot.error).__name__)
                statuses.append(slot.error.code)
                self.context.set_response_status(slot.error.code, type(slot.error).__name__, index)
                answers.append(json.dumps(slot.error.body()))
            else:
                statuses.append(200)
                answers.append(json.dumps(slot.answer))
        self.metrics.count_answers(statuses, rejections)
        return answers

    def describe(self) -> dict:
        """What `GET /models/NAME/VERSION?customized=true` shows."""
        return {
            "handler": type(self).__name__,
            "precision": self.precision,
            "settings": self.settings.model_dump(),
            "labels": self.mapping,
        }
