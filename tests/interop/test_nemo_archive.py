""".nemo archives: members by name, nothing extracted; hostile ones are refused with a reason."""

import gzip
import io
import lzma
import os
import tarfile

import pytest

from jasr.interop import nemo_archive
from jasr.interop.nemo_archive import ArchiveError

FILES = {
    "model_config.yaml": b"a: 1\n",
    "model_weights.ckpt": bytes(range(256)) * 9,
    "0f_v.txt": b"",
}


def make(path, members, mode="w:", format=tarfile.PAX_FORMAT, end=True):
    """A tar of (name, bytes) or (TarInfo, bytes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data) if data else None)
        size = tar.offset
    data = out.getvalue() if end else out.getvalue()[:size]
    path.write_bytes(gzip.compress(data) if mode == "w:gz" else data)
    return path


def contents(path):
    with nemo_archive.opened(path) as archive:
        return {name: archive.read(name) for name in archive.members}


def refused(path, reason):
    with pytest.raises(ArchiveError, match=f"{path}: .*{reason}"):
        contents(path)


# ---- honest archives -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
@pytest.mark.parametrize("prefix", ["", "./", ".//./"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_by_name(tmp_path, mode, prefix, format):
    members = [(prefix + name, data) for name, data in FILES.items()]
    path = make(tmp_path / "a.nemo", members, mode, format)
    assert contents(path) == FILES
    with nemo_archive.opened(path) as archive:
        assert archive.read("./model_config.yaml") == archive.read("nemo:model_config.yaml")
        with pytest.raises(ArchiveError, match="a.nemo: no 'vocab.txt' in it; it holds 0f_v.txt, "):
            archive.read("vocab.txt")
    assert not os.path.exists(archive.tar) or archive.tar == str(path)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_broken_times_are_read(tmp_path, format):
    info = tarfile.TarInfo("./" + "ü" * 150)
    info.mtime = 1.5  # Python writes it into an extended header
    path = make(tmp_path / "a.nemo", [(info, b"x"), ("b", b"y")], format=format)
    assert contents(path) == {"ü" * 150: b"x", "b": b"y"}


def test_nemos_own_archives_are_read(shared_dir):
    for path in (shared_dir / "goldens/nemo").rglob("*.nemo"):
        with tarfile.open(path) as tar, nemo_archive.opened(path) as archive:
            names = {m.name.removeprefix("./"): m for m in tar if m.isfile()}
            assert archive.members.keys() == names.keys()
            for name in names:
                assert archive.read(name) == tar.extractfile(names[name]).read()


def test_what_is_written_is_read_by_us_and_by_tar(tmp_path):
    (tmp_path / "weights").write_bytes(FILES["model_weights.ckpt"])
    path = tmp_path / "a.nemo"
    nemo_archive.write(path, {**FILES, "model_weights.ckpt": tmp_path / "weights"})
    assert contents(path) == FILES
    with tarfile.open(path, "r:") as tar:
        assert tar.getnames() == [".", *(f"./{name}" for name in FILES)]
    with pytest.raises(FileNotFoundError):
        nemo_archive.write(path, {"a": tmp_path / "nothing"})
    assert contents(path) == FILES and not list(tmp_path.glob("*.partial"))


# ---- hostile ones --------------------------------------------------------------------------------


OUTSIDE = r"../a ./../a a/../../b /etc/passwd //a .//../a a\..\b \a C:\a C:a .. /".split()


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_the_archive_are_refused(tmp_path, name):
    refused(make(tmp_path / "a.nemo", [("b", b"x"), (name, b"x")]), "outside the archive")
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    refused(make(tmp_path / "a.nemo", [(info, b"")]), "outside the archive")


@pytest.mark.parametrize(
    ("type", "reason"),
    [
        (tarfile.SYMTYPE, "'model_weights.ckpt' is a symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Z", "of kind b'Z'"),
    ],
)
def test_whatever_is_no_plain_file_is_refused(tmp_path, type, reason):
    info = tarfile.TarInfo("model_weights.ckpt")
    info.type, info.linkname = type, "/etc/passwd"
    refused(make(tmp_path / "a.nemo", [("b", b"x"), (info, b"")]), reason)


def test_names_that_are_there_twice_are_refused(tmp_path):
    for twice in ("model_config.yaml", "./model_config.yaml", "MODEL_config.yaml"):
        members = [*FILES.items(), (twice, b"b: 2")]
        refused(make(tmp_path / "a.nemo", members), "is there twice")


def header(size, kind=b"0"):
    """A header with a size field of our choice."""
    raw = bytearray(tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT))
    raw[124:136], raw[156:157], raw[148:156] = size, kind, b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def test_sizes_that_are_not_true_are_refused(tmp_path):
    path = tmp_path / "a.nemo"
    for size in (10 << 30, 1 << 70, 2000):  # base 256, which large sizes need, and octal
        field = b"%011o\0" % size if size < 8 << 30 else b"\x80" + size.to_bytes(11, "big")
        path.write_bytes(header(field) + bytes(512))
        refused(path, "claims .* bytes that the file does not have")


def test_a_negative_size_does_not_go_back_in_the_file(tmp_path):
    path = tmp_path / "a.nemo"
    path.write_bytes(header(b"\xff" * 10 + b"\xfe\x00") + bytes(1024))  # -512
    refused(path, "claims -512 bytes")
    path.write_bytes(header(b"-0000001000\0") + bytes(1024))
    refused(path, "claims -512 bytes")
    path.write_bytes(header(b"x0000001000\0") + bytes(1024))
    refused(path, "not a tar file|no header at byte 0")


def test_extended_headers_are_bounded_and_checked(tmp_path):
    path = tmp_path / "a.nemo"

    def extended(records, kind=b"x"):
        data = records + bytes(-len(records) % 512)
        path.write_bytes(
            header(b"%011o\0" % len(records), kind) + data + header(b"0") + bytes(1024)
        )

    for records, reason in {
        b"30 path=../a\n": "damaged extended header",
        b"13 path=../a\n": "outside",
        b"20 size=99999999999\n": "claims 99999999999 bytes",
        b"12 size=-99\n": "claims b'-99' bytes",
        b"22 GNU.sparse.major=1\n": "sparse",
        b"0 x\n": "damaged extended header",
        b"noise": "damaged extended header",
        bytes(2 << 20): "extended header of",
    }.items():
        extended(records)
        refused(path, reason)
    extended(b"11 size=512\n"[:11] + b"\n", b"g")
    refused(path, "all members|damaged")


def test_a_gzip_bomb_stops_early_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(nemo_archive.tempfile, "tempdir", None)
    monkeypatch.setattr(nemo_archive, "SLACK", 1 << 20)
    (tmp_path / "tmp").mkdir()
    path = make(tmp_path / "a.nemo", [("a", bytes(32 << 20))], "w:gz")
    refused(path, "unpacks to more than")
    assert not list((tmp_path / "tmp").iterdir())


def test_a_large_member_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(nemo_archive, "LARGEST", 100)
    with nemo_archive.opened(make(tmp_path / "a.nemo", FILES.items())) as archive:
        with pytest.raises(ArchiveError, match="'model_weights.ckpt' has 2304 bytes, more than"):
            archive.read("model_weights.ckpt")


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nemo_archive, "MOST_MEMBERS", 5)
    refused(make(tmp_path / "a.nemo", [(f"{n}", b"") for n in range(9)]), "more than 5 members")


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_cut_archives_are_refused(tmp_path, mode):
    whole = make(tmp_path / "a.nemo", FILES.items(), mode).read_bytes()
    for keep in (1, 100, len(whole) // 8, 3000 if mode == "w:" else len(whole) - 4):
        (tmp_path / "a.nemo").write_bytes(whole[:keep])
        refused(tmp_path / "a.nemo", "cut|damaged|not a tar file")
    refused(make(tmp_path / "a.nemo", FILES.items(), mode, end=False), "before its end mark")


def test_files_of_other_kinds_are_named(tmp_path):
    path = tmp_path / "a.nemo"
    for data, reason in {
        b"": "empty",
        b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
        b"<!DOCTYPE html>404": "text file",
        lzma.compress(b"x"): "bzip2 or xz",
        b"PK\x03\x04": "not a tar file",
        bytes(5000): "not a tar file",
    }.items():
        path.write_bytes(data)
        refused(path, reason)


def test_any_flipped_byte_of_a_header_is_noticed(tmp_path):
    path = make(tmp_path / "a.nemo", [("a", b"x")])
    whole = path.read_bytes()
    for i in {*range(512)} - {155}:  # that one follows the sum's end
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :])
        refused(path, "")
