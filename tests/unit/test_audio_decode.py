"""Decoding of sound files to the window that the model takes. The sounds are generated tone bursts."""

import struct
import time

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.audio_mfcc import AudioMFCCHandler
from handlers.core.errors import AudioTooLong, EmptyInput, RequestError, UndecodableAudio
from handlers.core.sounds import SoundLimits, loudest_window, read_any, read_plain_wav
from tests.unit.inputs import damaged, decoded, encode_sound, tone_burst

RATE = 16_000
BURST = tone_burst(RATE)


def handler(**options: object) -> AudioMFCCHandler:
    handler = AudioMFCCHandler()
    handler.settings = handler.Settings(**options)
    return handler


def decode(content: bytes | str, **options: object) -> numpy.ndarray:
    sample = decoded(handler(**options), content)
    assert (sample.shape, sample.dtype) == (handler(**options).example().tensors.shape, torch.float32)
    assert abs(sample).max() <= 1.05  # resampling may overshoot full scale a little
    return sample.numpy()


def error(waveform: numpy.ndarray, other: numpy.ndarray, delay: int = 0) -> float:
    """Root mean square of the difference over that of `other`, at the best shift by at most `delay` samples."""
    shifted = [numpy.roll(waveform, shift) for shift in range(-delay, delay + 1)]
    return float(min(numpy.linalg.norm(one - other) for one in shifted) / numpy.linalg.norm(other))


# --- accepted sounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.03),
        ("WAV", "PCM_16", 1e-3),
        ("WAV", "PCM_24", 1e-5),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 1e-6),
        ("WAV", "DOUBLE", 1e-6),
        ("WAV", "ULAW", 0.05),
        ("FLAC", "PCM_16", 1e-3),
        ("FLAC", "PCM_24", 1e-5),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", None, 0.1),
        ("AIFF", None, 1e-3),
    ],
)
def test_decode_each_format_returns_the_sound(format: str, subtype: str | None, tolerance: float):
    assert error(decode(encode_sound(BURST, RATE, format, subtype)), BURST) < tolerance


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_decode_any_rate_and_channels_returns_the_sound(rate: int, channels: int):
    samples = numpy.repeat(tone_burst(rate)[:, None], channels, axis=1)
    assert error(decode(encode_sound(samples, rate)), BURST) < 0.01


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_decode_mp3_of_any_rate_returns_the_sound(rate: int):
    assert error(decode(encode_sound(tone_burst(rate), rate, "MP3")), BURST, delay=20) < 0.1


def test_decode_sound_shorter_than_one_sample_is_rejected():
    with pytest.raises(EmptyInput, match="shorter than one sample"):
        decode(encode_sound(numpy.ones(5, dtype=numpy.float32), 384_000))


def test_decode_channels_are_averaged():
    stereo = numpy.stack([BURST, numpy.zeros_like(BURST)], axis=1)
    assert error(decode(encode_sound(stereo, RATE, subtype="FLOAT")), BURST / 2) < 1e-6


def test_decode_frequency_above_the_models_range_is_filtered_out():
    """10 kHz cannot be in 16,000 samples a second; without a filter it would appear as 6 kHz."""
    assert abs(decode(encode_sound(tone_burst(48_000, hertz=10_000), 48_000))).max() < 0.005


def test_decode_floats_above_full_scale_are_clipped():
    assert abs(decode(encode_sound(BURST * 100, subtype="FLOAT"))).max() == 1


@given(channels=st.integers(1, 2), content=st.binary(min_size=4, max_size=400), rate=st.sampled_from([1, 8_000, RATE]))
def test_plain_wav_has_the_samples_that_libsndfile_returns(channels: int, content: bytes, rate: int):
    samples = numpy.frombuffer(content[: len(content) // 4 * 4], "<i2").reshape(-1, channels)
    file = encode_sound(samples, rate, subtype="PCM_16")
    limits = SoundLimits(min_sample_rate=1)
    assert (plain := read_plain_wav(file, limits))
    expected, expected_rate = read_any(file, limits)
    assert (plain[0].dtype, plain[0].tolist(), plain[1]) == (numpy.float32, expected.tolist(), expected_rate)


@given(damaged({"mono": encode_sound(BURST[:200], RATE), "stereo": encode_sound(BURST[:200].reshape(100, 2), RATE)}))
@settings(max_examples=300)
def test_plain_wav_with_damage_is_left_to_libsndfile_or_has_its_samples(content: bytes):
    answers = []
    for read in (read_plain_wav, read_any):
        try:
            answers.append(read(content, SoundLimits(min_sample_rate=1, max_sample_rate=1 << 32)))
        except RequestError as exc:
            answers.append(type(exc))
    plain, expected = answers
    if isinstance(plain, tuple):
        assert (plain[0].tolist(), plain[1]) == (expected[0].tolist(), expected[1])
    else:
        assert plain in (None, expected)


# --- sounds that players play, and libsndfile rejects ---------------------------------------------------------------


def wav_claiming(frames: int, channels: int = 1, rate: int = RATE) -> bytes:
    """Return a WAV header that declares 16-bit samples, without the samples."""
    size = 2 * frames * channels
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, 2 * rate * channels, 2 * channels, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + layout + struct.pack("<4sI", b"data", size)


FILES = {format: encode_sound(BURST, RATE, format) for format in ("MP3", "FLAC", "OGG", "WAV", "AIFF")}
ALL_RATES = [8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000]


def id3(length: int, version: int = 3) -> bytes:
    return b"ID3" + bytes([version, 0, 0, *(length >> shift & 127 for shift in (21, 14, 7, 0))]) + b"\1" * length


def ape(length: int) -> bytes:
    """Return an APEv2 tag of this many bytes after its header."""
    return b"APETAGEX" + struct.pack("<IIII", 2000, length, 0, 0xA000_0000) + bytes(8) + b"\1" * length


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(id3(1000), id="id3"),
        pytest.param(id3(200_000, version=4), id="id3-with-a-cover"),
        pytest.param(id3(1000) + bytes(2000), id="id3-then-zeros"),
        pytest.param(id3(100) + id3(100, version=2), id="two-id3"),
        pytest.param(ape(500), id="ape"),
        pytest.param(bytes(1000), id="zeros"),
        pytest.param(b"\r\n", id="line-break"),
    ],
)
def test_decode_sound_behind_tags_or_padding_returns_the_sound(format: str, before: bytes):
    assert numpy.array_equal(decode(before + FILES[format]), decode(FILES[format]))


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("after", [id3(100), ape(100), b"TAG" + bytes(125), bytes(5000), b"junk" * 100])
def test_decode_sound_before_tags_or_padding_returns_the_sound(format: str, after: bytes):
    assert numpy.array_equal(decode(FILES[format] + after), decode(FILES[format]))


@pytest.mark.parametrize("rate", ALL_RATES)
@pytest.mark.parametrize("before", [b"HTTP/1.1 200 OK\r\n\r\n", b"junk \xff\xfb junk \xff\xf3" * 20])
def test_decode_mp3_behind_anything_returns_the_sound(rate: int, before: bytes):
    file = encode_sound(tone_burst(rate), rate, "MP3")
    assert numpy.array_equal(decode(before + file), decode(file))


def streamed(file: bytes, riff: int, data: int) -> bytes:
    """Return a WAV file with these sizes in its header."""
    at = file.index(b"data") + 4
    return file[:4] + struct.pack("<I", riff) + file[8:at] + struct.pack("<I", data) + file[at + 4 :]


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "ULAW"])
@pytest.mark.parametrize("riff", [0, 36, 0x7FFF_FFFF, 0xFFFF_FFFF])
@pytest.mark.parametrize("data", [0, 0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF])
def test_decode_wav_that_was_written_into_a_pipe_returns_the_sound(subtype: str, riff: int, data: int):
    file = encode_sound(BURST, RATE, subtype=subtype)
    assert numpy.array_equal(decode(streamed(file, riff, data)), decode(file))


def test_decode_wav_that_has_chunks_instead_of_samples_is_rejected_as_empty():
    file = wav_claiming(0) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    with pytest.raises(EmptyInput, match="no samples"):
        decode(file)


@pytest.mark.parametrize(
    "content",
    [b"ID3\3\0\0\0\0\0\0" * 1_600_000, b"x" + b"\xff\xfb\x90\x00" * 4_000_000, wav_claiming(0)[:36] * 400_000],
)
def test_decode_file_of_nothing_but_tags_frames_or_chunks_is_rejected_soon(content: bytes):
    start = time.process_time()
    with pytest.raises(RequestError):
        decode(content)
    assert time.process_time() - start < 3


# --- the window --------------------------------------------------------------------------------------------------


@given(st.integers(1, RATE))
def test_window_of_a_short_clip_is_padded_on_both_sides(length: int):
    padded, start = loudest_window(numpy.ones(length, dtype=numpy.float32), RATE)
    sounding = numpy.flatnonzero(padded)
    assert (len(padded), len(sounding), start) == (RATE, length, -sounding[0])
    assert abs(sounding[0] - (RATE - 1 - sounding[-1])) <= 1


@given(seconds=st.floats(1, 20), part=st.floats(0, 1))
@settings(max_examples=40)
def test_window_contains_the_whole_burst_at_any_position(seconds: float, part: float):
    at = 0.25 + part * (seconds - 0.5)
    window, _ = loudest_window(tone_burst(RATE, seconds, at), RATE)
    assert numpy.linalg.norm(window) == pytest.approx(numpy.linalg.norm(BURST), rel=1e-3)
    if 0.5 <= at <= seconds - 0.5:
        middle = (window**2 * numpy.arange(RATE)).sum() / (window**2).sum()
        assert abs(middle - RATE / 2) < 0.05 * RATE


def test_window_of_several_bursts_contains_the_loudest():
    clip = 0.3 * tone_burst(RATE, 10, at=2) + tone_burst(RATE, 10, at=5) + 0.5 * tone_burst(RATE, 10, at=8)
    assert error(loudest_window(clip, RATE)[0], BURST, delay=160) < 0.01


def test_window_ignores_a_constant_offset():
    clip = 0.1 * tone_burst(RATE, 10, at=7) + 0.4
    assert numpy.ptp(loudest_window(clip.astype(numpy.float32), RATE)[0]) > 0.09


@given(length=st.integers(0, 3_000), window=st.integers(1, 1_000))
def test_window_has_the_requested_length(length: int, window: int):
    assert loudest_window(numpy.ones(length, dtype=numpy.float32), window)[0].shape == (window,)


# --- rejected sounds ----------------------------------------------------------------------------------------------


WEBM = bytes.fromhex("1a45dfa3 9f 42868101 42f78101 42f28104 42f38108 428284") + b"webm" + bytes(100)


def with_sample(value: float) -> bytes:
    samples = BURST.copy()
    samples[100] = value
    return encode_sound(samples, subtype="FLOAT")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        pytest.param(b"hello, world\n" * 1000, UndecodableAudio, "Accepted: WAV", id="text"),
        pytest.param(encode_sound(BURST)[:20], UndecodableAudio, "Accepted: WAV", id="truncated-header"),
        pytest.param(encode_sound(BURST, format="FLAC")[:60], UndecodableAudio, "Accepted: WAV", id="truncated-flac"),
        pytest.param(wav_claiming(0), EmptyInput, "no samples", id="header-without-samples"),
        pytest.param(wav_claiming(RATE), EmptyInput, "no samples", id="declared-samples-missing"),
        pytest.param(encode_sound(BURST[:0]), EmptyInput, "no samples", id="no-samples"),
        pytest.param(with_sample(numpy.nan), UndecodableAudio, "not finite", id="nan"),
        pytest.param(with_sample(numpy.inf), UndecodableAudio, "not finite", id="infinite"),
        pytest.param(with_sample(-numpy.inf), UndecodableAudio, "not finite", id="minus-infinite"),
        pytest.param(encode_sound(BURST, 999), UndecodableAudio, "999 Hz; 1000 to 384000 Hz", id="rate-low"),
        pytest.param(encode_sound(BURST, 384_001), UndecodableAudio, "384001 Hz; 1000 to", id="rate-high"),
        pytest.param("hello!", RequestError, "base64", id="string"),
        pytest.param(WEBM, UndecodableAudio, "It is a WebM recording. Accepted: WAV", id="webm"),
        pytest.param(encode_sound(BURST)[:20], UndecodableAudio, "It is a WAV sound, truncated", id="half-a-wav"),
        pytest.param(b"\x89PNG\r\n\x1a\n", UndecodableAudio, "It is a PNG image", id="png"),
    ],
)
def test_decode_invalid_sound_is_rejected(content: bytes, error: type, message: str):
    with pytest.raises(error, match=message):
        decoded(handler(), content)


def test_decode_overflow_of_the_average_is_rejected():
    """Each sample is finite, and their sum is not."""
    samples = numpy.tile(numpy.float32([3e38, -3e38] + [0] * 6), (100, 4)).astype(numpy.float32)
    with pytest.raises(UndecodableAudio, match="not finite"):
        decoded(handler(), encode_sound(samples, subtype="FLOAT"))


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_decode_clip_that_is_too_long_is_rejected_before_decoding(format: str, monkeypatch: pytest.MonkeyPatch):
    content = encode_sound(numpy.zeros(120 * 8_000, dtype=numpy.float32), 8_000, format)

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("samples were decoded")

    monkeypatch.setattr("soundfile.SoundFile.read", reached)
    with pytest.raises(AudioTooLong, match="at most 60 seconds"):
        decoded(handler(), content)


def test_decode_limit_counts_the_samples_of_all_channels():
    """Sixty seconds of silence are a small FLAC file, but eight channels at 96 kHz take 180 MB of memory."""
    content = encode_sound(numpy.zeros((2_000, 8), dtype=numpy.float32), format="FLAC")
    assert not decode(content, max_values=16_000).any()
    with pytest.raises(AudioTooLong, match="15999 samples over all channels"):
        decoded(handler(max_values=15_999), content)


def test_decode_clip_of_the_maximum_length_is_accepted():
    clip = numpy.zeros(2 * RATE, dtype=numpy.float32)
    assert not decode(encode_sound(clip), max_seconds=2).any()
    with pytest.raises(AudioTooLong, match="at most 2 seconds"):
        decoded(handler(max_seconds=2), encode_sound(numpy.append(clip, 0)))


ORIGINALS = {
    f"{format} {subtype}": encode_sound(BURST[4_000:8_000], RATE, format, subtype)
    for format, subtype in [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "IMA_ADPCM"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
        ("AIFF", None),
    ]
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_decode_truncated_file_prints_no_traceback():
    with pytest.raises(UndecodableAudio):
        decode(encode_sound(BURST, RATE, "AIFF", "PCM_16")[:40])  # libsndfile seeks to a negative offset


@given(st.one_of(st.binary(), damaged(ORIGINALS)))
def test_decode_any_bytes_return_a_sound_or_a_request_error(content: bytes):
    try:
        sample = decoded(handler(), content)
    except RequestError:
        return
    assert sample.shape == (RATE,)
    assert sample.isfinite().all()
