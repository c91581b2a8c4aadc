"""Mutate JPEG files: segments of FF, marker, length and data; coded pixels follow a scan's segment."""

import struct
from random import Random

from tests.trials.fuzz.mutate import generic

BARE = (*range(0xD0, 0xDA), 0x01)  # markers without length
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC))
TABLES = (0xC4, 0xDB, 0xDD)
SCAN = 0xDA
LENGTHS = (0, 1, 2, 16, 64, 65, 66, 129, 255, 256, 4_096, 65_533)  # bytes of a segment's data
SIDES = (0, 1, 7, 8, 65, 7_071, 65_500, 65_535)

Segment = tuple[int, bytes]  # marker, and all bytes up to the next marker: length, data, coded pixels


def split(content: bytes) -> list[Segment]:
    segments, at = [], 2
    while at + 2 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        end = at + 2
        if marker not in BARE:
            end += int.from_bytes(content[end : end + 2], "big")
        if marker == SCAN:
            end = next_marker(content, end)
        segments.append((marker, content[at + 2 : end]))
        at = end
    return segments


def next_marker(content: bytes, at: int) -> int:
    """Return where coded pixels end. FF 00 (an escaped FF) and restart markers belong to them."""
    while (at := content.find(b"\xff", at)) >= 0:
        if at + 1 < len(content) and content[at + 1] not in (0, *range(0xD0, 0xD8)):
            return at
        at += 2
    return len(content)


def join(segments: list[Segment]) -> bytes:
    return b"\xff\xd8" + b"".join(b"\xff" + bytes([marker]) + rest for marker, rest in segments)


def mutated(content: bytes, random: Random) -> bytes:
    segments = split(content)
    if not segments:
        return generic.mutated(content, [], random)
    changes = (frame, frame, table, scan, remove, duplicate, flood, swap, shuffle, remark, resize, end, tags)
    change = random.choice(changes)
    return change(segments, random)


def one_of(segments: list[Segment], markers: tuple[int, ...], random: Random) -> int:
    """Return the index of a random segment with one of the markers, or of any segment if none has."""
    found = [at for at, (marker, _) in enumerate(segments) if marker in markers]
    return random.choice(found or range(len(segments)))


def replaced(segments: list[Segment], at: int, *by: Segment) -> bytes:
    return join([*segments[:at], *by, *segments[at + 1 :]])


def frame(segments: list[Segment], random: Random) -> bytes:
    """Change a field of SOF: precision, height, width, number of components, or a component's sampling."""
    at = one_of(segments, FRAMES, random)
    marker, rest = segments[at]
    field = random.choice(("height", "width", "byte"))
    if field == "byte":
        where = random.randint(2, max(2, len(rest)))
        rest = rest[:where] + bytes([random.choice((0, 1, 2, 3, 4, 8, 12, 0x11, 0x22, 0x44, 255))]) + rest[where + 1 :]
    else:
        where = 3 if field == "height" else 5
        rest = rest[:where] + struct.pack(">H", random.choice(SIDES)) + rest[where + 2 :]
    return replaced(segments, at, (marker, rest))


def table(segments: list[Segment], random: Random) -> bytes:
    """Change the contents of DHT, DQT or DRI, but not the length."""
    at = one_of(segments, TABLES, random)
    marker, rest = segments[at]
    return replaced(segments, at, (marker, rest[:2] + generic.flip(rest[2:], [], random)))


def scan(segments: list[Segment], random: Random) -> bytes:
    at = one_of(segments, (SCAN,), random)
    marker, rest = segments[at]
    return replaced(segments, at, (marker, generic.mutated(rest, [rest], random)))


def remove(segments: list[Segment], random: Random) -> bytes:
    return replaced(segments, random.randrange(len(segments)))


def duplicate(segments: list[Segment], random: Random) -> bytes:
    """Repeat a segment, preferably a scan: decoders process each scan over the whole picture."""
    at = one_of(segments, (SCAN,), random) if random.random() < 0.5 else random.randrange(len(segments))
    return replaced(segments, at, *[segments[at]] * random.choice((2, 3, 50, 500)))


def flood(segments: list[Segment], random: Random) -> bytes:
    """Insert thousands of segments without data, or of markers without a length."""
    at = random.randrange(len(segments) + 1)
    marker = random.choice((0xE1, 0xED, 0xFE, 0xDB, 0xC4, 0xD0, 0xD9, 0xFF))
    many = [(marker, b"" if marker in BARE or marker == 0xFF else b"\0\2")] * random.choice((300, 21_000))
    return join([*segments[:at], *many, *segments[at:]])


def shuffle(segments: list[Segment], random: Random) -> bytes:
    return join(random.sample(segments, len(segments)))


def resize(segments: list[Segment], random: Random) -> bytes:
    """Change a segment's length, up to the format's maximum; longer data repeats."""
    at = random.randrange(len(segments))
    marker, rest = segments[at]
    size, old = random.choice(LENGTHS), rest[2:] or b"\0"
    return replaced(segments, at, (marker, struct.pack(">H", size + 2) + (old * (size // len(old) + 1))[:size]))


def swap(segments: list[Segment], random: Random) -> bytes:
    one, other = (random.randrange(len(segments)) for _ in range(2))
    changed = list(segments)
    changed[one], changed[other] = changed[other], changed[one]
    return join(changed)


def remark(segments: list[Segment], random: Random) -> bytes:
    at = random.randrange(len(segments))
    return replaced(segments, at, (random.choice((*FRAMES, *TABLES, SCAN, 0xE1, 0xD9)), segments[at][1]))


def end(segments: list[Segment], random: Random) -> bytes:
    return join(segments[: random.randrange(len(segments))])


def tags(segments: list[Segment], random: Random) -> bytes:
    """Insert an invalid EXIF segment, which decoders read for the orientation."""
    broken = b"Exif\0\0" + random.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"")) + random.randbytes(40)
    return join([(0xE1, struct.pack(">H", len(broken) + 2) + broken), *segments])
