"""Read the labels of a model's classes, from the kinds of file in which people keep them."""

import ast
import csv
import json
import re
from collections import Counter
from pathlib import Path

import yaml

from bundle.errors import BundleError
from bundle.paths import relative

# keys under which the labels are: in config.json of transformers, data.yaml of YOLO, and files of TorchServe
KEEPERS = ("id2label", "names", "object_type_names")
HEADINGS = {"label", "labels", "name", "names", "class", "classes", "class_name"}  # of a CSV file with one column
# A line with a class index and its label. One blank does not separate them: "2 people" is a label.
INDEXED = re.compile(r"(\d+)(?:\s*[:,;=\t]\s*| {2,})(\S.*)")
ACCEPTED = 'a list of labels, {"0": label, ...}, {label: 0, ...}, or a text file with one label in each line'


def read_labels(file: Path) -> list[str]:
    """Return the labels of a file, by class index.

    Args:
        file: JSON, YAML or Python with a list of labels, labels by index or indices by label; CSV; or a text file with
            a label in each line. A label is a string, a number, or [id, name] as for ImageNet.

    Raises:
        BundleError: the file has something else.
    """
    text = decoded(file)
    labels = parsed(file, text)
    if isinstance(labels, dict):
        keeper = next((key for key in KEEPERS if isinstance(labels.get(key), list | dict)), None)
        labels = labels[keeper] if keeper else labels
    if isinstance(labels, dict):
        labels = by_index(file, labels)
    if not isinstance(labels, list) or not labels:
        raise BundleError(f"{relative(file)} must be {ACCEPTED}.")
    names = [label[-1] if isinstance(label, list | tuple) and label else label for label in labels]
    names = [str(name) if is_index(name) else name for name in names]
    if wrong := [index for index, name in enumerate(names) if not isinstance(name, str) or not name.strip()]:
        shown = json.dumps(names[wrong[0]], default=str)[:40]
        raise BundleError(
            f"{relative(file)}: the label of class {wrong[0]} is {shown}. A label must be a string, and not empty."
        )
    return names


def decoded(file: Path) -> str:
    """Return the content of a file in UTF-8, or in UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        BundleError: it has another encoding.
    """
    content = file.read_bytes()
    try:
        return content.decode(json.detect_encoding(content)).removeprefix("\ufeff").strip()
    except UnicodeDecodeError as exc:
        raise BundleError(f"{relative(file)} is not UTF-8 (byte {exc.start}). Save it in UTF-8.") from exc


def parsed(file: Path, text: str) -> object:
    """Return a file's content: of JSON, YAML, a Python list or dict, or else the labels of its lines.

    Raises:
        BundleError: it is none of these.
    """
    if text.startswith(("{", "[")):
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: unique(file, pairs))
        except ValueError as exc:
            try:
                return ast.literal_eval(text)  # as in ImageNet's best-known list of labels: keys without quotes
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise BundleError(f"{relative(file)} is not valid JSON: {exc}") from exc
    if file.suffix.lower() in (".yaml", ".yml"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as exc:
            raise BundleError(f"{relative(file)} is not valid YAML: {exc}") from exc
    if file.suffix.lower() == ".json":
        raise BundleError(f"{relative(file)} is not valid JSON: it must be {ACCEPTED}.")
    return of_lines(file, text)


def unique(file: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs of a JSON object.

    Raises:
        BundleError: a key occurs twice: JSON's readers keep its last value, without a word.
    """
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise BundleError(f"{relative(file)} has the key {json.dumps(twice[0])} twice.")
    return dict(pairs)


def of_lines(file: Path, text: str) -> list[object]:
    """Return the labels of a text or CSV file: one in each line, perhaps with its class index, or below a heading."""
    lines = [line.strip() for line in text.splitlines()]
    if file.suffix.lower() in (".csv", ".tsv"):
        delimiter = next((each for each in "\t;," if lines and each in lines[0]), ",")
        table = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
        if len(table) > 1 and all(len(row) == 2 for row in table):
            for column in (0, 1):
                for rows in (table,) if any(map(str.isdigit, table[0])) else (table[1:],):  # below a heading
                    indices = {row[column]: row[1 - column] for row in rows}
                    if set(indices) == {str(index) for index in range(len(rows))}:
                        return [indices[str(index)] for index in range(len(rows))]
            raise BundleError(
                f"{relative(file)} has two columns, and neither has the class indices 0 to {len(table) - 1}, each once."
            )
        if any(len(row) != 1 for row in table):
            raise BundleError(f"{relative(file)} must have one column, the labels, or two, with the class indices.")
        return [row[0] for row in (table[1:] if table and table[0][0].lower() in HEADINGS else table)]
    indexed = [INDEXED.fullmatch(line) for line in lines]
    if all(match and match[1] == str(index) for index, match in enumerate(indexed)):
        return [match[2] for match in indexed if match]
    return list(lines)


def by_index(file: Path, labels: dict) -> list[object]:
    """Return the labels of an object: labels by index, or indices by label.

    Raises:
        BundleError: it is neither, or may be either.
    """
    size = len(labels)
    wanted = {str(index) for index in range(size)}
    named = {str(key): label for key, label in labels.items()}
    indices = {label: key for key, label in named.items() if is_index(label)}
    if len(indices) == size and set(indices) == set(range(size)):
        if set(named) == wanted and any(key != str(index) for index, key in indices.items()):
            raise BundleError(
                f"{relative(file)} has numbers as keys and as values: it does not show which are the class indices. "
                "Write a list of the labels, in the order of the classes."
            )
        return [indices[index] for index in range(size)]
    if set(named) != wanted:
        counted = set(named) == {str(index + 1) for index in range(size)}
        raise BundleError(
            f'{relative(file)} must have the keys "0" to "{size - 1}", or as values the numbers 0 to {size - 1}'
            + (': it counts the classes from 1. Begin with "0".' if counted else f"; or be {ACCEPTED}.")
        )
    return [named[str(index)] for index in range(size)]


def is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
