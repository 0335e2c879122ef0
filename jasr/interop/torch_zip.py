"""Where the members of a torch.save file lie: it is an uncompressed zip, of which every claim is
checked.
"""

import os
import struct
import zipfile

from jasr.interop import pickles
from jasr.interop.files import Part, other_kind

MOST_MEMBERS = 1_000_000


class Damage(pickles.PickleError):
    """What is wrong, without the path."""


class _File:
    """What zipfile needs of an open file, of bytes in memory or mapped, u8[n]."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + (0, self.at, self.data.size)[whence]
        if self.at < 0:
            raise ValueError("a position before the file")

    def tell(self):
        return self.at

    def read(self, size=None):
        found = self.data[self.at :][:size].tobytes()
        self.at += len(found)
        return found


def members(data):
    """({name: Part}, name of the pickle) of a zip, u8[n], with every claim checked."""
    start = data[:512].tobytes()
    if start[:4] != b"PK\x03\x04":
        raise Damage(_what_else(start))
    try:
        with zipfile.ZipFile(_File(data)) as archive:
            infos, end = archive.infolist(), archive.start_dir
    # All that zipfile raises on damaged bytes; a cut name or a seek too far is a ValueError.
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as e:
        raise Damage(f"a cut or damaged zip file of {data.size} bytes ({e}); copy it again") from e
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
        at = info.header_offset + 30
        header = data[at - 30 : at].tobytes()
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise Damage(f"no header where {name!r} should begin")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        raw = data[at : at + name_size].tobytes()
        if raw.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") != name:
            raise Damage(f"{name!r} has another name in its own header")
        first = at + name_size + extra_size
        done = first + info.file_size
        if info.compress_size != info.file_size or done > end:
            raise Damage(f"{name!r} claims {info.file_size} bytes that the file does not have")
        found[name] = Part(first, info.file_size)
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
