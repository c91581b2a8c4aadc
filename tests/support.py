"""Helpers of several test suites: changed archives, waiting, and batches."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from bundle import mar
from bundle.catalog import CONFIG_NAME
from bundle.paths import MODELS
from bundle.signing import UNSEALED, seal


def altered(archive: Path, target: Path, members: dict[str, bytes | None]) -> Path:
    """Write a copy of an archive with these members and new checksums; None removes a member."""
    mar.rewrite(archive, target, members | UNSEALED)
    seal(target, None)
    return target


def reversioned(archive: Path, version: str, target: Path, without: str = "") -> Path:
    """Write a copy with another version, without the member `without`."""
    manifest = json.loads(mar.read(archive, mar.MANIFEST))
    manifest["model"]["modelVersion"] = version
    return altered(archive, target, {mar.MANIFEST: json.dumps(manifest).encode(), without: None})


def models_expecting_four(models: Path) -> Path:
    """Make a models folder whose MNIST expects the answer 4, and return it. The model answers 3."""
    shutil.copytree(MODELS / "mnist", models / "mnist")
    config = models / "mnist" / CONFIG_NAME
    old = config.read_text()
    config.write_text(old.replace('expect: "3"', 'expect: "4"'))
    assert config.read_text() != old
    return models


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition was still false after {seconds:g} s"
        time.sleep(0.2)


def repeated(send: Callable[[], requests.Response]) -> requests.Response:
    """Send an explanation, and again if it is rejected because a busy machine exceeds the time of a batch."""
    for _ in range(5):
        answer = send()
        if answer.status_code != 429:
            break
    return answer


def batches(metrics: str, model: str, least: float = 0) -> tuple[float, float]:
    """How many batches a model has answered, and how many requests were in them, once these numbers stay the same.

    TorchServe reads what workers print in the background, so a request may be missing after its answer.

    Args:
        metrics: URL of the metrics API.
        least: the number of requests to wait for.
    """

    def read() -> tuple[float, float]:
        exposed = requests.get(f"{metrics}/metrics", timeout=30).text
        samples = [sample for family in text_string_to_metric_families(exposed) for sample in family.samples]

        def total(name: str) -> float:
            return sum(one.value for one in samples if one.name == name and one.labels["ModelName"] == model)

        return total("bundle_batch_size_count"), total("bundle_batch_size_sum")

    found: list[tuple[float, float]] = []

    def is_settled() -> bool:
        found.append(read())
        return found[-1][1] >= least and len(found) >= 3 and len(set(found[-3:])) == 1

    wait_for(is_settled)
    return found[-1]
