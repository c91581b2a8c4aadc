"""Generate sounds of every format that libsndfile writes, and WAV files with chunks that it does not write."""

import struct
from functools import cache

import numpy

from tests.unit.inputs import encode_sound, tone_burst

KINDS = [
    *(("WAV", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")),
    *(("WAVEX", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16")),
    *(("CAF", "ALAC_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS")),
    ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


@cache
def sounds() -> dict[str, bytes]:
    burst = tone_burst(16_000)
    files = {f"{format} {subtype}".lower(): encode_sound(burst, 16_000, format, subtype) for format, subtype in KINDS}
    stereo = numpy.stack([tone_burst(44_100), tone_burst(44_100, hertz=900)], axis=1)
    plain = encode_sound(burst[:4000])
    return files | {
        "stereo 44.1 kHz": encode_sound(stereo, 44_100),
        "eight channels": encode_sound(numpy.repeat(burst[:2000, None], 8, axis=1), 48_000, "FLAC"),
        "lowest rate": encode_sound(tone_burst(1_000), 1_000),
        "highest rate": encode_sound(tone_burst(384_000), 384_000),
        "a minute": encode_sound(numpy.zeros(60 * 16_000, dtype=numpy.float32), 16_000, "FLAC"),
        "most values": encode_sound(numpy.zeros((4_000_000, 8), dtype=numpy.int16), 384_000, "FLAC"),
        "ten minutes": encode_sound(numpy.zeros(600 * 1_000, dtype=numpy.float32), 1_000, "FLAC"),
        "no samples": encode_sound(burst[:0]),
        "odd chunk": with_chunk(plain, b"odd ", b"\1\2\3"),
        "list chunk": with_chunk(plain, b"LIST", b"INFOISFT" + struct.pack("<I", 6) + b"maker\0"),
        "loud": encode_sound((burst * 1e30).astype(numpy.float32), subtype="FLOAT"),
        "not a number": encode_sound(numpy.full(1000, numpy.nan, dtype=numpy.float32), subtype="FLOAT"),
    }


def with_chunk(wav: bytes, name: bytes, data: bytes) -> bytes:
    """Insert a chunk before the samples of a WAV file. RIFF requires a padding byte after an odd length."""
    chunk = name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    at = wav.index(b"data")
    content = wav[:at] + chunk + wav[at:]
    return content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
