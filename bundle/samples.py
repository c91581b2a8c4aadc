"""Send a model's sample as a client, and read the classes in the answer.

This module needs the standard library only: the Docker image of the load test has it without the bundle's packages.
"""

import base64
import json
from pathlib import Path
from typing import NamedTuple


class Ranked(NamedTuple):
    """A class of an answer that ranks classes."""

    label: str
    class_index: int
    probability: float


def headers(file: Path) -> dict[str, str]:
    """Return the headers to send a file with: JSON needs its content type, other files need none."""
    return {"Content-Type": "application/json"} if file.suffix.lower() == ".json" else {}


def grpc_fields(file: Path) -> dict[str, bytes]:
    """Return the fields that carry a file over gRPC, where no header says that it is JSON.

    A JSON object is sent field by field. All else is the field "body", which is what a raw body becomes over HTTP: the
    model's input, whatever its name.

    Raises:
        ValueError: the file's name ends in .json and its content is not JSON, or a data: URL is not base64.
    """
    content = file.read_bytes()
    body = json.loads(content) if headers(file) else None
    return form_fields(body) if isinstance(body, dict) else {"body": content}


def form_fields(body: dict) -> dict[str, bytes]:
    """Return a JSON object as the fields of a form.

    A data: URL becomes the bytes that it encodes; other strings stay as they are; other values become JSON.

    Raises:
        ValueError: a data: URL is not base64.
    """
    return {name: form_value(value) for name, value in body.items()}


def form_value(value: object) -> bytes:
    if not isinstance(value, str):
        return json.dumps(value).encode()
    head, found, encoded = value.partition(";base64,")
    return base64.b64decode(encoded, validate=True) if found and head.startswith("data:") else value.encode()


def ranking(answer: object) -> list[Ranked]:
    """Return the classes of an answer, best first; [] if the answer is not a ranking.

    Args:
        answer: parsed JSON. MNIST's has "top_3_classes" and "top_3_probabilities", that of other classifiers "top_k". A
            detector's has "detections", whose scores are probabilities. A segmenter's has "classes", whose share of the
            pixels takes the place of a probability.
    """
    if not isinstance(answer, dict):
        return []
    try:
        if "top_3_classes" in answer:
            pairs = zip(answer["top_3_classes"], answer["top_3_probabilities"], strict=True)
            return [Ranked(str(index), int(index), float(probability)) for index, probability in pairs]
        if "classes" in answer:
            return [Ranked(str(e["label"]), int(e["class"]), float(e["share"])) for e in answer["classes"]]
        if "detections" in answer:
            return [Ranked(str(e["label"]), int(e["class"]), float(e["score"])) for e in answer["detections"]]
        return [Ranked(str(e["label"]), int(e["class"]), float(e["probability"])) for e in answer["top_k"]]
    except (LookupError, TypeError, ValueError):
        return []


def first(answer: object) -> Ranked | None:
    """Return the first class of an answer; None if the answer is not a ranking."""
    return next(iter(ranking(answer)), None)
