"""Make sample.json: a 7 drawn with two strokes, the word spoken by the eSpeak NG synthesiser, and a phrase.

It contains no font, no image and no recording of a data set.

    python -m models.avdigits.make_sample
"""

import base64
import io
import json
import shutil
import subprocess

import soundfile
from PIL import Image, ImageDraw

from models.avdigits.model import FOLDER

SIDE = 120
OVERSAMPLING = 4
PAPER, INK = (252, 251, 247), (28, 44, 120)
PEN = 0.06  # width
STROKE = ((0.27, 0.24), (0.71, 0.21), (0.62, 0.40), (0.53, 0.60), (0.47, 0.82))  # in the unit square; y points down
WORD, VOICE = "seven", "en-us"
PHRASE = "it is a sevn"


def draw() -> bytes:
    """Draw the digit: larger first, then reduced, for smooth edges."""
    side = SIDE * OVERSAMPLING
    image = Image.new("RGB", (side, side), PAPER)
    pen, points = ImageDraw.Draw(image), [(x * side, y * side) for x, y in STROKE]
    pen.line(points, INK, round(PEN * side), joint="curve")
    for point in points:
        pen.circle(point, PEN * side / 2, fill=INK)
    file = io.BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(file, "PNG", optimize=True)
    return file.getvalue()


def speak() -> bytes:
    """Return a FLAC file of the spoken word.

    Raises:
        SystemExit: the synthesiser is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed. Install it: apt-get install espeak-ng")
    speech = subprocess.run(["espeak-ng", "-v", VOICE, "--stdout", WORD], capture_output=True, check=True).stdout
    file = io.BytesIO()
    soundfile.write(file, *soundfile.read(io.BytesIO(speech)), format="FLAC")
    return file.getvalue()


def main() -> None:
    # data: URLs, because a client that sends the fields in another way, as over gRPC, then knows that they are files
    sample = {"image": data_url("image/png", draw()), "audio": data_url("audio/flac", speak()), "text": PHRASE}
    (FOLDER / "sample.json").write_text(json.dumps(sample) + "\n")


def data_url(content_type: str, content: bytes) -> str:
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    main()
