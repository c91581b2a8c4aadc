"""Mutate JSON as a tree, and write it without `json.dumps`, which would not write invalid JSON.

A tree is a JSON value. Its objects are lists of pairs, so that keys may repeat, and its leaves may be `Verbatim`.
"""

import json
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Verbatim:
    """A leaf that is written unchanged."""

    text: str


@dataclass(frozen=True)
class Object:
    pairs: tuple[tuple[str, object], ...]


LEAVES = (
    None, True, False, 0, -1, 1.5, "", "\0", [], Object(()), 2**63, 10**400,
    *map(Verbatim, ("NaN", "-Infinity", "1e999", "-0", "1" * 5000, "0x10", "01", "'a'", "undefined", "/**/1", "1,",
                    r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', r'"\x41"', '"\t"', '"unfinished', "{", "]", "")),
)  # fmt: skip
KEYS = ("data", "instances", "top_k", "", "Data", "__proto__", "data ", "\0", "body", "parameters")
DEPTHS = (2, 4, 100, 990, 20_000)


def build(value: object) -> object:
    """Convert a plain JSON value into a tree."""
    if isinstance(value, dict):
        return Object(tuple((key, build(item)) for key, item in value.items()))
    return [build(item) for item in value] if isinstance(value, list) else value


def write(tree: object) -> str:
    if isinstance(tree, Verbatim):
        return tree.text
    if isinstance(tree, Object):
        return "{" + ", ".join(f"{json.dumps(key)}: {write(value)}" for key, value in tree.pairs) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(write, tree)) + "]"
    return json.dumps(tree)


def mutated(tree: object, random: Random) -> object:
    """Change one node of the tree: the root or a node below it."""
    children = len(tree.pairs) if isinstance(tree, Object) else len(tree) if isinstance(tree, list) else 0
    if not children or random.random() < 0.3:
        return replaced(tree, random)
    at = random.randrange(children)
    change = random.choice(("below", "below", "below", "remove", "duplicate", "rename"))
    items = list(tree.pairs if isinstance(tree, Object) else tree)
    if change == "remove":
        del items[at]
    elif change == "duplicate":
        items[at:at] = [items[at]] * random.choice((1, 2, 31, 32, 33))
    elif isinstance(tree, list):
        items[at] = mutated(items[at], random)
    elif change == "rename":
        items[at] = (random.choice(KEYS), items[at][1])
    else:
        items[at] = (items[at][0], mutated(items[at][1], random))
    return Object(tuple(items)) if isinstance(tree, Object) else items


def replaced(tree: object, random: Random) -> object:
    change = random.choice(("leaf", "leaf", "wrap", "nest"))
    if change == "leaf":
        return random.choice(LEAVES)
    if change == "wrap":
        return random.choice(([tree], [tree, tree], Object((("data", tree),)), Object((("instances", [tree]),))))
    depth = random.choice(DEPTHS)  # written as text, because deep recursion in the tree would fail here
    opening, closing = random.choice((("[", "]"), ('{"data":', "}")))
    return Verbatim(opening * depth + write(tree) + closing * depth)
