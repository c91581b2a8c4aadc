"""Files that are replaced atomically, and sections of documents that commands write."""

from pathlib import Path

import pytest

from bundle.errors import BundleError
from bundle.files import around_section, replacing, write_atomically, write_section

DOCUMENT = "# Report\n\nWhat changed, and why.\n\n<!-- load:start -->\nold\n<!-- load:end -->\n\n## Before\n\nslow\n"
TITLE = "# Report\n"


# --- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "expected"), [("ä\n", b"\xc3\xa4\n"), (b"\x00\xff", b"\x00\xff")])
def test_write_atomically_takes_text_and_bytes(tmp_path: Path, content: str | bytes, expected: bytes):
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_write_atomically_keeps_the_permissions_of_the_file(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("old")
    for mode in (0o640, 0o600, 0o444):
        file.chmod(mode)
        write_atomically(file, "new")
        assert file.stat().st_mode & 0o777 == mode


def test_content_that_replaces_a_private_file_is_private_from_the_start(tmp_path: Path):
    file = tmp_path / "file"
    file.touch(mode=0o600)
    with replacing(file) as partial:
        assert partial.stat().st_mode & 0o777 == 0o600


def test_write_atomically_makes_a_file_with_the_users_default_permissions(tmp_path: Path):
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_replacing_sets_the_default_permissions_of_a_moved_file(tmp_path: Path):
    (tmp_path / "usual").touch()
    (tmp_path / "private").touch(mode=0o600)
    with replacing(tmp_path / "file") as partial:
        (tmp_path / "private").replace(partial)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_write_atomically_leaves_an_open_file_unchanged(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("old")
    with file.open() as reader:
        write_atomically(file, "new")
        assert reader.read() == "old"
    assert file.read_text() == "new"


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_replacing_with_a_failure_leaves_the_old_file(tmp_path: Path, failure: BaseException):
    file = tmp_path / "file"
    file.write_text("old")

    def write() -> None:
        with replacing(file) as partial:
            partial.write_text("ne")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_replacing_in_a_missing_folder_raises(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", "new")


# --- sections --------------------------------------------------------------------------------------------------------


def test_write_section_changes_the_section_and_nothing_else(tmp_path: Path):
    file = tmp_path / "REPORT.md"
    file.write_text(DOCUMENT)
    for _ in range(2):
        write_section(file, "load", "| new |", TITLE)
        assert file.read_text() == DOCUMENT.replace("\nold\n", "\n\n| new |\n\n")
    assert list(tmp_path.iterdir()) == [file]


def test_write_section_without_marks_appends_the_section(tmp_path: Path):
    file = tmp_path / "REPORT.md"
    file.write_text("# Ours\n\nnotes\n")
    write_section(file, "load", "| new |", TITLE)
    write_section(file, "soak", "| long |", TITLE)
    load = "<!-- load:start -->\n\n| new |\n\n<!-- load:end -->"
    soak = "<!-- soak:start -->\n\n| long |\n\n<!-- soak:end -->"
    assert file.read_text() == f"# Ours\n\nnotes\n\n{load}\n\n{soak}\n"


def test_write_section_without_a_document_makes_one(tmp_path: Path):
    file = tmp_path / "docs" / "REPORT.md"
    write_section(file, "load", "| new |", TITLE)
    assert file.read_text() == "# Report\n\n<!-- load:start -->\n\n| new |\n\n<!-- load:end -->\n"


@pytest.mark.parametrize(
    "marks",
    [
        "<!-- load:start -->",
        "<!-- load:end -->",
        "<!-- load:end --> <!-- load:start -->",
        "<!-- load:start --> <!-- load:start --> <!-- load:end -->",
    ],
)
def test_write_section_with_broken_marks_writes_nothing(tmp_path: Path, marks: str):
    file = tmp_path / "REPORT.md"
    file.write_text(f"notes {marks} notes")
    for step in (lambda: around_section(file, "load", TITLE), lambda: write_section(file, "load", "| new |", TITLE)):
        with pytest.raises(BundleError, match="once each"):
            step()
    assert file.read_text() == f"notes {marks} notes"
