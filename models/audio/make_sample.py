"""Make sample.wav: a word spoken by the eSpeak NG synthesiser, so that the repository has no recording of a person.

python -m models.audio.make_sample
"""

import io
import shutil
import subprocess

import soundfile
import torch
from torch import nn
from torchaudio.functional import resample

from models.audio.model import FOLDER, SAMPLE_RATE, SAMPLES

WORD = "yes"
VOICE = "en-us"


def main() -> None:
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed. Install it: apt-get install espeak-ng")
    speech = subprocess.run(["espeak-ng", "-v", VOICE, "--stdout", WORD], capture_output=True, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(speech), dtype="float32")
    waveform = resample(torch.from_numpy(samples), rate, SAMPLE_RATE)
    before = (SAMPLES - len(waveform)) // 2
    waveform = nn.functional.pad(waveform, (before, SAMPLES - len(waveform) - before))
    soundfile.write(FOLDER / "sample.wav", waveform.numpy(), SAMPLE_RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
