"""Metrics of predictions on a real TorchServe: what the workers print arrives on /metrics."""

from collections import Counter

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from bundle.catalog import select
from bundle.samples import headers
from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.support import wait_for

FOLDERS = select(list(SHIPPED))


def exposed(place: Place, metric: str) -> dict[tuple[str, str], float]:
    """Return the samples of a metric, by model and last dimension. Other tests register further models."""
    text = requests.get(f"{place.url('metrics_address')}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    dimension = "Class" if "predictions" in metric else "Confidence"
    named = [s for s in samples if s.name == metric and s.labels["ModelName"] in SHIPPED]
    return {(s.labels["ModelName"], s.labels[dimension]): s.value for s in named}


def by_model(samples: dict[tuple[str, str], float]) -> Counter[str]:
    total: Counter[str] = Counter()
    for (model, _), value in samples.items():
        total[model] += value
    return total


def test_metrics_count_predictions_and_have_the_reference(served: Place):
    wait_for(lambda: set(by_model(exposed(served, "bundle_confidence_reference"))) == set(SHIPPED))
    before = {name: exposed(served, f"bundle_{name}_total") for name in ("predictions", "confidence")}
    for folder in FOLDERS:
        for _ in range(7):
            content = folder.sample_file.read_bytes()
            answer = served.client.predict(folder.name, content, headers=headers(folder.sample_file))
            assert answer.status_code == 200
    # other tests may have left predictions that are not printed yet
    for name, samples in before.items():
        least = {model: count + 7 for model, count in by_model(samples).items()}
        wait_for(lambda name=name, least=least: by_model(exposed(served, f"bundle_{name}_total")) >= Counter(least))
    reference = exposed(served, "bundle_predictions_reference")
    assert exposed(served, "bundle_predictions_total").keys() == reference.keys()
    for folder in FOLDERS:
        assert by_model(reference)[folder.name] == pytest.approx(1, abs=1e-4)
        own = {label for model, label in reference if model == folder.name}
        sample = folder.name, folder.bundle.expect if folder.bundle.expect in own else "other"
        least = before["predictions"][sample] + 7
        wait_for(lambda sample=sample, least=least: exposed(served, "bundle_predictions_total")[sample] >= least)
        assert len(own) == min(len(folder.labels()), 33)
