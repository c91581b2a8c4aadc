"""Bound the parts of an image file: segments, chunks, blocks, tags. A few bytes of each cost microseconds of Python.

Pillow reads the head of a file part by part, in Python, before any limit of pixels applies. A file of 16 MiB may hold
millions of parts, and takes tens of seconds to open.
"""

import io
import re
from collections.abc import Sized

from PIL import TiffImagePlugin

from handlers.core.errors import ImageTooLarge

JPEG, PNG, TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", tuple(TiffImagePlugin.PREFIXES)
PLAIN_PPM = (b"P1", b"P2", b"P3")  # pixels as text

MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG: those with a segment, and the end of the image
START_OF_SCAN, END_OF_IMAGE, TABLES, PHOTOSHOP = b"\xff\xda", b"\xff\xd9", b"\xff\xdb", b"\xff\xed"
BYTES_OF_TABLE = 65  # of quantization
PARTS_OF_PROFILE = 1000  # a colour profile of a PNG inflates to as much as 1 MiB, which takes as long as 1,000 chunks
LISTS = (  # tags whose values Pillow walks
    TiffImagePlugin.BITSPERSAMPLE,
    TiffImagePlugin.COLORMAP,
    TiffImagePlugin.EXTRASAMPLES,
    TiffImagePlugin.SAMPLEFORMAT,
)
STRIPS = (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS)  # likewise, unless compressed: then libtiff does


class PartReader(io.BytesIO):
    """A file in memory whose number of reads is limited: Pillow reads every part by itself."""

    def __init__(self, content: bytes, limit: int) -> None:
        super().__init__(content)
        self.limit = self.left = limit

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as `io.BytesIO` does.

        Raises:
            ImageTooLarge: `limit` reads are used up.
        """
        self.left -= 1
        if self.left < 0:
            raise too_many_parts(self.limit)
        return io.BytesIO.read(self, size)


def check_parts(content: bytes, most_parts: int, most_scans: int) -> None:
    """Check the parts that no read shows, because one read brings them all or a C library walks them.

    Raises:
        ImageTooLarge: more than `most_parts` parts, or a JPEG of more than `most_scans` scans.
    """
    parts = 0
    if content.startswith(JPEG):
        parts, scans = count_segments(content, most_parts)
        if scans > most_scans:
            raise ImageTooLarge(f"The image has too many scans; at most {most_scans} are accepted.")
    elif content.startswith(PNG):
        parts = count_chunks(content, most_parts)
    elif content.startswith(TIFF):
        parts = count_values(content, most_parts)
    elif content.startswith(PLAIN_PPM):
        parts = content.count(b"#")  # Pillow copies up to 1 MiB to remove a comment
    if parts > most_parts:
        raise too_many_parts(most_parts)


def too_many_parts(limit: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"The image file has too many parts (segments, chunks, blocks, tags); at most {limit} are read. "
        "Save the image again without metadata."
    )


def count_segments(jpeg: bytes, most: int) -> tuple[int, int]:
    """Count segments and scans up to the end of the image (ITU T.81, B.1.1), or until there are more than `most`.

    What follows the end, such as a phone's video, is not decoded. Tables and Photoshop's resources count by themselves.
    """
    parts = scans = 0
    found = MARKER.search(jpeg, 2)
    while found and found[0] != END_OF_IMAGE and parts <= most:
        length = max(2, int.from_bytes(jpeg[found.end() : found.end() + 2], "big"))
        end = found.end() + length
        parts += 1
        if found[0] == START_OF_SCAN:
            scans += 1
        elif found[0] == TABLES:
            parts += length // BYTES_OF_TABLE
        elif found[0] == PHOTOSHOP:
            parts += jpeg.count(b"8BIM", found.end(), end)
        found = MARKER.search(jpeg, end)
    return parts, scans


def count_chunks(png: bytes, most: int) -> int:
    """Count chunks up to the end of the image, or until there are more than `most`.

    A colour profile counts as the number of chunks that take as long.
    """
    parts, at = 0, len(PNG)
    while at < len(png) and parts <= most:
        name = png[at + 4 : at + 8]
        if name == b"IEND":
            break
        parts += PARTS_OF_PROFILE if name == b"iCCP" else 1
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return parts


def count_values(tiff: bytes, most: int) -> int:
    """Count the values of the longest list in the first directory.

    Raises:
        ImageTooLarge: it takes more than `most` reads to find out.
    """
    reader = PartReader(tiff, most)
    directory = TiffImagePlugin.ImageFileDirectory_v2(tiff[: 16 if tiff[2] == 43 else 8])
    reader.seek(directory.next)
    directory.load(reader)
    compressed = directory.get(TiffImagePlugin.COMPRESSION, 1) != 1
    values = (directory.get(tag) for tag in (LISTS if compressed else LISTS + STRIPS))
    return max(len(value) if isinstance(value, Sized) else 1 for value in values)
