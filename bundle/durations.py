"""Durations as people write them: 100ms, 0.5s, 90s, 5m, 1h30m.

This module imports nothing else of the bundle: the image of the load generator has it, too.
"""

import re

UNITS = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}  # the longest first, as they are written
PART = r"(\d+(?:\.\d+)?|\.\d+) ?(ms|h|m|s)"


def seconds(text: str) -> float:
    """Return the seconds of a duration.

    Raises:
        ValueError: a number has no unit, the units are not in order, or the duration is 0.
    """
    text = text.strip()
    parts = re.findall(PART, text) if re.fullmatch(f"(?:{PART} ?)+", text) else []
    units = [unit for _, unit in parts]
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if parts and not total:
        raise ValueError(f"{text!r} is too short: a duration must be more than 0, such as 100ms.")
    if not parts or units != [unit for unit in UNITS if unit in units]:
        raise ValueError(f"{text!r} is not a duration. Write numbers with units: 100ms, 0.5s, 90s, 5m, 1h30m.")
    return total
