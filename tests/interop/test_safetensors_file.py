"""safetensors files: the library reads what is written, and false claims are refused."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from jasr.interop import safetensors_file
from jasr.interop.safetensors_file import SafetensorsError


def arrays():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4)).astype(np.float32)
    return {
        "bool": x > 0,
        "f32": x.T,
        "bf16": x.astype(ml_dtypes.bfloat16),
        "f64": x.astype(np.float64),
        "i64": np.array(7),
        "empty": np.zeros((0, 3), np.float16),
        "ü/8": np.arange(5, dtype=np.uint8),
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path):
    safetensors_file.write(tmp_path / "a", arrays())
    got = safetensors_file.read(tmp_path / "a")
    assert_same(got, arrays())
    assert not got["f32"].flags.owndata and not got["f32"].flags.writeable
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    library = pytest.importorskip("safetensors.numpy")
    assert_same(library.load_file(tmp_path / "a"), arrays())
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays().items()}
    contiguous["i64"] = np.array(7)
    library.save_file(contiguous, tmp_path / "b", metadata={"format": "pt"})
    assert_same(safetensors_file.read(tmp_path / "b"), arrays())


def test_what_such_a_file_does_not_hold_is_named(tmp_path):
    with pytest.raises(SafetensorsError, match="x: safetensors files hold no complex64"):
        safetensors_file.write(tmp_path / "a", {"x": np.zeros(2, np.complex64)})
    assert not list(tmp_path.iterdir())


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(0, 8)}, "which fit neither"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "which fit neither"),
        ({"a": entry(0, 8, (3,))}, "which fit neither"),
        ({"a": entry(-8, 0)}, "which fit neither"),
        ({"a": entry(0, 1 << 40, (1 << 38,))}, "outside of the file"),
        ({"a": entry(0, 8, (2, -1))}, "has the shape"),
        ({"a": entry(0, 8, (True, 2))}, "has the shape"),
        ({"a": entry(0, 8, dtype="F4")}, "unknown type 'F4'"),
        ({"a": {"dtype": "F32"}}, "malformed"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 8, 9]}}, "malformed"),
        ({"a": {**entry(0, 8), "data_offsets": [0, float("inf")]}}, "data_offsets are 0, inf"),
        ({"a": entry(0, 8, dtype=["F32"])}, "unknown type"),
        ({"a": 3}, "malformed"),
        ([1, 2], "not a mapping"),
        ({"a": entry(0, 8)}, "12 bytes that belong to no tensor"),
        ('{"a": {}, "a": {}}', "stands there twice"),
        ("[" * 100_000, "cannot be read"),
        ("noise", "cannot be read"),
    ],
)
def test_false_headers_are_refused(tmp_path, header, reason):
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(20))
    with pytest.raises(SafetensorsError, match=reason):
        safetensors_file.read(tmp_path / "a")


def test_cut_files_are_refused(tmp_path):
    safetensors_file.write(tmp_path / "a", arrays())
    whole = (tmp_path / "a").read_bytes()
    for keep in (0, 5, 8, 100, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:keep])
        with pytest.raises(SafetensorsError, match="a: "):
            safetensors_file.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(struct.pack("<Q", 1 << 62) + whole)
    with pytest.raises(SafetensorsError, match="a cut file"):
        safetensors_file.read(tmp_path / "a")
