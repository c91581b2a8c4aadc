"""PNG: chunks are length, name, data, CRC."""

import struct
import zlib
from random import Random

from tests.trials.fuzz.mutate import generic

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIDES = (0, 1, 7, 8, 9, 64, 65_535, 7_071, 50_000_000, 2**31 - 1, 2**31, 2**32 - 1)
NAMES = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"????")

Chunk = tuple[bytes, bytes]  # name, data


def split(content: bytes) -> list[Chunk]:
    """As far as there are whole ones."""
    chunks, at = [], len(SIGNATURE)
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def join(chunks: list[Chunk]) -> bytes:
    """With CRCs that are right."""
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def mutated(content: bytes, random: Random) -> bytes:
    chunks = split(content)
    if not chunks:
        return generic.mutated(content, [], random)
    at = random.randrange(len(chunks))
    change = random.choice((header, header, pixels, data, remove, duplicate, swap, rename, lie))
    return change(chunks, at, random)


def header(chunks: list[Chunk], _: int, random: Random) -> bytes:
    """One field of IHDR: width, height, depth, colour type, compression, filter, interlace."""
    name, data = chunks[0]
    field = random.randrange(7)
    if field < 2:
        side = struct.pack(">I", random.choice(SIDES))
        data = data[: 4 * field] + side + data[4 * field + 4 :]
    else:
        value = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        data = data[: 6 + field] + bytes([value]) + data[7 + field :]
    return join([(name, data), *chunks[1:]])


def pixels(chunks: list[Chunk], _: int, random: Random) -> bytes:
    """What IDAT unpacks to: filters, and how much there is."""
    packed = b"".join(data for name, data in chunks if name == b"IDAT")
    try:
        unpacked = zlib.decompressobj().decompress(packed, 1 << 20)
    except zlib.error:
        return join(chunks)
    unpacked = generic.mutated(unpacked, [packed], random)
    others = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    return join([*others[:-1], (b"IDAT", zlib.compress(unpacked)), *others[-1:]])


def data(chunks: list[Chunk], at: int, random: Random) -> bytes:
    name, old = chunks[at]
    return join([*chunks[:at], (name, generic.mutated(old, [old], random)), *chunks[at + 1 :]])


def remove(chunks: list[Chunk], at: int, _: Random) -> bytes:
    return join([*chunks[:at], *chunks[at + 1 :]])


def duplicate(chunks: list[Chunk], at: int, random: Random) -> bytes:
    return join([*chunks[:at], *[chunks[at]] * random.choice((2, 3, 200)), *chunks[at + 1 :]])


def swap(chunks: list[Chunk], at: int, random: Random) -> bytes:
    other = random.randrange(len(chunks))
    changed = list(chunks)
    changed[at], changed[other] = changed[other], changed[at]
    return join(changed)


def rename(chunks: list[Chunk], at: int, random: Random) -> bytes:
    return join([*chunks[:at], (random.choice(NAMES), chunks[at][1]), *chunks[at + 1 :]])


def lie(chunks: list[Chunk], at: int, random: Random) -> bytes:
    """A length or a CRC that is wrong."""
    before, whole = join(chunks[:at]), join(chunks)
    start = len(before) if random.random() < 0.5 else len(before) + 8 + len(chunks[at][1])
    return whole[:start] + struct.pack(">I", random.choice((*SIDES, 13))) + whole[start + 4 :]
