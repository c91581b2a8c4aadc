"""What has changed between two records of digests."""

import pytest

from bundle.digests import changed, digest


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        ("ab", "ab", ""),
        ("ab", "aB", "B, b"),
        ("", "ba", "a, b"),
        ("abc", "", "a, b, c"),
        ("abcdex", "x", "a, b, c and 2 more"),
    ],
)
def test_changed_names_what_differs_and_what_only_one_side_has(before: str, now: str, names: str):
    assert changed({name: digest(name) for name in before}, {name: digest(name) for name in now}) == names


def test_changed_names_a_part_with_another_content():
    assert changed({"a": digest("1"), "b": digest("2")}, {"a": digest("1"), "b": digest(b"3")}) == "b"
