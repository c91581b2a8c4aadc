"""The sockets of TorchServe's workers, in the folder for temporary files."""

import os

from bundle.errors import BundleError
from bundle.server.space import temporary_folder

LONGEST = 107  # bytes of a socket's path that Linux accepts
SOCKET = "torchserve-01234567/.ts.sock.65535"  # the longest name of one, in the folder for temporary files


def check_temporary() -> None:
    """Check that the folder for temporary files can have the workers' sockets.

    Raises:
        BundleError: its path is too long, or none can be written.
    """
    folder = temporary_folder()
    longest = LONGEST - len(f"/{SOCKET}")
    if (length := len(os.fsencode(folder))) > longest:
        raise BundleError(
            f"The folder for temporary files, {folder}, has a path of {length} bytes. The sockets of the workers are "
            f"in it, and allow {longest}. Set TMPDIR to a folder with a shorter path, such as /tmp."
        )
