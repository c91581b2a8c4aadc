"""Read what a pickle has in it, by its opcodes, without unpickling it: unpickling runs code."""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote before PyTorch 1.6, as a pickle of its own,
LEGACY_HEADERS = 3  # and how many pickles come before that of the object
LEGACY_TAG = "module"  # what stands there before a module, for its source code
MAX_OPCODES = 2_000_000  # of a pickle; the rest is not read
PLAIN_MODULES = ("collections", "builtins", "__builtin__", "copy_reg", "torch._utils", "torch._tensor", "torch")


@dataclass(frozen=True)
class Pickle:
    """What the opcodes of a pickle show.

    Attributes:
        is_dict: whether the object is a dict, and not an instance of another class.
        module: the class of the first torch.nn.Module in it; None if it has none.
        key: in a dict, the key of that module.
        classes: the names of all classes and functions, "module.name".
        strings: all strings, in order.
    """

    is_dict: bool
    module: str | None
    key: str | None
    classes: list[str]
    strings: list[str]


def read_pickle(stream: IO[bytes], tag: str | None = None) -> Pickle | None:
    """Read the opcodes of a pickle; None if they are not those of a pickle.

    Args:
        tag: a string before each torch.nn.Module that is no key.
    """
    classes: list[str] = []
    strings: list[str] = []
    outermost, module, key = None, None, None
    candidate: tuple[str, str | None] | None = None  # a class, and the string before it
    try:
        for name, value in opcodes(stream):
            if outermost is None and name != "string":
                outermost = value or "dict"
            if name == "class":
                classes.append(value)
                if value.rsplit(".", 1)[0] not in PLAIN_MODULES:
                    keys = strings[:-1] if strings[-1:] == [tag] else strings
                    candidate = (value, keys[-1] if keys else None)
            elif name == "string":
                strings.append(value)
                if value == "_parameters" and candidate and module is None:  # the first attributes of a torch.nn.Module
                    module, key = candidate
    except Exception:  # pickletools raises anything for bytes that are not a pickle
        return None
    return Pickle(outermost in ("dict", "collections.OrderedDict"), module, key, classes, strings)


def opcodes(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the classes ("class", "module.name"), strings ("string", value) and dicts ("dict", "") of a pickle."""
    recent: list[str] = []  # the strings on the stack, as far as a class's name needs them
    memo: dict[int, str] = {}
    last: str | None = None  # the string that the opcode before this one made
    argument: Any  # a number or a string, by opcode
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        made = None
        if opcode.name in ("GLOBAL", "INST"):
            yield "class", str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield "class", ".".join(recent[-2:])
        elif isinstance(argument, str) and "UNICODE" in opcode.name:
            made = argument
            yield "string", argument
        elif opcode.name == "MEMOIZE" or opcode.name.endswith("BINPUT"):
            memo[len(memo) if opcode.name == "MEMOIZE" else argument] = last or ""
        elif opcode.name.endswith("BINGET"):
            made = memo.get(argument) or None
        elif opcode.name in ("EMPTY_DICT", "DICT"):
            yield "dict", ""
        if made is not None:
            recent = [*recent[-1:], made]
        last = made
        if count > MAX_OPCODES:
            return


def legacy_pickle(stream: IO[bytes]) -> Pickle | None:
    """Read the object's pickle in a file that may begin with the headers of PyTorch before 1.6."""
    try:
        first = [argument for opcode, argument, _ in pickletools.genops(stream) if opcode.name == "LONG1"]
        if first == [LEGACY_MAGIC]:
            for _ in range(LEGACY_HEADERS - 1):
                list(pickletools.genops(stream))
        else:
            stream.seek(0)
    except Exception:  # as in `read_pickle`
        return None
    return read_pickle(stream, LEGACY_TAG if first == [LEGACY_MAGIC] else None)
