"""Name the format of a file that cannot be decoded, from its first bytes, for an error message."""

import re
from collections.abc import Collection

LONGEST = 512  # bytes that are looked at

# (name, pattern at the start of the file)
SIGNATURES = [
    (name, re.compile(pattern, re.DOTALL | re.IGNORECASE))
    for name, pattern in [
        # images
        ("a PNG image", rb"\x89PNG"),
        ("a JPEG image", rb"\xff\xd8\xff"),
        ("a GIF image", rb"GIF8[79]a"),
        ("a WebP image", rb"RIFF....WEBP"),
        ("a TIFF image", rb"II[*+]\0|MM\0[*+]"),
        ("a HEIC image", rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)"),
        ("an AVIF image", rb"....ftypavi[fs]"),
        ("a raw photograph of a Canon camera", rb"....ftypcrx "),
        ("a JPEG XL image", rb"\xff\x0a|\0\0\0\x0cJXL "),
        ("an SVG drawing", rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg\b"),
        ("a Photoshop file", rb"8BPS"),
        ("a GIMP file", rb"gimp xcf"),
        ("an icon (ICO)", rb"\0\0[\x01\x02]\0[^\0]"),
        ("an icon (ICNS)", rb"icns"),
        ("a DDS texture", rb"DDS "),
        ("a BLP texture", rb"BLP[12]"),
        ("an OpenEXR image", rb"\x76\x2f\x31\x01"),
        ("a Radiance HDR image", rb"#\?RADIANCE"),
        ("a QOI image", rb"qoif"),
        ("a Windows metafile", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF"),
        ("a FITS image", rb"SIMPLE  ="),
        ("a DICOM file", rb".{128}DICM"),
        # sounds and films
        ("a WAV sound", rb"(RIFF|RIFX|RF64)....WAVE"),
        ("a FLAC sound", rb"fLaC"),
        ("an Ogg file", rb"OggS"),
        ("an MP3 sound", rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"),
        ("an AAC sound (ADTS)", rb"\xff[\xf0\xf1\xf8\xf9]"),
        ("an M4A sound (AAC in MP4)", rb"....ftypM4[AB]"),
        ("a 3GP recording", rb"....ftyp3g"),
        ("a QuickTime film", rb"....ftypqt|....(moov|wide)"),
        ("an MP4 film or sound", rb"....ftyp"),
        ("a WebM recording", rb"\x1aE\xdf\xa3.{0,60}webm"),
        ("a Matroska film or sound", rb"\x1aE\xdf\xa3"),
        ("a Windows Media file (WMA, WMV)", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
        ("an AMR recording", rb"#!AMR"),
        ("an AVI film", rb"RIFF....AVI "),
        ("a Flash video", rb"FLV\x01"),
        ("a MIDI file, which has notes and no sound", rb"MThd"),
        ("a RealMedia file", rb"\.RMF|\.ra\xfd"),
        ("a WavPack sound", rb"wvpk"),
        ("a Monkey's Audio sound", rb"MAC "),
        ("a TTA sound", rb"TTA1"),
        ("a DSD sound", rb"DSD |FRM8"),
        ("an AC-3 sound", rb"\x0b\x77"),
        ("an MPEG film", rb"\0\0\x01[\xb3\xba]"),
        # what is sent by mistake
        ("a PDF document", rb"%PDF"),
        ("a PostScript file", rb"%!PS"),
        ("an HTML page", rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!DOCTYPE html|html|head|body)\b"),
        ("a ZIP archive, as .docx, .pptx and .npz files are", rb"PK(\x03\x04|\x05\x06)"),
        ("compressed with gzip; send it with Content-Encoding: gzip", rb"\x1f\x8b"),
        ("compressed with zstd", rb"\x28\xb5\x2f\xfd"),
        ("compressed with bzip2", rb"BZh[1-9]1AY"),
        ("compressed with xz", rb"\xfd7zXZ"),
        ("a 7-Zip archive", rb"7z\xbc\xaf"),
        ("a RAR archive", rb"Rar!\x1a"),
        ("a NumPy array", rb"\x93NUMPY"),
        ("a pickled Python object", rb"\x80[\x02-\x05][\x8c\x95\]}c(]"),
        ("an old Word, Excel or PowerPoint document", rb"\xd0\xcf\x11\xe0"),
        (
            "a path, not the file; write curl's -F data=@FILE with an @",
            rb"@?[\w./\\: -]{1,200}\.(png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|flac|ogg)\s*\Z",
        ),
        ("JSON; send it with Content-Type: application/json", rb'(\xef\xbb\xbf)?\s*[{\[]\s*["{\[\]}0-9-]'),
        (
            "a multipart form; send it with the Content-Type multipart/form-data and its boundary",
            rb"--[^\r\n]{1,70}\r\nContent-",
        ),
    ]
]


def format_name(content: bytes) -> str:
    """Return what a file is, such as "a PDF document", to follow "It is"; "" if that is unknown."""
    start = content[:LONGEST]
    return next((name for name, pattern in SIGNATURES if pattern.match(start)), "")


def describe_format(content: bytes, readable: Collection[str] = ()) -> str:
    """Return a sentence that says what a file is, such as " It is a PDF document."; "" if that is unknown.

    Args:
        content: of the file.
        readable: names of formats whose files are read unless they are broken.
    """
    name = format_name(content)
    fault = ", truncated, corrupt or of a rare kind" if name in readable else ""
    return f" It is {name}{fault}." if name else ""
