"""Archives of NeMo (.nemo): members read by name where they lie, never extracted; and written.

A .nemo is a tar, in older files inside gzip, of model_config.yaml, model_weights.ckpt and
artefacts, `<32 hex digits>_<name>`, to which the config refers as "nemo:<member>". Each header is
judged here because Python's tarfile before 3.14 can be kept busy for ever (CVE-2025-8194), follows
links inside archives and lets the last of two members of a name win.
"""

import contextlib
import dataclasses
import gzip
import io
import os
import re
import tarfile
import tempfile
import zlib

from jasr.interop.files import Part, other_kind, replacing

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
LARGEST = 64 << 20  # bytes of a member that is read into memory (not weights, which are mapped)
MOST_MEMBERS = 10_000
# gzip: a file of weights shrinks by some percent; deflate's most is a thousandfold.
MOST_GROWTH, SLACK = 20, 64 << 20
_BLOCK = 512
_LONGEST = 1 << 20  # bytes of an extended header
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"K": "a link of a long name",
    b"S": "a sparse file",
}


class ArchiveError(ValueError):
    """The archive is damaged, hostile, or not NeMo's; the message begins with its path."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """An open archive: `tar` is the path of the plain tar, which may be temporary."""

    path: str
    tar: str
    members: dict[str, Part]

    def member(self, name):
        """The Part of a name, with or without "./" or "nemo:" before it; ArchiveError if none."""
        found = self.members.get(_plain(name.removeprefix("nemo:")))
        if found is None:
            names = ", ".join(sorted(self.members)[:20]) or "nothing"
            raise ArchiveError(f"{self.path}: no {name!r} in it; it holds {names}")
        return found

    def read(self, name):
        """The bytes of a member of at most 64 MiB."""
        start, size = self.member(name)
        if size > LARGEST:
            raise ArchiveError(
                f"{self.path}: {name!r} has {size} bytes, more than the {LARGEST} allowed"
            )
        with open(self.tar, "rb") as file:
            file.seek(start)
            return file.read(size)


@contextlib.contextmanager
def opened(path):
    """Context of the Archive at `path`. A gzip file is unpacked into a temporary file, which goes
    with the context; what was mapped from it must be copied before.

    Raises:
      ArchiveError: with the path and the reason. The whole archive is refused for one bad member.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            start = file.read(_BLOCK)
        if start[:2] != b"\x1f\x8b":
            _check_is_tar(start)
            yield Archive(path, path, _members(path))
        else:
            with tempfile.TemporaryDirectory(prefix="jasr-nemo-") as folder:
                tar = os.path.join(folder, "plain.tar")
                _unpack(path, tar)
                yield Archive(path, tar, _members(tar))
    except _Damage as e:
        raise ArchiveError(f"{path}: {e}") from e


class _Damage(Exception):
    """What is wrong, without the path."""


def _check_is_tar(start):
    if start[257:262] == b"ustar" or (any(start) and _header(start)):
        return
    if start[:3] == b"BZh" or start[:6] == b"\xfd7zXZ\x00":
        raise _Damage("a tar packed with bzip2 or xz; NeMo writes plain tar or gzip: repack it")
    raise _Damage(other_kind(start, "tar file"))


def _unpack(path, tar):
    """Writes the gzip file's content to `tar`, in bounded memory and up to a bounded size."""
    most = MOST_GROWTH * os.path.getsize(path) + SLACK
    done = 0
    try:
        with gzip.open(path, "rb") as packed, open(tar, "wb") as file:
            while chunk := packed.read(1 << 20):
                done += len(chunk)
                if done > most:
                    raise _Damage(
                        f"it unpacks to more than {most} bytes, {MOST_GROWTH} times its size, as "
                        "weights never do"
                    )
                file.write(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise _Damage(f"a cut or damaged gzip file ({e}); copy it again") from e


# ---- headers -------------------------------------------------------------------------------------


def _members(path):
    """{name: Part} of a plain tar, with every claim checked against the file."""
    members, folded = {}, set()
    end, at, extended = os.path.getsize(path), 0, {}
    with open(path, "rb") as file:
        while True:
            file.seek(at)
            raw = file.read(_BLOCK)
            if len(raw) < _BLOCK:
                raise _Damage("a cut tar file: it ends before its end mark; copy it again")
            if not any(raw):
                return members
            header = _header(raw)
            if header is None:
                raise _Damage(f"a damaged tar file: no header at byte {at}")
            extends = header.type in (b"x", b"g", b"L")
            name = extended.get("path") or header.name
            size = header.size if extends else extended.get("size", header.size)
            start = at + _BLOCK
            if size < 0 or start + size > end:
                raise _Damage(
                    f"{name!r} claims {size} bytes that the file does not have; it was cut or its "
                    "header is false"
                )
            at = start + -(-size // _BLOCK) * _BLOCK
            if extends:
                if size > _LONGEST:
                    raise _Damage(f"an extended header of {size} bytes")
                data = file.read(size)
                found = {"path": _text(data)} if header.type == b"L" else _records(data)
                if header.type == b"g" and found:
                    raise _Damage("an extended header that renames or resizes all members")
                extended |= found
                continue
            extended = {}
            if header.type not in (b"0", b"\0", b"7", b"5"):
                what = _KINDS.get(header.type, f"of kind {header.type!r}")
                raise _Damage(f"{name!r} is {what}; a model consists of plain files")
            plain = _plain(name)
            # It is never used as a path; a file with such a name was made to harm other readers.
            parts = re.split(r"[/\\]", plain or (name[:1] if header.isdir() else ""))
            if ".." in parts or not parts[0] or re.match("[A-Za-z]:", plain):
                raise _Damage(
                    f"{name!r} names a place outside the archive; such a file is not NeMo's"
                )
            if header.isdir():  # the names of files say enough
                continue
            if plain.casefold() in folded:
                raise _Damage(f"{name!r} is there twice (or differs only in case)")
            folded.add(plain.casefold())
            members[plain] = Part(start, size)
            if len(members) > MOST_MEMBERS:
                raise _Damage(f"more than {MOST_MEMBERS} members")


def _header(raw):
    """The TarInfo of a header's bytes; None if they are none, by their sum."""
    try:
        return tarfile.TarInfo.frombuf(raw, "utf-8", "replace")
    except tarfile.HeaderError:
        return None


def _text(raw):
    return raw.split(b"\0")[0].decode("utf-8", "replace")


def _records(data):
    """The records "length key=value" of a pax header that matter: path and size."""
    found = {}
    while data:
        match = re.match(rb"(\d{1,7}) ", data)
        length = int(match[1]) if match else 0
        record = data[len(match[0]) : length - 1] if match else b""
        if not match or length > len(data) or data[length - 1 : length] != b"\n":
            raise _Damage("a damaged extended header")
        key, _, value = record.partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise _Damage("a sparse file; a model consists of plain files")
        if key == b"path":
            found["path"] = value.decode("utf-8", "replace")
        elif key == b"size":
            if not re.fullmatch(rb"\d{1,18}", value):
                raise _Damage(f"an extended header that claims {value!r:.40} bytes")
            found["size"] = int(value)
        data = data[length:]
    return found


def _plain(name):
    """The name without "./" before it and "/" after it."""
    inside = re.sub(r"^(?:\./+)+", "", name)
    return inside.rstrip("/") or inside[:1]


# ---- writing -------------------------------------------------------------------------------------


def write(path, members):
    """Writes a plain .nemo of {name: bytes or path of a file}, as NeMo's own readers expect it.

    The file appears whole or not at all.
    """
    with (
        replacing(path) as partial,
        tarfile.open(partial, "w:", format=tarfile.PAX_FORMAT) as tar,
    ):
        top = tarfile.TarInfo("./")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.size = os.path.getsize(content)
                with open(content, "rb") as file:
                    tar.addfile(info, file)
