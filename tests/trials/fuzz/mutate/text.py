"""Mutate text, with valid Unicode and with invalid UTF-8."""

from random import Random

from tests.trials.fuzz.mutate import generic

PIECES = (
    "\0", "\x1b[2J", "\ufeff", "\u202e", "\u200d", "\u0301" * 50, "\U0001f468\u200d\U0001f469", "\ufdfa", "\u2028",
    "a" * 2000, " " * 2000, "\u3000", "\ufffd", "\U0010ffff", "\u0130\u0131\u1e9e", "%s%n", "../../etc/passwd",
    "<script>", "' OR 1=1 --", "${jndi:ldap://127.0.0.1/}", "NaN", "[MASK]", "##", "\u0e33", "\u1100\u1161",
)  # fmt: skip
BROKEN = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xfe\xff\0h")


def mutated(content: bytes, random: Random) -> bytes:
    text = content.decode("utf-8", "surrogateescape")
    at = random.randint(0, len(text))
    change = random.choice(("piece", "piece", "case", "shuffle", "repeat", "broken", "bytes"))
    if change == "piece":
        text = text[:at] + random.choice(PIECES) + text[at:]
    elif change == "case":
        text = random.choice((text.upper, text.title, text.swapcase))()
    elif change == "shuffle":
        words = text.split(" ")
        random.shuffle(words)
        text = random.choice((" ", "", "\n", "\u200b")).join(words)
    elif change == "repeat":
        text *= random.choice((2, 10, 100))
    elif change == "broken":
        encoded = text.encode("utf-8", "surrogateescape")
        return encoded[:at] + random.choice(BROKEN) + encoded[at:]
    else:
        return generic.mutated(content, [content], random)
    return text.encode("utf-8", "surrogateescape")
