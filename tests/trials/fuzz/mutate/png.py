"""Mutate PNG files: chunks of length, name, data and CRC."""

import struct
import zlib
from random import Random

from tests.trials.fuzz.mutate import generic

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIDES = (0, 1, 7, 8, 9, 64, 65_535, 7_071, 50_000_000, 2**31 - 1, 2**31, 2**32 - 1)
COLOURS = (0, 1, 2, 15, 16, 255, 256, 257, 300, 65_536)  # in a palette; valid are 1 to 256
SIZES = (0, 1, 2, 3, 6, 12, 14, 255, 256, 257, 300, 767, 769, 65_536)  # bytes of a chunk
NAMES = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"????")

Chunk = tuple[bytes, bytes]  # name, data


def split(content: bytes) -> list[Chunk]:
    """Return the chunks, up to the first incomplete one."""
    chunks, at = [], len(SIGNATURE)
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def join(chunks: list[Chunk]) -> bytes:
    """Return the PNG with correct CRCs."""
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def mutated(content: bytes, random: Random) -> bytes:
    chunks = split(content)
    if not chunks:
        return generic.mutated(content, [], random)
    at = random.randrange(len(chunks))
    changes = (header, header, pixels, data, remove, duplicate, swap, shuffle, rename, resize, palette, palette, lie)
    change = random.choice(changes)
    return change(chunks, at, random)


def header(chunks: list[Chunk], _: int, random: Random) -> bytes:
    """Change one field of IHDR: width, height, depth, colour type, compression, filter or interlace."""
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
    """Change the unpacked contents of IDAT: filters, and the amount of data."""
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
    return join([*chunks[:at], *[chunks[at]] * random.choice((2, 3, 200, 7_000)), *chunks[at + 1 :]])


def swap(chunks: list[Chunk], at: int, random: Random) -> bytes:
    other = random.randrange(len(chunks))
    changed = list(chunks)
    changed[at], changed[other] = changed[other], changed[at]
    return join(changed)


def shuffle(chunks: list[Chunk], _: int, random: Random) -> bytes:
    """Shuffle the chunks after the header, without which decoders read nothing."""
    return join([*chunks[:1], *random.sample(chunks[1:], len(chunks) - 1)])


def resize(chunks: list[Chunk], at: int, random: Random) -> bytes:
    """Change a chunk's length to a valid or invalid one; longer data repeats."""
    name, old = chunks[at]
    size = random.choice((*SIZES, len(old) + 1, max(0, len(old) - 1)))
    return join([*chunks[:at], (name, ((old or b"\0") * (size // max(1, len(old)) + 1))[:size]), *chunks[at + 1 :]])


def palette(chunks: list[Chunk], _: int, random: Random) -> bytes:
    """Replace the image by one whose palette and transparency have lengths that may not match."""
    colours, alphas = (random.choice(COLOURS) for _ in range(2))
    tables = [(b"PLTE", random.randbytes(3 * colours)), (b"tRNS", random.randbytes(alphas))]
    if random.random() < 0.2:
        tables.reverse()
    header = (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 3, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress((b"\0" + random.randbytes(16)) * 16))
    others = [chunk for chunk in chunks if chunk[0] not in (b"IHDR", b"IDAT", b"PLTE", b"tRNS")]
    return join([header, *tables, pixels, *others])


def rename(chunks: list[Chunk], at: int, random: Random) -> bytes:
    return join([*chunks[:at], (random.choice(NAMES), chunks[at][1]), *chunks[at + 1 :]])


def lie(chunks: list[Chunk], at: int, random: Random) -> bytes:
    """Write a wrong length or a wrong CRC."""
    before, whole = join(chunks[:at]), join(chunks)
    start = len(before) if random.random() < 0.5 else len(before) + 8 + len(chunks[at][1])
    return whole[:start] + struct.pack(">I", random.choice((*SIDES, 13))) + whole[start + 4 :]
