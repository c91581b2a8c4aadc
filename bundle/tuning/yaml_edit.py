"""Change values in a model-config.yaml, and nothing else in its text.

PyYAML knows the position of each value in the text, so comments, order, quotes and spacing stay the same, byte by byte.
A library that parses the file and writes it again would change its style.
"""

import difflib
import re

import yaml

from bundle.errors import BundleError

Keys = tuple[str, ...]  # keys from the top of the document


def edited(text: str, changes: dict[Keys, int | str]) -> str:
    """Return the text with these values; a missing key is added at the top of the text, or of its section.

    Args:
        changes: new values by path: ("batchSize",), ("handler", "threads").

    Raises:
        BundleError: the structure of the text is too complex (an anchor, a section in flow style).
    """
    expected = yaml.safe_load(text)
    if not isinstance(expected, dict):
        raise BundleError("The file must be a mapping.")
    try:
        for path, value in changes.items():
            if get(expected, path) != value:
                text = with_value(text, path, value)
            put(expected, path, value)
        as_expected = yaml.safe_load(text) == expected
    except yaml.YAMLError:
        as_expected = False
    if not as_expected:
        wanted = ", ".join(f"{'.'.join(path)}: {value}" for path, value in changes.items())
        raise BundleError(f"The file's YAML is too complex to edit automatically. Set by hand: {wanted}")
    return text


def get(content: object, path: Keys) -> object:
    """Return the value at a path; None if it is missing."""
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def put(content: dict, path: Keys, value: int | str | list[str]) -> None:
    """Set the value at a path, and add the sections that are missing."""
    for key in path[:-1]:
        content[key] = dict(content.get(key) or {})  # a copy, because an alias shares its value with the anchor
        content = content[key]
    content[path[-1]] = value


def with_value(text: str, path: Keys, value: int | str) -> str:
    """Return the text, a mapping, with this value."""
    section = yaml.compose(text)
    assert isinstance(section, yaml.MappingNode)  # `edited` has checked it
    for depth, key in enumerate(path):
        found = next((node for name, node in section.value if name.value == key), None)
        if found is not None and depth == len(path) - 1:
            return replaced(text, found.start_mark.index, found.end_mark.index, str(value))
        if not isinstance(found, yaml.MappingNode):
            break
        section = found
    return with_key(text, section, path[depth:], value, found)


def replaced(text: str, start: int, end: int, value: str) -> str:
    """Return the text with another value from `start` to `end`. A comment after it keeps its column if possible."""
    rest = text[end:]
    spaces = re.match(r" {2,}(?=#)", rest)
    if spaces:
        room = len(spaces[0]) + (end - start) - len(value)
        rest = " " * max(1, room) + rest[len(spaces[0]) :]
    return text[:start] + value + rest


def with_key(text: str, node: yaml.MappingNode, path: Keys, value: int | str, empty: yaml.Node | None) -> str:
    """Return the text with a new key: the first one of its section, or in a new section at the end.

    Args:
        node: the innermost section on the path that exists.
        path: the part of the path inside of that section.
        empty: the value of a section that is there without keys (`handler:`), or None.
    """
    if len(path) == 2:
        if empty is not None:
            return replaced(text, empty.start_mark.index, empty.end_mark.index, f"\n  {path[1]}: {value}")
        return f"{text.rstrip()}\n\n{path[0]}:\n  {path[1]}: {value}\n"
    if node.flow_style:
        start = node.start_mark.index + 1
        return f"{text[:start]}{path[0]}: {value}{', ' if node.value else ''}{text[start:]}"
    first = node.value[0][0].start_mark
    return f"{text[: first.index]}{path[0]}: {value}\n{' ' * first.column}{text[first.index :]}"


def difference(old: str, new: str, name: str) -> str:
    """Return a unified diff for `git apply` or `patch -p1`; "" if nothing differs."""
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{name}", f"b/{name}")
    return "".join(lines)
