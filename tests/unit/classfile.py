"""The strings that Java code really loads, read from class files without a JDK.

A `static final String` is only an entry of the constant pool and an attribute of a field until some method
pushes it, with `ldc` or `ldc_w`; javac copies it to each place of use. So the operands of those two
instructions are what the code uses, and a constant that is declared and never used is not among them.

Format: Java Virtual Machine Specification, chapters 4 (class files) and 6 (instructions).
"""

import struct
from collections.abc import Iterator

# Constant pool: tag -> bytes after the tag (4.4). Utf8 (1) has its own length; Long and Double take two slots.
_UTF8, _STRING = 1, 8
_WIDE = {5, 6}
_SIZES = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4, 19: 2, 20: 2}

_LDC, _LDC_W, _IINC, _TABLESWITCH, _LOOKUPSWITCH, _WIDE_PREFIX = 0x12, 0x13, 0x84, 0xAA, 0xAB, 0xC4
# Instructions with operands: opcode -> operand bytes (6.5). Absent opcodes below 0xCA have none.
_OPERANDS = {
    **dict.fromkeys([0x10, _LDC, *range(0x15, 0x1A), *range(0x36, 0x3B), 0xA9, 0xBC], 1),
    **dict.fromkeys([0x11, _LDC_W, 0x14, _IINC, *range(0x99, 0xA9), *range(0xB2, 0xB9)], 2),
    **dict.fromkeys([0xBB, 0xBD, 0xC0, 0xC1, 0xC6, 0xC7], 2),
    0xC5: 3,
    **dict.fromkeys([0xB9, 0xBA, 0xC8, 0xC9], 4),
}
_LAST_OPCODE = 0xC9


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def u1(self) -> int:
        return self.take(">B")

    def u2(self) -> int:
        return self.take(">H")

    def u4(self) -> int:
        return self.take(">I")

    def raw(self, length: int) -> bytes:
        chunk = self.data[self.at : self.at + length]
        if len(chunk) != length:
            raise ValueError("class file ends early")
        self.at += length
        return chunk


def loaded_strings(class_file: bytes) -> set[str]:
    """Every string that a method of this class pushes on the stack."""
    reader = _Reader(class_file)
    if reader.u4() != 0xCAFEBABE:
        raise ValueError("not a class file")
    reader.raw(4)  # version
    texts, strings = _constant_pool(reader)
    reader.raw(6)  # access flags, this class, super class
    reader.raw(2 * reader.u2())  # interfaces

    found = set()
    for member in ("field", "method"):
        for _ in range(reader.u2()):
            reader.raw(6)  # access flags, name, descriptor
            for _ in range(reader.u2()):
                name, body = texts[reader.u2()], reader.raw(reader.u4())
                if member == "method" and name == "Code":
                    code = _Reader(body)
                    code.raw(4)  # stack and locals
                    found |= {texts[strings[i]] for i in _loads(code.raw(code.u4())) if i in strings}
    return found


def _constant_pool(reader: _Reader) -> tuple[dict[int, str], dict[int, int]]:
    texts, strings = {}, {}
    count, index = reader.u2(), 1
    while index < count:
        tag = reader.u1()
        if tag == _UTF8:
            # Java's modified UTF-8 differs only in NUL and beyond the BMP, which no key contains.
            texts[index] = reader.raw(reader.u2()).decode("utf-8", errors="replace")
        elif tag == _STRING:
            strings[index] = reader.u2()
        elif tag in _SIZES:
            reader.raw(_SIZES[tag])
        else:
            raise ValueError(f"unknown constant pool tag {tag}")
        index += 2 if tag in _WIDE else 1
    return texts, strings


def _loads(code: bytes) -> Iterator[int]:
    """The constant pool indices that the bytecode loads."""
    at = 0
    while at < len(code):
        opcode = code[at]
        if opcode > _LAST_OPCODE:
            raise ValueError(f"unknown opcode {opcode:#x} at {at}")
        if opcode == _LDC:
            yield code[at + 1]
        elif opcode == _LDC_W:
            yield int.from_bytes(code[at + 1 : at + 3], "big")
        at += _length(code, at)


def _length(code: bytes, at: int) -> int:
    opcode = code[at]
    if opcode == _WIDE_PREFIX:
        return 6 if code[at + 1] == _IINC else 4
    if opcode in (_TABLESWITCH, _LOOKUPSWITCH):
        table = at + 1 + (-(at + 1) % 4)  # operands are aligned to the start of the method
        if opcode == _TABLESWITCH:
            low, high = struct.unpack_from(">ii", code, table + 4)
            return table + 12 + 4 * (high - low + 1) - at
        (pairs,) = struct.unpack_from(">i", code, table + 4)
        return table + 8 + 8 * pairs - at
    return 1 + _OPERANDS.get(opcode, 0)
