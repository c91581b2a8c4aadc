"""What people see of an answer: bars, a picture, JSON that fits on a page."""

import base64
import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

from bundle.samples import ranking

LONGEST = 200  # characters of a string in JSON that is shown
# the first bytes of a file, and the ending that its name needs for a browser
SUFFIXES = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"RIFF": ".wav",
    b"fLaC": ".flac",
    b"OggS": ".ogg",
    b"ID3": ".mp3",
}


def bars(answer: object) -> dict[str, float]:
    """Return the classes of an answer with their probabilities, scores or shares, best first; {} if it has none.

    Objects of one class are numbered: "RBC", "RBC (2)".
    """
    seen: Counter[str] = Counter()
    found = {}
    for entry in ranking(answer):
        seen[entry.label] += 1
        count = seen[entry.label]
        found[entry.label if count == 1 else f"{entry.label} ({count})"] = entry.probability
    return found


def shortened(value: Any) -> Any:
    """Return a JSON value in which long strings, such as files in base64, are cut."""
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}... ({len(value)} characters)"
    if isinstance(value, list):
        return [shortened(each) for each in value]
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    return value


def as_json(value: Any) -> str:
    return json.dumps(shortened(value), indent=2, ensure_ascii=False)


def message(text: str, failed: bool = False) -> str:
    """Return a line as HTML that screen readers read aloud when it changes."""
    role, name = ("alert", "failed") if failed else ("status", "done")
    return f'<p role="{role}" class="{name}">{html.escape(text)}</p>'


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def written_file(value: object, folder: Path, name: str) -> str | None:
    """Write a file that a request has as base64, so that the page can show it; return its path.

    Args:
        value: base64, perhaps in a data: URL; of anything else, and of "", the result is None.
        folder: for the file.
        name: of the file, without its ending.
    """
    if not isinstance(value, str) or not value:
        return None
    try:
        content = base64.b64decode(
            value.partition(";base64,")[2] if value.startswith("data:") else value, validate=True
        )
    except ValueError:
        return None
    suffix = next((ending for start, ending in SUFFIXES.items() if content.startswith(start)), "")
    if content[8:12] == b"WEBP":
        suffix = ".webp"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}{suffix}"
    file.write_bytes(content)
    return str(file)
