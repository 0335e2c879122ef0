"""torch files: read without torch, written without torch, and nothing in them is ever run."""

import collections
import itertools
import os
import pickle
import struct
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jasr.interop import pickles, torch_file, torch_zip
from jasr.interop.torch_file import TorchFileError


def arrays():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4)).astype(np.float32)
    return {
        "f32": x,
        "bf16": x.astype(ml_dtypes.bfloat16),
        "f16": x.astype(np.float16),
        "f64": x.astype(np.float64),
        "i64": np.arange(-3, 3),
        "u8": np.arange(5, dtype=np.uint8),
        "bool": x > 0,
        "complex": x.astype(np.complex64),
        "scalar": np.float32(1.5).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


def members_of(path):
    return torch_zip.members(np.fromfile(path, np.uint8))[0]


# ---- what honest files hold ----------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    path = tmp_path / "a.pt"
    tree = {"model": arrays(), "step": 2**40, "names": ["a", None, True], "lr": 1e-4, "t": (1, "ü")}
    torch_file.write(path, tree)
    got = torch_file.read(path)
    assert_same(got.pop("model"), tree.pop("model"))
    assert got == tree
    assert list(tmp_path.iterdir()) == [path]


def test_torch_loads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    torch_file.write(tmp_path / "a.pt", {"model": arrays(), "step": 7, "loss": [0.5, None]})
    for mmap in (False, True):
        got = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert got["step"] == 7 and got["loss"] == [0.5, None]
        for name, array in arrays().items():
            tensor = got["model"][name]
            assert tuple(tensor.shape) == array.shape
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            assert raw.tobytes() == array.tobytes(), name


def test_tied_arrays_are_stored_once(tmp_path):
    torch = pytest.importorskip("torch")
    path, x = tmp_path / "a.pt", np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {"x": x, "tied": x, "flat": x.reshape(-1), "part": x[:2], "turned": x.T, "other": x + 1}
    torch_file.write(path, tree)
    assert len([name for name in members_of(path) if "/data/" in name]) == 4
    got, loaded = torch_file.read(path), torch.load(path, weights_only=True)
    for name, array in tree.items():
        np.testing.assert_array_equal(got[name], array)
        np.testing.assert_array_equal(loaded[name].numpy(), array)
    assert loaded["tied"].data_ptr() == loaded["x"].data_ptr() == loaded["flat"].data_ptr()
    torch_file.write(tmp_path / "b.pt", got)  # and on from there
    assert len([name for name in members_of(tmp_path / "b.pt") if "/data/" in name]) == 4


def test_storages_begin_at_multiples_of_64_bytes(tmp_path):
    torch_file.write(tmp_path / "a.pt", arrays())
    members = members_of(tmp_path / "a.pt")
    assert all(member.start % 64 == 0 for member in members.values())


def test_what_torch_saves_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(base).sum().backward()
    optimizer.step()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [base, base.T, base[1:, ::2], base[2, 3]],
        "bf16": base.bfloat16(),
        "parameter": torch.nn.Parameter(base.half()),
        "size": base.shape,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "float8": base.to(torch.float8_e4m3fn),
        "uint16": base.to(torch.uint16),
        "loss": np.float64(0.25),
    }
    torch.save(saved, tmp_path / "a.pt")
    got = torch_file.read(tmp_path / "a.pt")
    for name, tensor in saved["model"].items():
        np.testing.assert_array_equal(got["model"][name], tensor.numpy())
    moments = got["optimizer"]["state"][0]["exp_avg"]
    np.testing.assert_array_equal(moments, optimizer.state_dict()["state"][0]["exp_avg"].numpy())
    for ours, theirs in zip(got["views"], saved["views"], strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    for name in ("bf16", "float8", "uint16", "parameter"):
        values = saved[name].detach().float().numpy()
        np.testing.assert_array_equal(got[name].astype(np.float32), values)
    assert got["size"] == (4, 6) and got["dtype"] == ml_dtypes.bfloat16
    assert got["device"].name == "torch.device" and got["loss"].name.endswith("scalar")


def test_tensors_are_mapped_from_the_file_and_read_only(tmp_path):
    path = tmp_path / "a.pt"
    torch_file.write(path, {"x": np.zeros((1000, 1000), np.float32)})
    x = torch_file.read(path)["x"]
    assert not x.flags.writeable and not x.flags.owndata
    with open(path, "r+b") as file:  # the array is the file
        file.seek(members_of(path)["archive/data/0"].start)
        file.write(np.float32(2).tobytes())
    assert x[0, 0] == 2


def test_a_file_inside_another_is_mapped_where_it_lies(tmp_path):
    torch_file.write(tmp_path / "a.pt", {"model": arrays()})
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b").write_bytes(b"PK\x05\x06" * 500 + data + b"PK\x05\x06" * 500)
    got = torch_file.read(tmp_path / "b", start=2000, size=len(data))["model"]
    assert_same(got, arrays())
    assert not got["f32"].flags.owndata
    with pytest.raises(TorchFileError, match="cut or damaged"):
        torch_file.read(tmp_path / "b", start=2000, size=len(data) - 1)
    with pytest.raises(TorchFileError, match="empty"):
        torch_file.read(tmp_path / "a.pt", start=len(data))


def test_what_a_file_cannot_hold_is_named_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(TorchFileError, match="/model/x: a torch file holds no object"):
        torch_file.write(tmp_path / "a.pt", {"model": {"x": object()}})
    assert not list(tmp_path.iterdir())


# ---- hyper-parameters and evil -------------------------------------------------------------------


def make(path, data, storages=(), names=(), prefix="archive", compress=zipfile.ZIP_STORED):
    """A zip like torch.save's from a pickle's bytes and storages' bytes."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr(f"{prefix}/data.pkl", data)
        for number, raw in enumerate(storages):
            archive.writestr(f"{prefix}/data/{number}", raw)
        for name in names:
            archive.writestr(name, b"")
    return path


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Config:
    def __init__(self):
        self.size = 3


def evil(canary):
    """Pickles that create the canary file when they are run, and what they ask for first."""
    command = f"touch {canary}"
    getter = Calls(getattr, Calls(__import__, "os"), "system")
    return {
        "posix.system": pickle.dumps(Calls(os.system, command), 2),
        "builtins.eval": pickle.dumps({"w": Calls(eval, f"open({str(canary)!r}, 'w')")}, 4),
        "builtins.exec": pickle.dumps([Calls(exec, f"open({str(canary)!r}, 'w')")], 0),
        "builtins.getattr": pickle.dumps(getter, 2),
        "io.open": pickle.dumps(collections.OrderedDict(a=Calls(open, str(canary), "w")), 2),
        "os.system": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "EXT1": b"\x80\x02\x82\x01.",
    }


def test_a_pickle_that_asks_for_a_call_is_refused_by_name_and_nothing_runs(tmp_path):
    canary = tmp_path / "canary"
    for name, data in evil(canary).items():
        path = make(tmp_path / "a.pt", data.replace(b"__builtin__", b"builtins"))
        with pytest.raises(TorchFileError, match=f"refused: the pickle (asks for|uses).*{name}"):
            torch_file.read(path)
        with pytest.raises(TorchFileError, match=str(path)):
            torch_file.read(path)
    assert not canary.exists()


def test_even_an_allowed_name_is_never_called(tmp_path):
    canary = tmp_path / "canary"
    path = make(tmp_path / "a.pt", evil(canary)["posix.system"])
    got = torch_file.read(path, opaque=("posix",))
    assert got == pickles.Opaque("posix.system", (f"touch {canary}",))
    assert not canary.exists()


def test_classes_of_hyper_parameters_are_inert_once_allowed(tmp_path):
    data = pickle.dumps({"hyper_parameters": Config(), "state_dict": {}}, 2)
    path = make(tmp_path / "a.ckpt", data)
    name = f"{Config.__module__}.Config"
    with pytest.raises(TorchFileError, match=f"asks for '{name}'.*`opaque`"):
        torch_file.read(path)
    got = torch_file.read(path, opaque=(Config.__module__,))["hyper_parameters"]
    assert isinstance(got, pickles.Opaque) and got.name == name and got.state == {"size": 3}
    assert torch_file.read(path, opaque=(name,))["hyper_parameters"] == got
    with pytest.raises(TorchFileError, match="asks for"):
        torch_file.read(path, opaque=(name[:-1],))


def test_nothing_can_be_given_attributes(tmp_path):
    setting = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(TorchFileError, match="refused: the pickle sets attributes of a Global"):
        torch_file.read(make(tmp_path / "a.pt", setting))


def test_bombs_stay_small(tmp_path):
    laughs = b"\x80\x02]q\x00" + b"".join(b"2\x86q" + bytes([n % 250]) for n in range(20000)) + b"."
    torch_file.read(make(tmp_path / "laughs.pt", laughs))  # shared, never expanded
    far = b"\x80\x02Nr\xff\xff\xff\x7f."  # a memo slot that would be a table of 2 GiB
    assert torch_file.read(make(tmp_path / "far.pt", far)) is None
    nested = b"\x80\x02)" + b"\x85" * 100000
    as_key = b"\x80\x02}" + nested[2:] + b"Ns."  # hashing it would overflow C's stack
    with pytest.raises(TorchFileError, match="as a key"):
        torch_file.read(make(tmp_path / "key.pt", as_key))
    name = b"\x80\x04K\x01" + b"2\x86" * 60 + b"X\x01\0\0\0a\x93."  # 2^60 numbers if printed
    with pytest.raises(TorchFileError, match="a global whose name is no text"):
        torch_file.read(make(tmp_path / "name.pt", name))
    long = b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"abc."  # a string of 1 TiB
    with pytest.raises(TorchFileError, match="damaged pickle"):
        torch_file.read(make(tmp_path / "long.pt", long))
    with pytest.raises(TorchFileError, match="more than the"):
        torch_file.read(make(tmp_path / "big.pt", bytes(pickles.LARGEST + 1)))


def tensor_pickle(count, offset, size, stride, key="0", kind="FloatStorage"):
    """The pickle of one tensor whose claims need not be true."""
    out = bytearray(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage")
    out += f"ctorch\n{kind}\n".encode()
    for part in (key, "cpu", count):
        torch_file._emit(out, part, [], {}, "")
    out += b"tQ"
    for part in (offset, size, stride, False):
        torch_file._emit(out, part, [], {}, "")
    return bytes(out + b"ccollections\nOrderedDict\n)RtR.")


def test_shared_tuples_are_refused_before_they_are_written_out(tmp_path):
    nested = b"K\x01" + b"2\x86" * 60  # ((1, 1), (1, 1)) ...: its text would have 2^60 ones
    storage = [b"X\x07\x00\x00\x00storage", b"ctorch\nFloatStorage\n", b"X\x01\x00\x00\x000",
               b"X\x03\x00\x00\x00cpu", b"K\x01"]  # fmt: skip
    whole = b"(" + b"".join(storage) + b"tQ"
    head, one = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(", b"K\x01\x85"
    for data, message in [
        (b"\x80\x02(" + b"".join([*storage[:2], nested, *storage[3:]]) + b"tQ.", "name is a tuple"),
        (head + whole + b"K\x00" + nested + one + b"\x89NtR.", "whole numbers"),
        (head + whole + b"K\x00" + one + nested + b"\x85\x89NtR.", "whole numbers"),
        (head + whole + nested + one + one + b"\x89NtR.", "whole numbers"),
        (head + whole + b"K\x00]" + nested + b"a" + one + b"\x89NtR.", "list and tuple"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a" + nested + b"\x86R.", "encoding"),
    ]:
        with pytest.raises(TorchFileError, match=message):
            torch_file.read(make(tmp_path / "a.pt", data, [bytes(4)]))
    data = head + whole + b"K\x00" + one + one + b"\x89NtR."
    np.testing.assert_array_equal(torch_file.read(make(tmp_path / "a.pt", data, [bytes(4)])), [0])


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (dict(count=1 << 40, offset=0, size=(6,), stride=(1,)), "claims .* the file has 24"),
        (dict(count=5, offset=0, size=(5,), stride=(1,)), "claims 5 x 4 bytes, the file has 24"),
        (dict(count=6, offset=1, size=(6,), stride=(1,)), "outside its storage of 6"),
        (dict(count=6, offset=0, size=(2, 3), stride=(4, 1)), "outside its storage"),
        (dict(count=6, offset=0, size=(1 << 40,), stride=(0,)), "share memory"),
        (dict(count=6, offset=0, size=(3, 3), stride=(1, 1)), "share memory"),
        (dict(count=6, offset=-1, size=(2,), stride=(1,)), "negative"),
        (dict(count=6, offset=5, size=(2,), stride=(-1,)), "negative"),
        (dict(count=6, offset=0, size=(2, 3), stride=(1,)), "shape"),
        (dict(count=6, offset=0, size=(True,), stride=(1,)), "shape"),
        (dict(count=6, offset=0, size=(6,), stride=(1,), key="7"), "storage '7' is missing"),
        (dict(count=6, offset=0, size=(6,), stride=(1,), key="../data.pkl"), "missing"),
        (dict(count=6, offset=0, size=(6,), stride=(1,), kind="QInt8Storage"), "asks for"),
        (dict(count=6, offset=0, size=(6,), stride=(1,), kind="Size"), "unknown type"),
    ],
)
def test_a_tensor_whose_claims_are_false_is_refused(tmp_path, claim, message):
    path = make(
        tmp_path / "a.pt", tensor_pickle(**claim), [np.arange(6, dtype=np.float32).tobytes()]
    )
    with pytest.raises(TorchFileError, match=message):
        torch_file.read(path)


def test_views_that_do_not_overlap_are_read(tmp_path):
    flat = np.arange(12, dtype=np.float32)
    for size, stride, want in [
        ((3, 4), (4, 1), flat.reshape(3, 4)),
        ((4, 3), (1, 4), flat.reshape(3, 4).T),
        ((3, 2), (4, 2), flat.reshape(3, 4)[:, ::2]),
        ((1, 12), (0, 1), flat[None]),
        ((2, 2), (5, 1), np.array([[0, 1], [5, 6]], np.float32)),
    ]:
        path = make(tmp_path / "a.pt", tensor_pickle(12, 0, size, stride), [flat.tobytes()])
        np.testing.assert_array_equal(torch_file.read(path), want)


# ---- other files and damage ----------------------------------------------------------------------


def test_the_old_format_is_refused_with_the_way_out(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match=r"old format.*torch\.load\(OLD, weights_only=True\)"):
        torch_file.read(tmp_path / "old.pt")


def test_files_of_other_kinds_are_named(tmp_path):
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        make(tmp_path / "inner", b"N.")
        tar.add(tmp_path / "inner", "inner")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "lfs.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "html.pt").write_bytes(b"<!DOCTYPE html>404")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Calls(os.system, "false"), 2))
    (tmp_path / "noise.pt").write_bytes(bytes(range(200)))
    make(tmp_path / "script.pt", b"N.", names=["archive/constants.pkl"])
    make(tmp_path / "zip.pt", b"N.", prefix="a/b")
    make(tmp_path / "deflated.pt", b"N." * 100, compress=zipfile.ZIP_DEFLATED)
    whole = make(tmp_path / "whole.pt", tensor_pickle(6, 0, (6,), (1,)), [bytes(24)]).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-30])
    (tmp_path / "behind.pt").write_bytes(b"PK\x03\x04" + whole)
    for name, message in {
        "tar": "archive",
        "empty": "empty",
        "lfs": "git lfs pull",
        "html": "text file",
        "bare": "bare pickle",
        "noise": "not a torch.save file",
        "script": "TorchScript",
        "zip": "not of torch.save",
        "deflated": "compressed",
        "cut": "cut or damaged",
        "behind": "precede",
    }.items():
        with pytest.raises(TorchFileError, match=message):
            torch_file.read(tmp_path / f"{name}.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_doubled_overlapping_and_renamed_members_are_refused(tmp_path):
    path = make(tmp_path / "a.pt", b"N.", names=["archive/data.pkl"])
    with pytest.raises(TorchFileError, match="twice"):
        torch_file.read(path)
    data = make(tmp_path / "b.pt", b"N.", [bytes(40), bytes(40)]).read_bytes()
    second = data.rindex(b"archive/data/1") - 46  # its entry in the central directory
    first = data.index(b"archive/data/0") - 30
    moved = data[: second + 42] + struct.pack("<I", first) + data[second + 46 :]
    path.write_bytes(moved)
    with pytest.raises(TorchFileError, match="overlaps|another name"):
        torch_file.read(path)
    path.write_bytes(data.replace(b"archive/data/1", b"archive/data/9", 1))
    with pytest.raises(TorchFileError, match="another name"):
        torch_file.read(path)


def test_a_big_endian_file_is_refused(tmp_path):
    path = make(tmp_path / "a.pt", b"N.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(TorchFileError, match="big-endian"):
        torch_file.read(path)


def test_any_flipped_byte_gives_the_tree_or_a_clear_error(tmp_path):
    path = tmp_path / "a.pt"
    torch_file.write(path, {"w": np.arange(6, dtype=np.float32), "n": [1, (2.5, "x")], "b": {}})
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    structure = [i for i in range(len(data)) if data[i]]  # the padding is zeros
    outcomes = set()
    for i, value in itertools.product(structure, rng.integers(0, 256, 2)):
        path.write_bytes(data[:i] + bytes([value]) + data[i + 1 :])
        try:
            torch_file.read(path)
            outcomes.add("read")
        except TorchFileError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
