"""Try an archive on its folder's own sample in this process, before a running server is stopped for it."""

import json
from pathlib import Path

from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder
from bundle.errors import BundleError, blaming
from bundle.samples import headers
from bundle.server.client import judge

UNTOUCHED = "The running server is untouched. To start anew all the same: make stop, then make serve."


def try_own_sample(archive: Path, folder: ModelFolder) -> None:
    """Load the archive as a worker does, and send it the folder's sample, if it has one.

    Raises:
        BundleError: the handler does not load the model, or the answer is an error, or not what the folder expects.
    """
    if folder.bundle.sample is None:
        return
    sample = folder.existing(folder.bundle.sample)
    sent, content = headers(sample), sample.read_bytes()
    with blaming(lambda exc: BundleError(f"{folder.name} does not load: {type(exc).__name__}: {exc} {UNTOUCHED}")):
        row = {"body": json.loads(content) if sent else content}
        with DryRun(archive) as dry_run:
            [(status, body)] = dry_run.predict([row], [sent])
    try:
        judge(folder, status, body)
    except BundleError as exc:
        raise BundleError(f"{exc} {UNTOUCHED}", exc.details) from exc
