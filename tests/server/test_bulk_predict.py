"""`bundle predict` with many inputs, on a real TorchServe."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from bundle.paths import MODELS
from tests.server.place import Place

COPIES = 100


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with copies of the sample in two subfolders, a text, an empty file, and a file that is too large."""
    folder = tmp_path / "photos"
    for number in range(COPIES):
        file = folder / f"{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(MODELS / "image" / "sample.jpg", file)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "empty.jpg").touch()
    (folder / "large.jpg").write_bytes(bytes(17 * 2**20))
    return folder


def by_name(output: Path) -> dict[object, dict]:
    """Return the lines by file name, id or number."""
    found = {}
    for line in output.read_text().splitlines():
        (_, name), (kind, outcome) = json.loads(line).items()
        found[Path(name).name if isinstance(name, str) else name] = {kind: outcome}
    assert len(found) == len(output.read_text().splitlines())
    return found


def test_folder_is_answered_beside_its_bad_files_and_not_sent_again(served: Place, photos: Path, tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    arguments = ("predict", "image", str(photos), "--output", str(output), "--option", "top_k=1")
    ended = served.bundle(*arguments)
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    assert f"{COPIES} answered, 3 failed; {COPIES + 3} in " in ended.stderr
    found = by_name(output)
    errors = {name: line["error"] for name, line in found.items() if "error" in line}
    assert {name: error["status"] for name, error in errors.items()} == {
        "notes.txt": 400,
        "empty.jpg": 400,
        "large.jpg": 413,
    }
    assert {name: error["type"] for name, error in errors.items()} == {
        "notes.txt": "UndecodableImage",
        "empty.jpg": "EmptyInput",
        "large.jpg": "BodyTooLarge",
    }
    assert errors["notes.txt"]["message"].startswith("The input is not an image in a supported format")
    ranked = [line["answer"]["top_k"] for line in found.values() if "answer" in line]
    assert Counter((len(classes), classes[0]["label"]) for classes in ranked) == {(1, "airplane"): COPIES}
    before = output.read_bytes()
    again = served.bundle(*arguments, "--resume")
    assert again.returncode == 1
    assert f"{COPIES} answered, 3 failed, {COPIES + 3} of them before; nothing was left to send" in again.stderr
    assert output.read_bytes() == before


def test_texts_and_json_requests_are_answered_line_by_line(served: Place, tmp_path: Path):
    texts, requests = tmp_path / "texts.txt", tmp_path / "requests.jsonl"
    texts.write_text("where is my luggage\n\ntell me a joke\n")
    requests.write_text(
        '{"id": "a", "data": "where is my luggage"}\n{"data": 7}\n{"instances": ["tell me a joke"], "top_k": 1}\n'
    )
    assert served.bundle("predict", "text", str(texts), "--lines", "-o", str(tmp_path / "1")).returncode == 0
    first = {name: line["answer"]["top_k"][0]["label"] for name, line in by_name(tmp_path / "1").items()}
    assert first == {1: "lost_luggage", 3: "tell_joke"}
    assert served.bundle("predict", "text", str(requests), "--jsonl", "-o", str(tmp_path / "2")).returncode == 1
    found = by_name(tmp_path / "2")
    assert found["a"]["answer"]["top_k"][0]["label"] == "lost_luggage"
    assert found[2]["error"]["status"] == 400
    [answer] = found[3]["answer"]["predictions"]
    assert [each["label"] for each in answer["top_k"]] == ["tell_joke"]


def rejections(place: Place) -> float:
    """Return how many requests the handlers have answered with 429."""
    exposed = requests.get(f"{place.url('metrics_address')}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(exposed) for sample in family.samples]
    return sum(
        each.value for each in samples if each.name == "bundle_requests_total" and each.labels["Status"] == "429"
    )


def test_explanations_of_many_inputs_are_not_rejected(served: Place, tmp_path: Path):
    for number in range(64):  # in two batches at the same time, they would take longer than max_explain_seconds
        shutil.copy(MODELS / "audio" / "sample.wav", tmp_path / f"{number}.wav")
    before, output = rejections(served), tmp_path / "answers.jsonl"
    ended = served.bundle("predict", "audio", str(tmp_path), "--output", str(output), "--explain")
    assert ended.returncode == 0, ended.stderr
    assert {line["answer"]["target"]["label"] for line in by_name(output).values()} == {"yes"}
    assert rejections(served) == before
