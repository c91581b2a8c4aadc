"""Changes values in a model-config.yaml, and nothing else of its text.

PyYAML says where in the text each value stands, so comments, order, quotes and spacing stay what they are byte by byte;
a library that reads and writes the whole file again would set it in its own style.
"""

import difflib
import re

import yaml

from bundle.errors import BundleError

Keys = tuple[str, ...]  # keys from the top of the document


def edited(text: str, changes: dict[Keys, int | str]) -> str:
    """The text with these values; a key that is not there is put at the top, or at its section's.

    Args:
        changes: by path: ("batchSize",), ("handler", "threads").

    Raises:
        BundleError: the text's structure does not allow it (an anchor, a section in flow style).
    """
    expected = yaml.safe_load(text)
    if not isinstance(expected, dict):
        raise BundleError("The file must hold a mapping.")
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
        raise BundleError(f"The file's YAML is too intricate to edit. Set by hand: {wanted}")
    return text


def get(content: dict, path: Keys) -> object:
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def put(content: dict, path: Keys, value: int | str | list[str]) -> None:
    for key in path[:-1]:
        content[key] = dict(content.get(key) or {})  # a copy: an alias would change with its anchor
        content = content[key]
    content[path[-1]] = value


def with_value(text: str, path: Keys, value: int | str) -> str:
    node = yaml.compose(text)
    for depth, key in enumerate(path):
        found = next((held for name, held in node.value if name.value == key), None)
        if found is None or (depth < len(path) - 1 and not isinstance(found, yaml.MappingNode)):
            return with_key(text, node, path[depth:], value, found)
        node = found
    return replaced(text, node.start_mark.index, node.end_mark.index, str(value))


def replaced(text: str, start: int, end: int, value: str) -> str:
    """A comment behind the value keeps its column, where it has room."""
    rest = text[end:]
    spaces = re.match(r" {2,}(?=#)", rest)
    if spaces:
        room = len(spaces[0]) + (end - start) - len(value)
        rest = " " * max(1, room) + rest[len(spaces[0]) :]
    return text[:start] + value + rest


def with_key(text: str, node: yaml.MappingNode, path: Keys, value: int | str, held: yaml.Node | None) -> str:
    """Puts a key in front of the section's others; a whole section, at the end of the text."""
    if len(path) == 2:
        if held is not None:  # `handler:` with nothing in it
            return replaced(text, held.start_mark.index, held.end_mark.index, f"\n  {path[1]}: {value}")
        return f"{text.rstrip()}\n\n{path[0]}:\n  {path[1]}: {value}\n"
    if node.flow_style:
        start = node.start_mark.index + 1
        return f"{text[:start]}{path[0]}: {value}{', ' if node.value else ''}{text[start:]}"
    first = node.value[0][0].start_mark
    return f"{text[: first.index]}{path[0]}: {value}\n{' ' * first.column}{text[first.index :]}"


def difference(old: str, new: str, name: str) -> str:
    """A unified diff that `git apply` and `patch -p1` take; "" where nothing differs."""
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{name}", f"b/{name}")
    return "".join(lines)
