"""Mutate RIFF files (WAV, WebP): chunks of name, length and data, padded to an even length."""

import struct
from random import Random

from tests.trials.fuzz.mutate import generic

SIZES = (0, 1, 2, 15, 16, 18, 40, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
# fields of a WAV's fmt chunk: offset, struct format, values
FORMAT = (
    (0, "<H", (0, 1, 2, 3, 6, 7, 17, 0x31, 0x55, 0xFFFE, 0xFFFF)),  # format
    (2, "<H", (0, 1, 2, 8, 255, 1024, 65_535)),  # channels
    (4, "<I", (0, 1, 999, 1_000, 16_000, 384_000, 384_001, 2**31, 2**32 - 1)),  # sample rate
    (8, "<I", (0, 1, 2**32 - 1)),  # bytes a second
    (12, "<H", (0, 1, 2, 65_535)),  # bytes a frame
    (14, "<H", (0, 1, 4, 8, 12, 24, 32, 64, 255)),  # bits a sample
)

Chunk = tuple[bytes, int, bytes]  # name, declared length, data


def split(content: bytes) -> list[Chunk]:
    chunks, at = [], 12
    while at + 8 <= len(content):
        name, length = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        chunks.append((name, length, content[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return chunks


def join(head: bytes, chunks: list[Chunk]) -> bytes:
    body = b"".join(name + struct.pack("<I", length) + data + b"\0" * (len(data) % 2) for name, length, data in chunks)
    return head[:4] + struct.pack("<I", (len(body) + 4) % 2**32) + head[8:12] + body


def mutated(content: bytes, random: Random) -> bytes:
    head, chunks = content[:12], split(content)
    if not chunks:
        return generic.mutated(content, [], random)
    at = random.randrange(len(chunks))
    name, length, data = chunks[at]
    change = random.choice(("fields", "fields", "length", "data", "remove", "duplicate", "move", "whole"))
    if change == "fields":
        at = next((index for index, chunk in enumerate(chunks) if chunk[0] == b"fmt "), at)
        name, length, data = chunks[at]
        offset, pack, values = random.choice(FORMAT)
        value = struct.pack(pack, random.choice(values))
        chunks[at] = (name, length, data[:offset] + value + data[offset + len(value) :])
    elif change == "length":
        chunks[at] = (name, random.choice((*SIZES, min(length + 1, SIZES[-1]), max(0, length - 1))), data)
    elif change == "data":
        changed = generic.mutated(data, [data], random)
        chunks[at] = (name, len(changed), changed)
    elif change == "remove":
        del chunks[at]
    elif change == "duplicate":
        chunks[at:at] = [chunks[at]] * random.choice((1, 2, 100))
    elif change == "move":
        chunks.insert(random.randrange(len(chunks)), chunks.pop(at))
    joined = join(head, chunks)
    if change == "whole":
        joined = joined[:4] + struct.pack("<I", random.choice(SIZES)) + joined[8:]
    return joined
