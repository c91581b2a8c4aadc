"""Limit the number of parts of an image file: segments, chunks, blocks, tags.

Pillow reads the head of a file part by part, in Python, before a limit on pixels applies. A part may have only a few
bytes, and takes microseconds. So a file of 16 MiB may have millions of parts, and takes tens of seconds to open.
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
READS_OF_CHUNK = 3  # of a PNG: its head, its data, its checksum
READS_OF_PROFILE = 3000  # a PNG's colour profile decompresses to up to 1 MiB, which takes as long as 1,000 chunks
LIST_TAGS = (  # Pillow iterates over their values
    TiffImagePlugin.BITSPERSAMPLE,
    TiffImagePlugin.COLORMAP,
    TiffImagePlugin.EXTRASAMPLES,
    TiffImagePlugin.SAMPLEFORMAT,
)
STRIP_TAGS = (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS)  # so too, if the pixels are not compressed


class PartReader(io.BytesIO):
    """A file in memory with a limited number of reads: Pillow reads each part separately."""

    def __init__(self, content: bytes, limit: int) -> None:
        super().__init__(content)
        self.limit = self.left = limit

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as `io.BytesIO` does.

        Raises:
            ImageTooLarge: the file has been read `limit` times.
        """
        self.left -= 1
        if self.left < 0:
            raise too_many_parts(self.limit)
        return io.BytesIO.read(self, size)


def open_parts(content: bytes, limit: int) -> io.BytesIO:
    """Return the file to give to Pillow: one that limits the reads, unless `check_parts` has counted all of them."""
    return io.BytesIO(content) if content.startswith(PNG) else PartReader(content, limit)


def check_parts(content: bytes, max_parts: int, max_scans: int) -> None:
    """Check the parts that `PartReader` cannot count: one read returns many of them, or a C library reads them.

    Raises:
        ImageTooLarge: the file has more than `max_parts` parts, or is a JPEG with more than `max_scans` scans.
    """
    parts = 0
    if content.startswith(JPEG):
        parts, scans = count_segments(content, max_parts)
        if scans > max_scans:
            raise ImageTooLarge(
                f"The image has too many scans; at most {max_scans} are accepted. Save it again as a baseline JPEG."
            )
    elif content.startswith(PNG):
        parts = count_reads_of_chunks(content, max_parts)
    elif content.startswith(TIFF):
        parts = count_values(content, max_parts)
    elif content.startswith(PLAIN_PPM):
        parts = content.count(b"#")  # to remove a comment, Pillow copies up to 1 MiB
    if parts > max_parts:
        raise too_many_parts(max_parts)


def too_many_parts(limit: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"The image file has too many parts (segments, chunks, blocks, tags); at most {limit} are read. "
        "Save the image again without metadata."
    )


def count_segments(jpeg: bytes, limit: int) -> tuple[int, int]:
    """Count segments and scans up to the end of the image (ITU T.81, B.1.1), or until there are more than `limit`.

    Data after the end, such as a phone's video, is not decoded. Every table and Photoshop resource in a segment counts
    as a part.
    """
    parts = scans = 0
    found = MARKER.search(jpeg, 2)
    while found and found[0] != END_OF_IMAGE and parts <= limit:
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


def count_reads_of_chunks(png: bytes, limit: int) -> int:
    """Count the reads that the chunks up to the end of the image take, or until there are more than `limit`.

    A colour profile counts as the number of reads that take as long as it.
    """
    reads, at = READS_OF_CHUNK, len(PNG)  # those of the signature and of the last chunk, together
    while at < len(png) and reads <= limit:
        name = png[at + 4 : at + 8]
        if name == b"IEND":
            break
        reads += READS_OF_PROFILE if name == b"iCCP" else READS_OF_CHUNK
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return reads


def count_values(tiff: bytes, limit: int) -> int:
    """Count the values of the longest list in the first directory.

    Raises:
        ImageTooLarge: the directory takes more than `limit` reads.
    """
    reader = PartReader(tiff, limit)
    directory = TiffImagePlugin.ImageFileDirectory_v2(tiff[: 16 if tiff[2] == 43 else 8])
    reader.seek(directory.next)
    directory.load(reader)
    compressed = directory.get(TiffImagePlugin.COMPRESSION, 1) != 1
    values = (directory.get(tag) for tag in (LIST_TAGS if compressed else LIST_TAGS + STRIP_TAGS))
    return max(len(value) if isinstance(value, Sized) else 1 for value in values)
