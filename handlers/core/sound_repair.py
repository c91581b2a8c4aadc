"""Prepare what players play and libsndfile rejects: sounds behind tags, and WAV files that were written into a pipe."""

import re
import struct

from handlers.core.signatures import format_name

# the formats that libsndfile recognises by their first bytes
STARTS = (
    b"RIFF",
    b"RIFX",
    b"RF64",
    b"riff",
    b"fLaC",
    b"OggS",
    b"FORM",
    b".snd",
    b"dns.",
    b"caff",
    b"Creative Voice File",
)
FRAME = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # the first two bytes of an MP3's frame
SEARCHED = 1 << 16  # bytes in which the first frame of an MP3 is searched
FRAMES = 3  # consecutive ones that are enough to be no coincidence
# by the numbers in a frame's header; of MPEG 1, and of MPEG 2 and 2.5
BIT_RATES = (
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
SAMPLE_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
MAX_TAGS, MAX_CHUNKS = 16, 1000


def repaired(content: bytes) -> bytes:
    """Return a sound file without what stands before its sound, and with the true size of its samples.

    Most files, and those that are no sounds, are returned as they are.
    """
    if content.startswith((b"RIFF", b"RIFX")):
        return with_size(content)
    if content.startswith(STARTS) or FRAME.match(content):
        return content
    start = skip_tags(content)
    if start == 0 and format_name(content):
        return content
    if content.startswith(STARTS, start):
        return with_size(content[start:])
    for found in FRAME.finditer(content, start, start + SEARCHED):
        if is_mp3(content, found.start()):
            return content[found.start() :]
    return content


def skip_tags(content: bytes) -> int:
    """Return where the tags (ID3v2, APE) and the padding at the start of a file end."""
    start = 0
    for _ in range(MAX_TAGS):
        start += tag_length(content, start)
    padding = len(content) - start - len(content[start:].lstrip(b"\0\r\n"))
    return start + padding


def tag_length(content: bytes, start: int) -> int:
    """Return the length of the tag at `start`; 0 if it has none."""
    head = content[start : start + 32]
    if len(head) >= 10 and head.startswith(b"ID3"):
        size = 0
        for seven_bits in head[6:10]:
            size = size << 7 | seven_bits & 127
        has_footer = head[5] & 0x10
        return 10 + size + (10 if has_footer else 0)
    if len(head) == 32 and head.startswith(b"APETAGEX"):
        return 32 + int.from_bytes(head[12:16], "little")
    return 0


def is_mp3(content: bytes, start: int) -> bool:
    """Return whether consecutive frames begin at `start`: `FRAMES`, or as many as there are until the end."""
    for count in range(FRAMES):
        if start >= len(content):
            return count > 0
        length = frame_length(content[start : start + 4])
        if not length:
            return False
        start += length
    return True


def frame_length(header: bytes) -> int:
    """Return the bytes of an MP3's frame; 0 if this is not the header of one."""
    if len(header) < 4 or not FRAME.match(header):
        return 0
    version, bit_rate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if bit_rate in (0, 15) or rate == 3:
        return 0
    kilobits = BIT_RATES[version != 3][bit_rate - 1]
    factor = 144 if version == 3 else 72
    return factor * 1000 * kilobits // SAMPLE_RATES[version][rate] + (header[2] >> 1 & 1)


def with_size(content: bytes) -> bytes:
    """Return a WAV file with the true size of its samples, if it has 0: its program could not go back to write it."""
    order = ">" if content.startswith(b"RIFX") else "<"
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(content):
            return content
        name, size = struct.unpack_from(f"{order}4sI", content, at)
        if name == b"data":
            if size or are_chunks(content, at + 8, order):
                return content
            return content[: at + 4] + struct.pack(f"{order}I", len(content) - at - 8) + content[at + 8 :]
        at += 8 + size + size % 2
    return content


def are_chunks(content: bytes, at: int, order: str) -> bool:
    """Return whether the rest of a WAV file is further chunks, or nothing."""
    for _ in range(MAX_CHUNKS):
        if len(content) - at < 2:
            return True
        if not re.match(rb"[ -~]{4}", content[at : at + 4]) or at + 8 > len(content):
            return False
        (size,) = struct.unpack_from(f"{order}I", content, at + 4)
        at += 8 + size + size % 2
        if at > len(content) + 1:
            return False
    return True
