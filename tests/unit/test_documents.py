"""Every Markdown page: the targets of its links exist, and so do the make commands that it names."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle.paths import ROOT

NOT_OURS = {"build", "data", "keys"}  # folders that commands write, or that belong to users
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
MAKE = re.compile(r"(?:^|\s)make +([^\n;|&)]+)", re.MULTILINE)
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
VARIABLE = re.compile(r"\$\(([A-Z][A-Z0-9_]*)")
OPTIONS = re.compile(r"\$\(call options,([A-Z0-9_ ]+)\)")


def pages() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in NOT_OURS:
            yield from folder.rglob("*.md")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page, by GitHub's rule."""
    titles = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    text = SPAN.sub("", FENCE.sub("", page.read_text()))
    return [link for link in LINK.findall(text) if "://" not in link and not target_exists(page, link)]


def target_exists(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def make_words(page: Path) -> set[str]:
    """Return the targets and variables of every make command in code blocks and code spans."""
    text = page.read_text()
    code = [re.sub(r"\s#.*$", "", block, flags=re.MULTILINE) for block in FENCE.findall(text)]
    code += SPAN.findall(FENCE.sub("", text))
    commands = [command for part in code for command in MAKE.findall(part)]
    return {word.partition("=")[0] for command in commands for word in shlex.split(command)}


def known_to_make() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return {*TARGET.findall(makefile), *VARIABLE.findall(makefile), *" ".join(OPTIONS.findall(makefile)).split()}


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", sorted(pages()), ids=by_name)
def test_targets_of_links_exist(page: Path):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", sorted(pages()), ids=by_name)
def test_make_commands_exist(page: Path):
    assert make_words(page) - known_to_make() == set()


def test_broken_links_and_unknown_make_commands_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Up and `down`\n[here](#up-and-down) [no](#up) [gone](gone.md) [web](https://example.com/#x) `[code](gone)`\n"
        "make sure; `make serve`, `A=1 make nonesuch NOBODY=1`\n```sh\nmake up stpo   # make it so\n```\n"
    )
    assert broken_links(page) == ["#up", "gone.md"]
    assert make_words(page) == {"serve", "nonesuch", "NOBODY", "up", "stpo"}
    assert make_words(page) - known_to_make() == {"nonesuch", "NOBODY", "stpo"}


def test_pages_of_every_folder_are_checked():
    names = {by_name(page) for page in pages()}
    assert {"README.md", "handlers/README.md", "loadtest/bench/README.md", "tests/trials/fuzz/README.md"} <= names
    assert {"serve", "add-model", "test-faults"} <= make_words(ROOT / "README.md")


def test_changelog_begins_with_the_current_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
