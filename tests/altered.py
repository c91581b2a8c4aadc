"""Archives that were changed after the build, or that are not signed with the trusted key."""

from pathlib import Path

import pytest

from bundle import mar
from bundle.signing import UNSEALED, make_keys, seal
from tests.support import reversioned


def one_bit(archive: Path, target: Path) -> Path:
    weights = bytearray(mar.read(archive, "model.pt"))
    weights[len(weights) // 2] ^= 1
    return mar.rewrite(archive, target, {"model.pt": bytes(weights)})


def leaves_a_mark(mark: Path) -> bytes:
    """Return a handler that writes the file `mark` when it runs."""
    return f"open({str(mark)!r}, 'w')\ndef handle(data, context):\n    return ['ran'] * len(data or ())\n".encode()


def another_handler(archive: Path, target: Path) -> Path:
    return mar.rewrite(archive, target, {"mnist.py": leaves_a_mark(target.with_name("mark"))})


def another_file(archive: Path, target: Path) -> Path:
    return mar.rewrite(archive, target, {"sitecustomize.py": leaves_a_mark(target.with_name("mark"))})


def unsigned(archive: Path, target: Path) -> Path:
    return reversioned(archive, "1.0", target)


def without_manifest(archive: Path, target: Path) -> Path:
    return mar.rewrite(archive, target, UNSEALED)


def signed_by_another(archive: Path, target: Path) -> Path:
    make_keys(target.with_name("another.key"))
    seal(without_manifest(archive, target), target.with_name("another.key"))
    return target


REFUSED = {
    one_bit: "'model.pt' was changed",
    another_handler: "'mnist.py' was changed",
    another_file: "'sitecustomize.py' was added",
    unsigned: "it is not signed (it has no MAR-INF/SHA256SUMS.sig), and TRUSTED_KEY requires a signature",
    without_manifest: "it is not signed (it has no MAR-INF/SHA256SUMS), and TRUSTED_KEY requires a signature",
    signed_by_another: "its signature was not made with the key of",
}
every_refusal = pytest.mark.parametrize("wrong", REFUSED, ids=lambda wrong: wrong.__name__)
