"""Try a new archive in this process, before its folder is made."""

import io
from pathlib import Path

import numpy
import soundfile
from PIL import Image, ImageDraw

from bundle.build.dryrun import DryRun
from bundle.build.inspect_model import Report
from bundle.errors import BundleError, blaming
from bundle.samples import ranking

SHOWN = 5  # classes or detections in the report


def try_out(mar: Path, content: bytes, report: Report) -> str | None:
    """Send one input through the archive's handler, and report the answer.

    Returns:
        the label that ranks first in the answer; None if nothing was found.

    Raises:
        BundleError: the handler does not load the model, or the status is not 200.
    """
    # the inspection has run a batch, and has reported if the model takes none: the handler would log that again
    with (
        blaming(lambda exc: BundleError(f"The handler cannot load the model: {type(exc).__name__}.", str(exc))),
        DryRun(mar, batch_size=1) as dry_run,
    ):
        [(status, body)] = dry_run.predict([{"body": content}])
    if status != 200:
        message = body["message"] if isinstance(body, dict) else body
        raise BundleError(f"The handler answered {status} to the trial input: {message}")
    ranked = ranking(body)
    if isinstance(body, dict) and body.get("detections") == []:
        report("finds nothing in the trial input; a SAMPLE shows more")
    else:
        classes = ", ".join(f"{each.label} {each.probability:.2f}" for each in ranked[:SHOWN])
        report(f"answers the trial input: {classes or body}")
    return ranked[0].label if ranked else None


def picture() -> bytes:
    """Draw an image to try a model with, as a PNG file."""
    file = io.BytesIO()
    image = Image.new("RGB", (320, 240), (20, 30, 60))
    ImageDraw.Draw(image).ellipse((110, 40, 210, 200), outline=(240, 220, 180), width=24)
    image.save(file, "PNG")
    return file.getvalue()


def sound() -> bytes:
    """Make a second of sound, as a WAV file."""
    file = io.BytesIO()
    tone = 0.5 * numpy.sin(2 * numpy.pi * 440 / 16_000 * numpy.arange(16_000))
    soundfile.write(file, tone, 16_000, format="WAV")
    return file.getvalue()


def text() -> bytes:
    return b"A text to try the model with."
