"""Replace files as a whole: a reader sees the old content or the new one, never a part."""

import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle.errors import BundleError


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file's new content; see `replacing`."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(file) as partial:
        partial.write_bytes(data)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield an empty file in the same folder, which replaces `file` when the block ends.

    If the block raises, `file` stays as it was. An existing file keeps its permissions; a new one has the user's
    default permissions (umask).
    """
    partial = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    partial.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE((file if file.exists() else partial).stat().st_mode)
        partial.chmod(mode | stat.S_IWUSR)  # before there is content that others must not read
        yield partial
        partial.chmod(mode)  # the block may have replaced it with another file
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def around_section(file: Path, name: str, title: str) -> tuple[str, str]:
    """Return the text before and after the section that a command writes into a document.

    Args:
        file: a Markdown file. If it does not exist or has no such section, the section comes last.
        name: the section's name in its marks, `<!-- NAME:start -->` and `<!-- NAME:end -->`.
        title: the beginning of a new document.

    Raises:
        BundleError: only one of the marks exists, one exists twice, or they are in the wrong order.
    """
    start, end = marks(name)
    text = file.read_text() if file.exists() else title
    counts = text.count(start), text.count(end)
    if counts == (0, 0):
        return text.rstrip("\n") + "\n\n", "\n"
    if counts != (1, 1) or text.find(start) > text.find(end):
        raise BundleError(
            f"{file} must have {start} and {end} once each, in this order. The report is written between them."
        )
    return text.partition(start)[0], text.partition(end)[2]


def write_section(file: Path, name: str, text: str, title: str) -> None:
    """Replace the section with this name, and leave the rest of the document as it is.

    Args:
        file, name, title: see `around_section`.
        text: the section's new content, Markdown.

    Raises:
        BundleError: see `around_section`; nothing is written.
    """
    before, after = around_section(file, name, title)
    start, end = marks(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"{before}{start}\n\n{text.strip()}\n\n{end}{after}")


def marks(name: str) -> tuple[str, str]:
    """Return the marks of a section's start and end."""
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"
