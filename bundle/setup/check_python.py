"""Reject a Python outside of the tested range, before anything is installed.

python bundle/setup/check_python.py     This file runs in every Python, so it uses nothing newer than Python 2.7.
"""

import sys

OLDEST, NEWEST = (3, 11), (3, 13)


def check(version):
    """Exit with one line if this version, such as (3, 10), is outside of the range."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        name = ".".join(map(str, version[:2]))
        sys.exit(
            "error: This is Python " + name + ", and the bundle is tested with Python 3.11 to 3.13. "
            "Remove .venv, if it was made with this one, and name another: make serve PYTHON=python3.12"
        )


if __name__ == "__main__":
    check(sys.version_info)
