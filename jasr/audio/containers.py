"""What the container of a recording says about its length, where the decoder keeps silent.

libsndfile shortens a cut WAV, AIFF or Ogg file without a word, and guesses the length of an MP3
that has no length header. These functions look for themselves; `jasr.audio` raises.
"""

from __future__ import annotations

import re
import struct

_UNKNOWN = 0x7FFF0000  # from here on a 32-bit size is what recorders to a pipe write: until the end


def shortage(data) -> str:
    """Why the container says that recording `data` (bytes or mmap) is not whole, or "" if it is.

    RIFF/WAVE, RF64, W64, AIFF, AU, NIST SPHERE and Ogg; "" for what these do not cover.
    """
    magic = data[:4]
    if magic in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return _chunks_shortage(data, magic)
    if magic == b".snd":
        start, size = struct.unpack(">II", data[4:12].ljust(8, b"\0"))
        return _compare(start + size, len(data)) if size < _UNKNOWN else ""
    if magic == b"riff":
        return _w64_shortage(data)
    if magic == b"NIST":
        return _sphere_shortage(data)
    if magic == b"OggS":
        return _ogg_shortage(data)
    if magic == b"fLaC" and len(data) > 26 and not any((data[21] & 15, *data[22:26])):
        return "FLAC without its length (written to a pipe): encode it again from a file"
    return ""


def _compare(end: int, size: int) -> str:
    return f"truncated: {size} of {end} bytes" if end > size else ""


def _chunks_shortage(data, magic: bytes) -> str:
    """RIFF (WAVE specification 1.0), RF64 (EBU 3306) and AIFF chunks, up to the samples."""
    form = "<4sI" if magic in (b"RIFF", b"RF64") else ">4sI"
    at, long_size = 12, 0
    while at + 8 <= len(data):
        name, size = struct.unpack(form, data[at : at + 8])
        if name == b"ds64":
            long_size = struct.unpack("<Q", data[at + 16 : at + 24].ljust(8, b"\0"))[0]
        if name in (b"data", b"SSND"):
            if magic == b"RF64" and size == 0xFFFFFFFF:
                return _compare(at + 8 + long_size, len(data))
            return _compare(at + 8 + size, len(data)) if size < _UNKNOWN else ""
        at += 8 + size + size % 2
    return ""


def _w64_shortage(data) -> str:
    at = 40  # chunks: GUID of 16 bytes that begins with the name, size of all in 8 bytes
    while at + 24 <= len(data):
        size = struct.unpack("<Q", data[at + 16 : at + 24])[0]
        if data[at : at + 4] == b"data":
            return _compare(at + size, len(data))
        at += max(24, size + -size % 8)
    return ""


def _sphere_shortage(data) -> str:
    """NIST SPHERE: a text header of `header size` bytes, lines `name -i value`."""
    size = re.match(rb" *(\d+)\s", data[8:16])
    header = data[: int(size[1])] if size else b""
    fields = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d+)\s", header)}
    if b"shorten" in header:
        return ""  # compressed: the decoder refuses it by itself
    samples = fields.get(b"sample_count", 0) * fields.get(b"channel_count", 1)
    return _compare(len(header) + samples * fields.get(b"sample_n_bytes", 0), len(data))


def _ogg_shortage(data) -> str:
    """The last page must be complete and carry the end-of-stream flag (RFC 3533 §6)."""
    at = data.rfind(b"OggS")
    if at + 27 > len(data):
        return "truncated: the last Ogg page is cut"
    table = data[at + 27 : at + 27 + data[at + 26]]
    if len(table) < data[at + 26] or at + 27 + len(table) + sum(table) > len(data):
        return "truncated: the last Ogg page is cut"
    return "" if data[at + 5] & 4 else "truncated: the Ogg stream has no end"


# ---- MP3 ---------------------------------------------------------------------------------------

_KBPS = {  # layer III, by MPEG version 1 or 2 (and 2.5)
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _mp3_frame(data, at: int):
    """(bytes, samples, bytes of side information) of the layer III frame at `at`, or None."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return None
    version, rate, kbps = data[at + 1] >> 3 & 3, data[at + 2] >> 2 & 3, data[at + 2] >> 4
    if version == 1 or rate == 3 or kbps in (0, 15):
        return None
    mono, first = data[at + 3] >> 6 == 3, version == 3
    samples = 1152 if first else 576
    bits = samples // 8 * 1000 * _KBPS[1 if first else 2][kbps]
    size = bits // _RATES[version][rate] + (data[at + 2] >> 1 & 1)
    return size, samples, (17 if mono else 32) if first else (9 if mono else 17)


def mp3_start(data) -> int:
    """Where the first frame of an MP3 begins (after ID3v2 tags), or -1 if this is no MP3."""
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        a, b, c, d = data[at + 6 : at + 10]
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if data[at + 5] & 16 else 0)
    frame = _mp3_frame(data, at)
    return at if frame and (at + frame[0] >= len(data) or _mp3_frame(data, at + frame[0])) else -1


def mp3_length(data, start: int) -> tuple[int, bool]:
    """(samples a channel, whether a length header says so); without one the frames are counted."""
    size, samples, side = _mp3_frame(data, start)
    head = data[start : start + size]
    if head[4 + side : 8 + side] in (b"Xing", b"Info") and head[11 + side] & 1:
        return samples * int.from_bytes(head[8 + side + 4 : 8 + side + 8], "big"), True
    if head[36:40] == b"VBRI":
        return samples * int.from_bytes(head[50:54], "big"), True
    total, at = 0, start
    while (frame := _mp3_frame(data, at)) is not None and at + frame[0] <= len(data):
        total += frame[1]
        at += frame[0]
    return total, False


def mp3_with_length(data, start: int, samples: int) -> bytes:
    """The MP3 behind a length header of its own, so that the decoder need not guess."""
    header = bytearray(data[start : start + 4])
    header[1] |= 1  # no checksum
    header[2] = 0x50 | header[2] & 0x0C  # 40 to 64 kbit/s, so that the tag fits
    size, per_frame, side = _mp3_frame(header, 0)
    tag = b"Xing" + struct.pack(">II", 1, samples // per_frame)
    return bytes(header) + bytes(side) + tag.ljust(size - 4 - side, b"\0") + data[start:]
