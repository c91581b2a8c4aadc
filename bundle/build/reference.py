"""Record what a model predicts for known inputs: the reference with which the predictions of a server are compared."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bundle import samples
from bundle.build.dryrun import DryRun
from bundle.build.model_api import QUICK
from bundle.catalog import ModelFolder
from bundle.digests import digest
from bundle.errors import BundleError
from bundle.paths import relative
from handlers.core.labelled import LabelledHandler
from handlers.core.predictions import INTERVALS, Reference, interval

BATCH = 16  # requests
# Examples for each class that has a counter. With fewer, chance alone makes an index (PSI) above 0.1, on average
EXAMPLES_PER_CLASS = 10


class Example(NamedTuple):
    """A request, as TorchServe passes it on, with its name in messages."""

    name: str
    row: dict
    headers: dict[str, str]


def from_file(file: Path) -> Example:
    """Return a file as an example. It is sent as a sample is.

    Raises:
        BundleError: its name ends in .json, and it is not JSON.
    """
    headers, content = samples.headers(file), file.read_bytes()
    try:
        return Example(str(relative(file)), {"body": json.loads(content) if headers else content}, headers)
    except ValueError as exc:
        raise BundleError(f"{relative(file)} is not valid JSON: {exc}") from exc


def weights(folder: ModelFolder) -> str | None:
    """Return the digest of the folder's weights, as in `Reference.weights`; None if the folder has no such file."""
    file = folder.weights_file
    return digest(file.read_bytes()) if file and file.is_file() else None


def record(archive: Path, examples: Sequence[Example], source: str, weights: str | None = None) -> Reference:
    """Record what an archive's model predicts, in float32.

    Args:
        archive: a .mar file.
        examples: typical requests, with one input each.
        source: what they are, for the people who read the file.
        weights: their digest.

    Raises:
        BundleError: the handler counts no predictions, an example is rejected, or there are too few.
    """
    with DryRun(archive, settings=QUICK) as worker:
        handler: Any = worker.handler
        if getattr(getattr(handler, "metrics", None), "predictions", None) is None:
            raise BundleError(
                f"{archive.stem} has no metrics of its predictions: `counted_classes` is 0, or its handler does not "
                "define `first` (see handlers/README.md)."
            )
        outcomes = handler.outcomes()
        needed = EXAMPLES_PER_CLASS * min(len(outcomes), handler.settings.counted_classes)
        if len(examples) < needed:
            raise BundleError(f"A reference of {archive.stem} needs {needed} examples; there are {len(examples)}.")
        firsts = []
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            answers = worker.predict([each.row for each in batch], [each.headers for each in batch])
            for example, (status, body) in zip(batch, answers, strict=True):
                if status != 200:
                    raise BundleError(
                        f"{archive.stem} rejects {example.name}. Remove or replace it. The answer: {body}"
                    )
                outcome, confidence = handler.first(body)
                firsts.append((outcomes[outcome], confidence))
    return summary(firsts, source, weights)


def summary(firsts: Sequence[tuple[str, float | None]], source: str, weights: str | None) -> Reference:
    """Summarise the first outcome of each example, and its confidence."""
    confidences = [INTERVALS[interval(confidence)] for _, confidence in firsts if confidence is not None]
    classes = shares(label for label, _ in firsts)
    confidence = dict(sorted(shares(confidences).items()))
    return Reference(source=source, examples=len(firsts), weights=weights, classes=classes, confidence=confidence)


def shares(values: Iterable[str]) -> dict[str, float]:
    """Return the share of each value, the most frequent first."""
    counts = Counter(values)
    frequent = sorted(counts, key=lambda value: (-counts[value], value))
    return {value: round(counts[value] / counts.total(), 6) for value in frequent}


def text(reference: Reference) -> str:
    """Return the content of a reference.json."""
    return json.dumps(reference.model_dump(exclude_none=True), indent=1, ensure_ascii=False) + "\n"


def outdated(folder: ModelFolder, reference: Reference) -> list[str]:
    """Return a note if a folder's reference is of other weights than the folder has."""
    if reference.weights in (None, weights(folder)):
        return []
    return [
        "its reference.json was recorded with other weights, so that the metrics of drift compare with another model. "
        "Record it again: models/README.md, References"
    ]


def check(file: Path, handler: LabelledHandler, labels: list[str]) -> Reference:
    """Check the reference.json of a model folder, and return its content.

    Args:
        file: to check.
        handler: of the folder, not initialized.
        labels: of the classes.

    Raises:
        BundleError: the file is invalid, or has a class that the model does not have.
    """
    try:
        reference = Reference.model_validate_json(file.read_bytes())
    except ValueError as exc:
        raise BundleError(f"{relative(file)} is invalid. Record it again: bundle reference. {exc}") from exc
    handler.labels = labels
    if unknown := sorted(reference.classes.keys() - set(handler.outcomes())):
        raise BundleError(
            f"{relative(file)} has the class {unknown[0]!r}, which is not a label. Record it again: bundle reference."
        )
    return reference
