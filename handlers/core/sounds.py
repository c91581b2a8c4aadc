"""Decode the bytes of a sound file into a mono waveform. The length is checked before a sample is decoded."""

import io
import struct
from typing import Annotated

import numpy
import soundfile
import soxr
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from handlers.core.errors import AudioTooLong, EmptyInput, UndecodableAudio
from handlers.core.settings import PositiveInt
from handlers.core.signatures import describe_format
from handlers.core.sound_repair import repaired

PLAIN_WAV = struct.Struct("<4sI4s4sIHHIIHH4sI")  # of a file with the chunks `fmt ` and `data`, and no other
READABLE = ("a WAV sound", "a FLAC sound", "an Ogg file", "an MP3 sound")  # signatures.py


class SoundLimits(BaseModel):
    max_seconds: Annotated[float, Field(gt=0)] = 60.0  # longer clips are rejected
    min_sample_rate: PositiveInt = 1_000  # Hz, of the input
    max_sample_rate: PositiveInt = 384_000
    max_values: PositiveInt = 32_000_000  # samples x channels; a small file may decompress to very many


class SoundWindow(SoundLimits):
    sample_rate: PositiveInt = 16_000  # Hz, of the model
    window_seconds: Annotated[float, Field(gt=0)] = 1.0  # of the model

    @property
    def window(self) -> int:
        """The length of the model's window, in samples."""
        return round(self.window_seconds * self.sample_rate)


class SoundBytes(io.BytesIO):
    """A file in memory that ignores invalid seeks.

    libsndfile seeks before the start of some broken files, and soundfile prints a traceback for every failed seek.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def read_sound(content: bytes, limits: SoundLimits) -> tuple[numpy.ndarray, int]:
    """Decode a sound file.

    Returns:
        mono float32 [samples] in [-1, 1], and the sample rate in Hz.

    Raises:
        UndecodableAudio: libsndfile cannot read the file, its sample rate is outside the limits, or a sample is NaN
            or infinite.
        AudioTooLong: the clip is longer than `max_seconds`, or has more than `max_values` samples.
        EmptyInput: the file has no samples.
    """
    samples, sample_rate = read_plain_wav(content, limits) or read_any(repaired(content), limits)
    if not len(samples):
        raise EmptyInput("The sound file has no samples. Send a recording.")
    with numpy.errstate(over="ignore", invalid="ignore"):  # a channel, or the sum of channels, may not be finite
        mono = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if not numpy.isfinite(mono).all():
        raise UndecodableAudio("The sound file has samples that are not finite numbers.")
    return mono.clip(-1, 1), sample_rate


def read_any(content: bytes, limits: SoundLimits) -> tuple[numpy.ndarray, int]:
    """Decode a sound file with libsndfile: float32 [frames, channels], and the sample rate in Hz."""
    try:
        with soundfile.SoundFile(SoundBytes(content)) as file:
            check_limits(file.samplerate, file.frames, file.channels, limits)
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as exc:
        found = describe_format(content, READABLE)
        raise UndecodableAudio(
            f"The input is not a readable sound file.{found} Accepted: WAV, FLAC, OGG, MP3."
        ) from exc


def read_plain_wav(content: bytes, limits: SoundLimits) -> tuple[numpy.ndarray, int] | None:
    """Decode 16-bit PCM after a header of 44 bytes, in which all sizes are right: the WAV file of most recorders.

    libsndfile calls Python for each piece that it reads, and takes ten times as long. Returns the same as `read_any`;
    None for any other file.
    """
    if len(content) <= PLAIN_WAV.size:
        return None
    riff, rest, wave, fmt, size, pcm, channels, sample_rate, _, frame, bits, data, length = PLAIN_WAV.unpack_from(
        content
    )
    names = (riff, wave, fmt, data) == (b"RIFF", b"WAVE", b"fmt ", b"data")
    sizes = (rest, length) == (len(content) - 8, len(content) - PLAIN_WAV.size)
    layout = (size, pcm, bits) == (16, 1, 16) and channels in (1, 2) and frame == 2 * channels and not length % frame
    if not (names and sizes and layout):
        return None
    check_limits(sample_rate, length // frame, channels, limits)
    samples = numpy.frombuffer(content, "<i2", offset=PLAIN_WAV.size).reshape(-1, channels)
    return samples / numpy.float32(1 << 15), sample_rate


def check_limits(sample_rate: int, frames: int, channels: int, limits: SoundLimits) -> None:
    """Raise the errors of `read_sound` for a sound that is outside the limits."""
    if not limits.min_sample_rate <= sample_rate <= limits.max_sample_rate:
        raise UndecodableAudio(
            f"The sample rate is {sample_rate} Hz; "
            f"{limits.min_sample_rate} to {limits.max_sample_rate} Hz are accepted."
        )
    if frames > int(limits.max_seconds * sample_rate) or frames * channels > limits.max_values:
        raise AudioTooLong(
            f"The clip is too long; at most {limits.max_seconds:g} seconds "
            f"and {limits.max_values} samples over all channels are accepted."
        )


def resample(waveform: numpy.ndarray, sample_rate: int, target: int) -> numpy.ndarray:
    """Resample a mono waveform, float32 [samples], to the target rate in Hz.

    Raises:
        EmptyInput: the result has no samples, because the waveform is shorter than one at the target rate.
    """
    if sample_rate == target:
        return waveform
    resampled = soxr.resample(waveform, sample_rate, target)
    if not len(resampled):
        raise EmptyInput("The sound is shorter than one sample at the model's rate. Send a longer recording.")
    return resampled


def loudest_window(waveform: numpy.ndarray, window: int) -> tuple[numpy.ndarray, int]:
    """Cut or pad a waveform to the model's window: float32 [samples] -> float32 [window].

    Shorter clips are padded with silence on both sides. Of a longer clip, the loudest window is returned. The loudness
    of a window is its power, weighted by a Hann window, so that a short word is in the middle of the result.

    Returns:
        the window, and the sample of the waveform at which it starts, which is negative if it was padded.
    """
    missing = window - len(waveform)
    if missing == 0:
        return waveform, 0
    if missing > 0:
        return numpy.pad(waveform, (missing // 2, missing - missing // 2)), -(missing // 2)
    hop = max(1, window // 100)
    blocks = len(waveform) // hop
    power = numpy.square(waveform[: blocks * hop]).reshape(blocks, hop).sum(axis=1)
    loudness = numpy.convolve(power, numpy.hanning(window // hop), mode="valid")
    start = min(int(loudness.argmax()) * hop, len(waveform) - window)
    return waveform[start : start + window].copy(), start


def read_window(content: bytes, settings: SoundWindow) -> tuple[Tensor, float]:
    """Decode a sound file into the model's window, as `loudest_window` chooses it.

    Returns:
        mono float32 [window], and where it starts in the clip, in seconds; negative if the clip was padded.

    Raises:
        UndecodableAudio, AudioTooLong, EmptyInput: as `read_sound` and `resample`.
    """
    waveform = resample(*read_sound(content, settings), settings.sample_rate)
    waveform = waveform - waveform.mean()  # a constant offset of the microphone is not sound
    samples, start = loudest_window(waveform, settings.window)
    return torch.from_numpy(samples), start / settings.sample_rate
