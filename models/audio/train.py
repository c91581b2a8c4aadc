"""Train the keyword spotter on Speech Commands (Warden 2018): ten words, silence, and any other word.

This reads `speech-commands-12.zip` (<class>/<speaker>_nohash_<n>.flac) in the data directory, and tests on some of its
speakers. If the file is missing, the full data set is downloaded with torchaudio.

    make train MODEL=audio
    python -m models.audio.train --data-dir data --epochs 80
"""

import io
import random
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from rich.progress import track
from torch import Tensor, nn
from torchaudio.datasets import SPEECHCOMMANDS
from torchaudio.functional import highpass_biquad, melscale_fbanks, resample

from models import command_line, data_sets, evaluation, training
from models.audio.model import CLASSES, FOLDER, SAMPLE_RATE, SAMPLES, KeywordNet
from models.weights import round_weights

RECIPE = training.Recipe(
    epochs=80, batch_size=64, learning_rate=0.1, weight_decay=5e-4, label_smoothing=0.1, warmup=0.2
)
WORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
LABELS = [*WORDS, "_silence_", "_unknown_"]
PADDED = SAMPLES * 3 // 2  # samples; longer than a clip, so that reverberation ends instead of wrapping around


def load(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load the split "train" or "test": float32 [N, 16000] in [-1, 1], and int64 [N]."""
    archive = data_dir / "speech-commands-12.zip"
    clips = archived_clips(archive, split) if archive.exists() else downloaded_clips(data_dir, split)
    waveforms, labels = zip(*clips, strict=True)
    return torch.stack(waveforms), torch.tensor([LABELS.index(label) for label in labels])


def read(file: str | Path | io.BytesIO) -> Tensor:
    """Read a recording of any length: float32 [T]."""
    return torch.from_numpy(soundfile.read(file, dtype="float32")[0])


def archived_clips(archive: Path, split: str) -> Iterator[tuple[Tensor, str]]:
    """Yield the clips of the split's speakers and their labels; of equal clips only the first."""
    seen = set()
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".flac"))
        for name in track(names, f"reading {split} clips"):
            waveform = read(io.BytesIO(files.read(name)))
            content = waveform.numpy().tobytes()
            label, clip = name.split("/")
            if content not in seen and held_out(clip) == (split == "test"):
                yield waveform, label
            seen.add(content)


def held_out(clip: str) -> bool:
    """Return whether the speaker is in the test split: a fifth, by hash. A clip of silence is its own speaker."""
    speaker = clip.split("_nohash_")[0].split("_")[-1]  # [<word>_]<speaker>_nohash_<n>.flac
    return zlib.crc32(speaker.encode()) % 5 == 0


def downloaded_clips(data_dir: Path, split: str) -> Iterator[tuple[Tensor, str]]:
    """Yield clips of the same twelve classes from the full data set, with its own list of test clips."""
    with data_sets.downloaded("Speech Commands", data_dir):
        dataset = SPEECHCOMMANDS(data_dir, download=True, subset={"train": "training", "test": "testing"}[split])
    metadata = [dataset.get_metadata(n) for n in range(len(dataset))]
    words = [(path, word) for path, _, word, *_ in metadata if word in WORDS]
    others = [(path, "_unknown_") for path, _, word, *_ in metadata if word not in WORDS]
    per_class = len(words) // len(WORDS)
    folder = data_dir / "SpeechCommands"
    for path, label in track(words + random.Random(0).sample(others, per_class), f"reading {split} clips"):
        waveform = read(folder / path)[:SAMPLES]
        yield nn.functional.pad(waveform, (0, SAMPLES - len(waveform))), label
    for noise in map(read, sorted(folder.glob("*/_background_noise_/*.wav"))):
        border = len(noise) * 4 // 5
        part = noise[:border] if split == "train" else noise[border:]
        for start in torch.linspace(0, len(part) - SAMPLES, per_class // 6).long():  # there are six recordings
            yield part[start : start + SAMPLES], "_silence_"


def rms(waveforms: Tensor) -> Tensor:
    """Return the root mean square, never zero: [N, T] -> [N, 1]."""
    return waveforms.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-5)


def uniform(rows: int, low: float, high: float) -> Tensor:
    """Draw float32 [rows, 1] from [low, high)."""
    return torch.empty(rows, 1).uniform_(low, high)


def some(rows: int, share: float) -> Tensor:
    """Draw bool [rows, 1], which is true with probability `share`."""
    return torch.rand(rows, 1) < share


def coloured_noise(rows: int) -> Tensor:
    """Make noise, float32 [rows, 16000], between white and brown: its power falls by 0 to 6 dB per octave."""
    spectrum = torch.fft.rfft(torch.randn(rows, SAMPLES))
    frequency = torch.arange(1, spectrum.shape[-1] + 1)
    return torch.fft.irfft(spectrum * frequency ** -uniform(rows, 0, 1), SAMPLES)


def warped(waveforms: Tensor, speed: Tensor | float = 1.0, delay: Tensor | float = 0.0) -> Tensor:
    """Resample [N, 16000]: `speed` times as fast and as high, and `delay` seconds later, each a number or [N, 1]."""
    n = len(waveforms)
    position = torch.linspace(-1, 1, SAMPLES) * speed - delay * 2 * SAMPLE_RATE / (SAMPLES - 1)
    grid = torch.stack([position.expand(n, -1), torch.zeros(n, SAMPLES)], dim=-1)
    return nn.functional.grid_sample(waveforms[:, None, None], grid[:, None], align_corners=True)[:, 0, 0]


def room(rows: int, decay: Tensor | float, level: Tensor | float) -> Tensor:
    """Make impulse responses of rooms, float32 [rows, 8000].

    Args:
        rows: the number of rooms.
        decay: seconds in which the echoes lose 60 dB, [rows, 1].
        level: amplitude of all echoes together, relative to the direct sound, [rows, 1].
    """
    time = torch.arange(PADDED - SAMPLES) / SAMPLE_RATE
    echoes = torch.randn(rows, len(time)) * 10 ** (-3 * time / decay)
    impulse = echoes / echoes.norm(dim=-1, keepdim=True) * level
    impulse[:, 0] = 1
    return impulse


def channels(rows: int) -> Tensor:
    """Make frequency responses of microphones, each in a room: complex64 [rows, PADDED // 2 + 1].

    The response of a microphone is uneven. Some lack a band, and some have the narrow range of a telephone.
    """
    frequency = torch.linspace(0, SAMPLE_RATE / 2, PADDED // 2 + 1)
    bands = melscale_fbanks(len(frequency), 20, SAMPLE_RATE / 2, 12, SAMPLE_RATE).T
    gains = torch.randn(rows, len(bands)) * 4  # dB
    gains.scatter_add_(1, torch.randint(len(bands), (rows, 1)), torch.where(some(rows, 0.3), -40.0, 0.0))
    low = torch.where(some(rows, 0.3), uniform(rows, 50, 400), -1000.0)
    high = torch.where(some(rows, 0.4), uniform(rows, 2800, 7500), 20000.0)
    limits = torch.sigmoid((frequency - low) / 50) * torch.sigmoid((high - frequency) / 50)
    rooms = room(rows, uniform(rows, 0.1, 0.7), torch.where(some(rows, 0.4), uniform(rows, 0.1, 1.0), 0.0))
    return 10 ** (gains @ bands / 20) * limits * torch.fft.rfft(rooms, PADDED)


def filtered(waveforms: Tensor, channel: Tensor) -> Tensor:
    """Apply frequency responses [N, PADDED // 2 + 1] to [N, 16000]."""
    return torch.fft.irfft(torch.fft.rfft(waveforms, PADDED) * channel, PADDED)[:, :SAMPLES]


class Augment(nn.Module):
    """Vary what differs between recordings: timing, tempo and pitch, microphone, room, noise, clipping, level.

    It is a module, so that its noises and responses are moved to the device with the model.

    Args:
        noises: float32 [M, 16000], recordings without speech, to add as noise.
    """

    noises: Tensor
    channels: Tensor

    def __init__(self, noises: Tensor):
        super().__init__()
        noises = torch.cat([noises, coloured_noise(len(noises))])
        self.register_buffer("noises", noises / rms(noises), persistent=False)
        drawn = torch.cat([channels(100) for _ in range(8)])
        # as pairs of real numbers, because not every backend of torch.distributed can send complex ones
        self.register_buffer("channels", torch.view_as_real(drawn), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Augment clips, float32 [N, 16000] -> float32 [N, 16000], in [-1, 1]."""
        with waveforms.device:
            for step in (self.shifted, self.recorded, self.erased, self.noisy, self.digitised):
                waveforms = step(waveforms)
            return waveforms

    def shifted(self, waveforms: Tensor) -> Tensor:
        """Shift clips by up to 150 ms, and play some at 0.85 to 1.15 times the speed."""
        n = len(waveforms)
        speed = torch.where(some(n, 0.7), uniform(n, 0.85, 1.15), 1.0)
        return warped(waveforms, speed, uniform(n, -0.15, 0.15))

    def recorded(self, waveforms: Tensor) -> Tensor:
        """Record clips through another microphone in another room."""
        chosen = self.channels[torch.randint(len(self.channels), (len(waveforms),))]
        return filtered(waveforms, torch.view_as_complex(chosen))

    def erased(self, waveforms: Tensor) -> Tensor:
        """Erase up to 120 ms of some clips."""
        n = len(waveforms)
        start = uniform(n, 0, SAMPLES)
        length = torch.where(some(n, 0.3), uniform(n, 0, 0.12) * SAMPLE_RATE, 0.0)
        time = torch.arange(SAMPLES)
        return waveforms * ((time < start) | (time > start + length))

    def noisy(self, waveforms: Tensor) -> Tensor:
        """Add noise to some clips, at a signal-to-noise ratio of 0 to 30 dB."""
        n = len(waveforms)
        noise = self.noises[torch.randint(len(self.noises), (n,))]
        ratio = torch.where(some(n, 0.7), 10 ** (-uniform(n, 0, 30) / 20), 0.0)
        return waveforms + noise * ratio * rms(waveforms)

    def digitised(self, waveforms: Tensor) -> Tensor:
        """Change the level, clip some, and round to 16 bits."""
        n = len(waveforms)
        peak = waveforms.abs().amax(-1, keepdim=True)
        limit = peak * torch.where(some(n, 0.2), uniform(n, 0.1, 0.6), 1.0)
        level = 10 ** (uniform(n, -40, 6) / 20)
        return (waveforms.clamp(-limit, limit) * level * 32768).round().clamp(-32768, 32767) / 32768


def conditions(waveforms: Tensor) -> dict[str, Tensor]:
    """Return the test clips (float32 [N, 16000]) as under other recording conditions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        white = torch.randn(waveforms.shape)
        hall = torch.fft.rfft(room(1, decay=0.5, level=0.7), PADDED)
    return {
        "noise_10_db": waveforms + white * rms(waveforms) * 10 ** (-10 / 20),
        "gain_-20_db": (waveforms * 0.1 * 32768).round() / 32768,
        "telephone": highpass_biquad(resample(resample(waveforms, 16, 8), 8, 16), SAMPLE_RATE, 300),
        "room": filtered(waveforms, hall),
        "late_100_ms": warped(waveforms, delay=0.1),
        "slow_0.9": warped(waveforms, speed=0.9),
        "fast_1.1": warped(waveforms, speed=1.1),
        "clipped": torch.minimum(torch.maximum(waveforms, -2 * rms(waveforms)), 2 * rms(waveforms)),
    }


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER)
    recipe = replace(RECIPE, epochs=options.epochs)
    waveforms, targets = load(options.data_dir, "train")
    test_waveforms, test_targets = load(options.data_dir, "test")

    augment = Augment(waveforms[targets == LABELS.index("_silence_")])
    classifier = training.Classifier(KeywordNet(), recipe, augment)
    batches = training.Batches(waveforms, targets, batch_size=recipe.batch_size, shuffle=True)
    seconds = training.fit(options, training.Stage(classifier, batches))

    model = round_weights(classifier.model.cpu())
    report = {
        "model": "audio",
        "data": {"name": "Speech Commands v0.02", "train": len(waveforms), "test": len(test_waveforms)},
        **evaluation.measure(model, (test_waveforms, test_targets), conditions(test_waveforms), CLASSES),
    }
    training.save(options, model, LABELS, recipe, seconds, report)


if __name__ == "__main__":
    main()
