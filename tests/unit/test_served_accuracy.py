"""The accuracy in metrics.json, measured again through the archives: the handlers decode files as clients send them.

A test is skipped if its data set is not in DATA_DIR.
"""

import json
from pathlib import Path

import pytest

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import select
from bundle.samples import first
from tests.held_out import held_out
from tests.shipped import DATA_DIR, SHIPPED, skip_without_data_set

INPUTS = 1000
TOLERANCE = 0.025  # of an accuracy on INPUTS inputs, which are files instead of tensors


@pytest.mark.slow
@pytest.mark.parametrize("model", SHIPPED)
def test_served_accuracy_is_close_to_the_recorded_one(model: str, tmp_path: Path):
    skip_without_data_set(model)
    contents, labels = held_out(model, DATA_DIR, INPUTS)
    [folder] = select([model])
    correct = 0
    with DryRun(archive(folder, store=tmp_path).path) as dry_run:
        for start in range(0, len(contents), 32):
            answers = dry_run.predict([{"body": content} for content in contents[start : start + 32]])
            for (status, body), label in zip(answers, labels[start : start + 32], strict=True):
                assert status == 200, body
                correct += first(body).label == label
    metrics = json.loads((folder.path / "metrics.json").read_text())
    trained = metrics["as_served"]["in_scope_accuracy"] if model == "text" else metrics["accuracy"]
    assert abs(correct / len(contents) - trained) < TOLERANCE
