"""Generate texts: sentences with intents, and Unicode that is difficult for tokenizers."""


def sentences() -> dict[str, bytes]:
    lines = (
        "where is my luggage", "tell me a joke", "what is the weather in paris tomorrow", "book a flight to berlin",
        "how many calories are in an apple", "set an alarm for six", "what is my balance", "please change the language",
    )  # fmt: skip
    return {line: line.encode() for line in lines}


def texts() -> dict[str, bytes]:
    found = {
        **{line: line for line in ("transfer ten dollars from savings to checking", "hello", "a")},
        "emoji": "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea" * 5,
        "right to left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
        "combining": "e" + "\u0301" * 200 + " Z" + "\u0335\u0488\u20dd" * 60,
        "control": "book\0a\x07flight\x1b[31m\x7f\x85\u2028\u2029",
        "a long word": "a" * 5000,
        "as long as is accepted": "word " * 2000,
        "one longer": "word " * 2000 + "x",
        "four bytes a character": "\U0001f600" * 10_000,
        "byte order mark": "\ufeffhello there",
        "not characters": "\ufffe\uffff\U0010ffff \ue000",
        "wide": "\uff54\uff52\uff41\uff4e\uff53\uff46\uff45\uff52 \u2126\ufb01",
        "blanks": " \u00a0\u2003\u3000\t\r\n",
        "zero width": "\u200b\u200c\u200d\u2060",
        "special tokens": "[CLS] [SEP] [PAD] [UNK] [MASK] ##s",
        "scripts": "\u4f60\u597d \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u1100\u1161\u11a8 \u0915\u094d\u0937",
        "expands": "\ufdfa" * 500,
    }
    encoded = {name: text.encode() for name, text in found.items()}
    return encoded | {"utf-16": "hello there".encode("utf-16"), "latin-1": "d\xe9j\xe0 vu".encode("latin-1")}
