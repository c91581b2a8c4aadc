"""How a sample file is sent to a model."""

from pathlib import Path

import pytest

from bundle.samples import first, grpc_fields


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("sample.png", b"\x89PNG", {"body": b"\x89PNG"}),
        ("sample.json", b'{"data": {"rooms": 3}}', {"data": b'{"rooms": 3}'}),
        ("sample.json", b'{"data": "a text", "top_k": 2}', {"data": b"a text", "top_k": b"2"}),
        (
            "sample.json",
            b'{"image": "data:image/png;base64,iVBORw==", "text": "7"}',
            {"image": b"\x89PNG", "text": b"7"},
        ),
        ("sample.json", b'{"text": "data: none"}', {"text": b"data: none"}),
        ("sample.json", b"[1, 2]", {"body": b"[1, 2]"}),
    ],
)
def test_grpc_fields_of_a_file(tmp_path: Path, name: str, content: bytes, fields: dict[str, bytes]):
    (tmp_path / name).write_bytes(content)
    assert grpc_fields(tmp_path / name) == fields


def test_first_class_of_a_detector_is_that_of_its_best_detection():
    detections = [
        {"label": "WBC", "class": 1, "score": 0.9, "box": [1, 2, 3, 4]},
        {"label": "RBC", "class": 0, "score": 0.5},
    ]
    assert first({"detections": detections}) == ("WBC", 1, 0.9)
    assert first({"detections": []}) is None
