"""Where the members of a torch.save file lie: it is an uncompressed zip, of which every claim is
checked.
"""

import io
import os
import struct
import zipfile

from jasr.interop import pickles
from jasr.interop.files import Part, other_kind

MOST_MEMBERS = 1_000_000


class Damage(pickles.PickleError):
    """What is wrong, without the path."""


def part_of(path, start=0, size=None):
    """The part of a file from `start` on, all of it without `size`."""
    return Part(start, os.path.getsize(path) - start if size is None else size)


class _Reader(io.RawIOBase):
    """A part of an open file as a file, since a zip is found by its end."""

    def __init__(self, file, part):
        self.file, self.part, self.position = file, part, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.part.size}
        if origin[whence] + offset < 0:
            raise ValueError("a position before the file")
        self.position = origin[whence] + offset
        return self.position

    def readinto(self, buffer):
        count = max(0, min(len(buffer), self.part.size - self.position))
        self.file.seek(self.part.start + self.position)
        data = self.file.read(count)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def members(path, part):
    """({name: where in the zip its bytes lie}, name of the pickle), with every claim checked."""
    with open(path, "rb") as whole, io.BufferedReader(_Reader(whole, part)) as file:
        start = file.read(512)
        if start[:4] != b"PK\x03\x04":
            raise Damage(_what_else(start))
        try:
            with zipfile.ZipFile(file) as archive:
                infos, end = archive.infolist(), archive.start_dir
        # All that zipfile raises on damaged bytes; a cut name or a seek too far is a ValueError.
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as e:
            raise Damage(
                f"a cut or damaged zip file of {part.size} bytes ({e}); copy it again"
            ) from e
        if len(infos) > MOST_MEMBERS:
            raise Damage(f"the zip lists {len(infos)} members")
        found, done = {}, 0
        infos = sorted(infos, key=lambda info: info.header_offset)
        if infos and infos[0].header_offset:
            raise Damage(f"{infos[0].header_offset} bytes of something else precede the zip")
        for info in infos:
            name = info.orig_filename
            if name in found:
                raise Damage(f"the zip holds {name!r} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise Damage(
                    f"{name!r} is compressed or encrypted, as torch.save never does; the file was "
                    "repacked: save it again with torch"
                )
            if info.header_offset < done:
                raise Damage(f"{name!r} overlaps another member")
            file.seek(info.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise Damage(f"no header where {name!r} should begin")
            name_size, extra_size = struct.unpack("<HH", header[26:30])
            raw = file.read(name_size)
            if raw.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") != name:
                raise Damage(f"{name!r} has another name in its own header")
            first = info.header_offset + 30 + name_size + extra_size
            if info.compress_size != info.file_size or first + info.file_size > end:
                raise Damage(f"{name!r} claims {info.file_size} bytes that the file does not have")
            found[name] = Part(first, info.file_size)
            done = first + info.file_size
    names = [name for name in found if name.split("/")[1:] == ["data.pkl"]]
    if len(names) != 1:
        raise Damage(f"a zip file, but not of torch.save: {len(names)} members NAME/data.pkl")
    if names[0].replace("data.pkl", "constants.pkl") in found:
        raise Damage("a TorchScript program (torch.jit.save); save the model's state_dict instead")
    return found, names[0]


def _what_else(start):
    """What a file that is no zip seems to be, and what to do."""
    if start[:2] == b"\x80\x02" and b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in start:
        return (
            "a torch.save file of the old format (before torch 1.6, or "
            "_use_new_zipfile_serialization=False), which is not read here. If you trust it, "
            "convert it where torch is installed: "
            "torch.save(torch.load(OLD, weights_only=True), NEW)"
        )
    if start[:1] == b"\x80":
        return "a bare pickle, not a torch.save file; nothing of it was run"
    if start[:2] == b"\x1f\x8b" or b"ustar" in start:
        return "an archive (tar or gzip); extract it and give the weights file inside"
    return other_kind(start, "torch.save file")
