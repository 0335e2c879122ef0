"""Archives of NeMo (.nemo): members read by name where they lie, never extracted; and written.

A .nemo is a tar, in older files inside gzip, of model_config.yaml, model_weights.ckpt and
artefacts, `<32 hex digits>_<name>`, to which the config refers as "nemo:<member>". The headers are
read here because Python's tarfile before 3.14 can be kept busy for ever (CVE-2025-8194), follows
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
import typing
import uuid
import zlib

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


class Member(typing.NamedTuple):
    """Where a member's bytes lie in the tar."""

    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Archive:
    """An open archive: `tar` is the path of the plain tar, which may be temporary."""

    path: str
    tar: str
    members: dict[str, Member]

    def member(self, name):
        """The Member of a name, with or without "./" or "nemo:" before it; ArchiveError if none."""
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
    if start[257:262] == b"ustar" or (len(start) == _BLOCK and _checksum_fits(start)):
        return
    if not start:
        raise _Damage("the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise _Damage("a git-lfs pointer, not the file itself; run `git lfs pull`")
    if start[:3] == b"BZh" or start[:6] == b"\xfd7zXZ\x00":
        raise _Damage("a tar packed with bzip2 or xz; NeMo writes plain tar or gzip: repack it")
    if start.lstrip()[:1] in (b"<", b"{"):
        raise _Damage("a text file (HTML or JSON), perhaps a failed download")
    raise _Damage(f"not a tar file (it begins with {start[:8]!r})")


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
    """{name: Member} of a plain tar, with every claim checked against the file."""
    members, folded = {}, set()
    end, at, extended = os.path.getsize(path), 0, {}
    with open(path, "rb") as file:
        while True:
            file.seek(at)
            header = file.read(_BLOCK)
            if len(header) < _BLOCK:
                raise _Damage("a cut tar file: it ends before its end mark; copy it again")
            if not any(header):
                return members
            if not _checksum_fits(header):
                raise _Damage(f"a damaged tar file: no header at byte {at}")
            kind, size = header[156:157], _number(header[124:136])
            name = extended.get("path") or _name(header)
            size = extended.get("size", size) if kind not in (b"x", b"g", b"L") else size
            start = at + _BLOCK
            if size < 0 or start + size > end:
                raise _Damage(
                    f"{name!r} claims {size} bytes that the file does not have; it was cut or its "
                    "header is false"
                )
            at = start + -(-size // _BLOCK) * _BLOCK
            if kind in (b"x", b"g", b"L"):
                if size > _LONGEST:
                    raise _Damage(f"an extended header of {size} bytes")
                data = file.read(size)
                found = {"path": _text(data)} if kind == b"L" else _records(data)
                if kind == b"g" and found:
                    raise _Damage("an extended header that renames or resizes all members")
                extended |= found
                continue
            extended = {}
            if kind not in (b"0", b"\0", b"7", b"5"):
                what = _KINDS.get(kind, f"of kind {kind!r}")
                raise _Damage(f"{name!r} is {what}; a model consists of plain files")
            plain = _plain(name)
            _check_name(plain or ("." if kind == b"5" else ""), name)
            if kind == b"5":  # a directory; the names of files say enough
                continue
            if plain.casefold() in folded:
                raise _Damage(f"{name!r} is there twice (or differs only in case)")
            folded.add(plain.casefold())
            members[plain] = Member(start, size)
            if len(members) > MOST_MEMBERS:
                raise _Damage(f"more than {MOST_MEMBERS} members")


def _checksum_fits(header):
    try:
        return _number(header[148:156]) == sum(header[:148]) + 8 * 32 + sum(header[156:])
    except _Damage:
        return False


def _number(field):
    """A number of a header: octal text, or binary where its first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") - (
            1 << (8 * len(field) - 1) if field[0] & 0x40 else 0
        )
    text = field.split(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        raise _Damage(f"a damaged tar file: {field!r} is not a number")
    return int(text or b"0", 8)


def _name(header):
    """The name of an old or ustar header, whose prefix GNU's tar uses for other things."""
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


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


def _check_name(plain, name):
    """Nothing, if the name lies inside the archive. It is never used as a path; a file with such
    a name was made to harm other readers."""
    parts = re.split(r"[/\\]", plain)
    if not plain or ".." in parts or not parts[0] or re.match("[A-Za-z]:", plain):
        raise _Damage(f"{name!r} names a place outside the archive; such a file is not NeMo's")


# ---- writing -------------------------------------------------------------------------------------


def fresh_name(name):
    """The member that an artefact is written as: a fresh prefix and its own name."""
    return f"{uuid.uuid4().hex}_{name}"


def write(path, members):
    """Writes a plain .nemo of {name: bytes or path of a file}, as NeMo's own readers expect it.

    The file appears whole or not at all.
    """
    partial = f"{os.fspath(path)}.partial"
    try:
        with tarfile.open(partial, "w:", format=tarfile.PAX_FORMAT) as tar:
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
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
