"""Mutate bytes of any format."""

from random import Random

LONGEST_RUN = 4096
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutated(content: bytes, others: list[bytes], random: Random) -> bytes:
    change = random.choice((flip, number, cut, truncate, insert, repeat, splice))
    return change(content, others, random)


def place(content: bytes, random: Random) -> int:
    """Return the position of a change, usually near the beginning, where most of a format's structure is."""
    reach = random.choice((32, 512, len(content)))
    return random.randint(0, min(reach, len(content)))


def flip(content: bytes, _: list[bytes], random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 16))):
        if changed:
            changed[place(content, random) % len(changed)] ^= 1 << random.randrange(8)
    return bytes(changed)


def number(content: bytes, _: list[bytes], random: Random) -> bytes:
    """Overwrite 1, 2 or 4 bytes with a boundary value."""
    size = random.choice((1, 2, 4))
    value = random.choice(NUMBERS) % 256**size
    at = place(content, random)
    return content[:at] + value.to_bytes(size, random.choice(("big", "little"))) + content[at + size :]


def cut(content: bytes, _: list[bytes], random: Random) -> bytes:
    at = place(content, random)
    return content[:at] + content[at + random.randint(1, LONGEST_RUN) :]


def truncate(content: bytes, _: list[bytes], random: Random) -> bytes:
    return content[: place(content, random)]


def insert(content: bytes, _: list[bytes], random: Random) -> bytes:
    at = place(content, random)
    return content[:at] + random.randbytes(random.choice((1, 4, 64, LONGEST_RUN))) + content[at:]


def repeat(content: bytes, _: list[bytes], random: Random) -> bytes:
    """Repeat a block up to 64 times."""
    at = place(content, random)
    block = content[at : at + random.randint(1, LONGEST_RUN)]
    return content[:at] + block * random.choice((2, 3, 64)) + content[at + len(block) :]


def splice(content: bytes, others: list[bytes], random: Random) -> bytes:
    """Join the beginning of one file and the end of another."""
    other = random.choice(others) if others else content
    return content[: place(content, random)] + other[place(other, random) :]
