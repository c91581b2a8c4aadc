"""Decode texts, and check their limits."""

import codecs
import json
from encodings import normalize_encoding
from encodings.aliases import aliases
from typing import Any

from pydantic import BaseModel

from handlers.core.errors import EmptyInput, TextTooLong, UndecodableText, UnsupportedEncoding
from handlers.core.settings import PositiveInt
from handlers.core.signatures import describe_format

# Python's names of the charsets that browsers know. Its other codecs are not charsets, and the time that one of them
# (punycode) takes grows with the square of the length.
CHARSETS = frozenset(
    [
        "ascii",
        "latin_1",
        "utf_8",
        "utf_8_sig",
        *(f"utf_{bits}{order}" for bits in (16, 32) for order in ("", "_be", "_le")),
    ]
    + ["big5", "big5hkscs", "gb18030", "gb2312", "gbk", "johab", "euc_jp", "euc_kr", "iso2022_jp", "shift_jis"]
    + ["koi8_r", "koi8_u", "mac_cyrillic", "mac_roman", "tis_620", *(f"iso8859_{part}" for part in range(2, 17))]
    + [f"cp{page}" for page in (866, 874, 932, 949, *range(1250, 1259))]
)
OTHER_NAMES = {"windows_31j": "cp932", "windows_874": "cp874", "x_mac_cyrillic": "mac_cyrillic", "x_sjis": "shift_jis"}
# UTF-32 first: its mark begins with that of UTF-16
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
MARKS |= {codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}
HINT = "Encode it as UTF-8, or send it as the body, with a header like Content-Type: text/plain; charset=iso-8859-1."


class TextLimits(BaseModel):
    max_characters: PositiveInt = 10_000  # longer texts are rejected


def read_text(value: bytes | str) -> str:
    r"""Return a text as a str that can be encoded, without a byte order mark.

    Bytes are UTF-8, unless they begin with the byte order mark of UTF-16 or UTF-32.

    Raises:
        UndecodableText: the bytes are not UTF-8; or the text has lone surrogates, which JSON can contain as \ud800, or
            NUL characters.
    """
    try:
        if isinstance(value, bytes):
            text = value.decode(next((charset for mark, charset in MARKS.items() if value.startswith(mark)), "utf-8"))
        else:
            value.encode()
            text = value.removeprefix("\ufeff")
    except UnicodeError as exc:
        found = describe_format(value) if isinstance(value, bytes) else ""
        raise UndecodableText(f"The text is not valid UTF-8.{found or ' ' + HINT}") from exc
    if "\0" in text:
        raise UndecodableText(f"The text contains NUL characters, as UTF-16 read as UTF-8 does. {HINT}")
    return text


def in_charset(body: object, charset: str) -> Any:
    """Decode a body in the charset of its Content-Type. JSON that TorchServe has parsed is returned unchanged.

    Args:
        body: bytes, or a str that TorchServe decoded as UTF-8, whatever the charset is.
        charset: as the client wrote it, in lower case; "" for none, "binary" for an unknown one.

    Raises:
        UnsupportedEncoding: the charset is unknown.
        UndecodableText: the bytes are not in this charset.
    """
    if charset in ("", "binary") or not isinstance(body, (bytes, bytearray, str)):
        return body
    # not codecs.lookup, which keeps every name that it does not find
    name = normalize_encoding(charset)
    codec = aliases.get(name) or OTHER_NAMES.get(name, name)
    if codec not in CHARSETS:
        raise UnsupportedEncoding(f"The charset {json.dumps(charset[:40])} is not supported. Encode the text as UTF-8.")
    if codec in ("utf_8", "utf_8_sig"):
        return body
    content = body.encode() if isinstance(body, str) else body
    try:
        return content.decode(codec)
    except UnicodeError as exc:
        raise UndecodableText(f"The text is not valid {charset}, the charset of its Content-Type. {HINT}") from exc


def check_text(text: str, limits: TextLimits) -> None:
    """Check that a text is neither too long nor blank.

    Raises:
        TextTooLong: it has more than `max_characters` characters.
        EmptyInput: it has only white space.
    """
    if len(text) > limits.max_characters:
        raise TextTooLong(f"The text is too long; at most {limits.max_characters} characters are accepted.")
    if not text.strip():
        raise EmptyInput("The text is empty. Send at least one word.")
