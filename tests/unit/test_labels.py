"""The kinds of file in which people keep the labels of classes."""

import json
from pathlib import Path

import pytest

from bundle.errors import BundleError
from bundle.labels import read_labels

PETS = ["cat", "dog", "bird"]


def written(folder: Path, name: str, content: str | bytes | object) -> Path:
    file = folder / name
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.json", PETS),
        ("l.json", {"0": "cat", "1": "dog", "2": "bird"}),
        ("l.json", {"2": "bird", "0": "cat", "1": "dog"}),
        ("l.json", {"cat": 0, "bird": 2, "dog": 1}),
        ("l.json", {"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "bird"]}),
        ("config.json", {"id2label": {"0": "cat", "1": "dog", "2": "bird"}, "label2id": {"cat": 0}, "hidden_size": 8}),
        ("l.json", {"object_type_names": PETS}),
        ("l.json", b'\xef\xbb\xbf{"0":"cat","1":"dog","2":"bird"}'),
        ("l.json", json.dumps(PETS).encode("utf-16")),
        ("l.json", json.dumps(PETS).encode("utf-16-le")),
        ("l.json", json.dumps(PETS).encode("utf-32")),
        ("l.txt", "{0: 'cat',\n 1: 'dog',\n 2: 'bird'}"),
        ("l.json", '["cat", "dog", "bird",]'),
        ("l.txt", "cat\ndog\nbird\n"),
        ("l.txt", "cat\r\ndog\r\nbird\r\n\r\n"),
        ("classes.names", "\ufeffcat\ndog\nbird"),
        ("l.txt", "cat\ndog\nbird".encode("utf-16")),
        ("l.txt", "0  cat\n1\tdog\n2= bird\n"),
        ("l.txt", "0: cat\n1: dog\n2: bird\n"),
        ("l.csv", "cat\ndog\nbird"),
        ("l.csv", "label\ncat\ndog\nbird"),
        ("l.csv", "index,label\n0,cat\n2,bird\n1,dog\n"),
        ("l.csv", "cat;0\ndog;1\nbird;2\n"),
        ("l.tsv", "0\tcat\n1\tdog\n2\tbird\n"),
        ("data.yaml", "nc: 3\nnames: [cat, dog, bird]\n"),
        ("data.yml", "path: x\nnames:\n  0: cat\n  1: dog\n  2: bird\n"),
    ],
)
def test_labels_of_a_usual_file_are_read(tmp_path: Path, name: str, content):
    assert read_labels(written(tmp_path, name, content)) == PETS


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("l.json", [0, 1, 2], ["0", "1", "2"]),
        ("l.json", {"0": 0, "1": 1}, ["0", "1"]),
        ("l.json", {"0": 5, "1": 7}, ["5", "7"]),
        ("l.json", ["größe", "残高"], ["größe", "残高"]),
        ("l.txt", "7 up\n8 up", ["7 up", "8 up"]),  # no indices: they do not count from 0
        ("l.txt", "0 people\n1 person\n2 people", ["0 people", "1 person", "2 people"]),  # one blank is no separator
        ("l.txt", "tench, Tinca tinca\ngoldfish", ["tench, Tinca tinca", "goldfish"]),
        ("l.csv", '"crane, bird",0\n"crane, machine",1', ["crane, bird", "crane, machine"]),
        ("l.json", ["crane", "crane"], ["crane", "crane"]),  # ImageNet has two
    ],
)
def test_labels_are_kept_as_they_are_written(tmp_path: Path, name: str, content, labels: list[str]):
    assert read_labels(written(tmp_path, name, content)) == labels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.json", {"1": "cat", "2": "dog"}, 'counts the classes from 1. Begin with "0"'),
        ("l.json", {"0": "cat", "2": "dog"}, 'must have the keys "0" to "1", or as values the numbers 0 to 1'),
        ("l.json", {"cat": 0, "dog": 0}, 'must have the keys "0" to "1", or as values'),
        ("l.json", {"0": 1, "1": 0}, "numbers as keys and as values"),
        ("l.json", '{"0": "cat", "0": "dog"}', 'has the key "0" twice'),
        ("l.json", "[]", "must be a list of labels"),
        ("l.json", "{}", "must have the keys|must be a list"),
        ("l.json", '"cat"', "must be a list of labels"),
        ("l.json", "cat, dog", "is not valid JSON"),
        ("l.json", '["cat", "dog"', "is not valid JSON"),
        ("l.json", ["cat", None], "the label of class 1 is null. A label must be a string"),
        ("l.json", ["cat", " "], "the label of class 1 is"),
        ("l.txt", "cat\n\ndog", "the label of class 1 is"),
        ("l.txt", "", "must be a list of labels"),
        ("l.txt", "größe".encode("latin-1"), r"is not UTF-8 \(byte 2\). Save it in UTF-8"),
        ("l.csv", "cat,1\ndog,2", "neither has the class indices 0 to 1"),
        ("l.csv", "0,cat\n0,dog", "neither has the class indices 0 to 1"),
        ("l.csv", "a,b,c\nd,e,f", "must have one column"),
        ("l.yaml", "names: [", "is not valid YAML"),
    ],
)
def test_labels_that_cannot_be_told_are_rejected_with_the_cause(tmp_path: Path, name: str, content, message: str):
    with pytest.raises(BundleError, match=message):
        read_labels(written(tmp_path, name, content))
