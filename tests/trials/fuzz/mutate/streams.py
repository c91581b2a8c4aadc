"""Mutate Ogg files (pages, each with a CRC) and FLAC files (metadata blocks, then frames)."""

import struct
from random import Random

from tests.trials.fuzz.mutate import generic

OGG_HEADER = 27  # bytes of a page before its table of segments
STREAM_INFO = 34  # bytes of FLAC's first block


def ogg(content: bytes, random: Random) -> bytes:
    """Change a field or the data of one page. Its CRC is correct three times out of four."""
    pages = split(content)
    if not pages:
        return generic.mutated(content, [], random)
    at = random.choice((0, min(1, len(pages) - 1), random.randrange(len(pages))))
    page = bytearray(pages[at])
    change = random.choice(("flags", "granule", "serial", "number", "data", "remove", "duplicate"))
    if change == "flags":
        page[5] = random.randrange(8)
    elif change == "granule":
        page[6:14] = struct.pack("<q", random.choice((0, 1, -1, 2**31, 2**62, 60 * 16_000 + 1)))
    elif change == "serial":
        page[14:18] = random.randbytes(4)
    elif change == "number":
        page[18:22] = struct.pack("<I", random.choice((0, 1, 2**32 - 1)))
    elif change == "data":
        start = min(len(page), OGG_HEADER + page[26])
        page[start:] = generic.flip(bytes(page[start:]), [], random)
    if random.random() < 0.75:
        page[22:26] = struct.pack("<I", checksum(page[:22] + b"\0\0\0\0" + page[26:]))
    times = {"remove": 0, "duplicate": 2}.get(change, 1)
    return b"".join([*pages[:at], *[bytes(page)] * times, *pages[at + 1 :]])


def split(content: bytes) -> list[bytes]:
    """Return the pages, up to the first incomplete one."""
    pages, at = [], 0
    while content[at : at + 4] == b"OggS" and at + OGG_HEADER <= len(content):
        segments = content[at + 26]
        end = at + OGG_HEADER + segments + sum(content[at + OGG_HEADER : at + OGG_HEADER + segments])
        pages.append(content[at:end])
        at = end
    return pages


def table() -> list[int]:
    """Return the table for Ogg's CRC-32, whose order of bits differs from zlib's."""
    values = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        values.append(value & 0xFFFFFFFF)
    return values


TABLE = table()


def checksum(page: bytes | bytearray) -> int:
    value = 0
    for byte in page:
        value = (value << 8 & 0xFFFFFFFF) ^ TABLE[value >> 24 ^ byte]
    return value


def flac(content: bytes, random: Random) -> bytes:
    """Change a field of STREAMINFO, a metadata block's header, or a frame."""
    changed = bytearray(content)
    change = random.choice(("info", "info", "block", "frame"))
    start = 8  # after the magic and the first block's head
    if change == "info" and len(changed) >= start + STREAM_INFO:
        field = random.choice(("blocks", "rate", "total"))
        if field == "blocks":
            changed[start : start + 4] = struct.pack(">HH", *random.choices((0, 15, 16, 4096, 65_535), k=2))
        else:
            packed = int.from_bytes(changed[start + 10 : start + 18], "big")  # rate 20, channels 3, bits 5, total 36
            if field == "rate":
                head = random.choice((0, 1, 999, 16_000, 384_001, 655_350)) << 8 | random.randrange(256)
                packed = packed & (1 << 36) - 1 | head << 36
            else:
                packed = packed >> 36 << 36 | random.choice((0, 1, 960_001, 32_000_001, 2**36 - 1))
            changed[start + 10 : start + 18] = packed.to_bytes(8, "big")
    elif change == "block" and len(changed) >= 8:
        changed[4:8] = bytes([random.choice((0, 1, 3, 4, 6, 127, 128, 132, 255))]) + random.randbytes(3)
    else:
        return content[:42] + generic.mutated(content[42:], [], random)
    return bytes(changed)
