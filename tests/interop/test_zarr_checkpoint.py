"""zarr v2 directories as Megatron writes them: dtypes, chunks, damage."""

import json
import shutil
import zlib

import ml_dtypes
import numpy as np
import pytest

from jasr.interop import zarr_checkpoint
from jasr.interop.zarr_checkpoint import Array, ZarrError

ts = pytest.importorskip("tensorstore")


def make(path, value, chunks=None, **header):
    """Writes a zarr v2 array through tensorstore alone."""
    value = np.asarray(value)
    dtype = "bfloat16" if value.dtype == ml_dtypes.bfloat16 else value.dtype.str
    header = {
        "shape": list(value.shape),
        "chunks": list(chunks or value.shape),
        "dtype": dtype,
        "compressor": None,
        "fill_value": None,
    } | header
    spec = {"driver": "zarr", "kvstore": f"file://{path}/", "metadata": header}
    spec["store_data_equal_to_fill_value"] = True
    ts.open(spec, create=True).result().write(value).result()
    return value


def normal(shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("shape, chunks", [((5, 7), (2, 7)), ((), ()), ((6,), (4,))])
def test_arrays_come_back_bit_for_bit_and_are_written_in_the_same_layout(
    tmp_path, dtype, shape, chunks
):
    value = make(tmp_path / "a" / "model.weight", normal(shape, dtype), chunks)
    found = zarr_checkpoint.arrays(tmp_path / "a")["model.weight"]
    assert (found.shape, found.dtype) == (shape, value.dtype)
    got = np.asarray(found)
    assert got.dtype == value.dtype and got.tobytes() == value.tobytes()
    zarr_checkpoint.write(tmp_path / "b", "model.weight", got, found)
    files = [sorted(p.name for p in (tmp_path / d / "model.weight").iterdir()) for d in "ab"]
    assert files[0] == files[1]
    for name in files[0]:
        written = (tmp_path / "b" / "model.weight" / name).read_bytes()
        assert written == (tmp_path / "a" / "model.weight" / name).read_bytes()


def test_headers_and_compression_are_kept(tmp_path):
    value = make(
        tmp_path / "a", normal((4, 6)), (2, 3), compressor={"id": "zlib", "level": 1}, order="F",
        dimension_separator="/",
    )  # fmt: skip
    first = Array(tmp_path / "a")
    zarr_checkpoint.write(tmp_path, "b", value + 1, first)
    again = Array(tmp_path / "b")
    assert again.header == first.header and again.header["compressor"]["id"] == "zlib"
    np.testing.assert_array_equal(np.asarray(again), value + 1)


def test_chunks_of_zeros_have_files(tmp_path):
    zarr_checkpoint.write(tmp_path, "a", np.zeros((4, 6), np.float32))
    assert (tmp_path / "a" / "0.0").stat().st_size == 96
    make(tmp_path / "c", np.zeros((4, 6), np.float32), (2, 6))
    zarr_checkpoint.write(tmp_path, "b", np.zeros((4, 6), np.float32), Array(tmp_path / "c"))
    assert (tmp_path / "b" / "1.0").stat().st_size == 48


@pytest.mark.parametrize("name", ["<V2", "|V2"])
def test_two_bytes_without_a_type_are_bfloat16(tmp_path, name):
    value = make(tmp_path / "a", normal((4, 6), ml_dtypes.bfloat16), (2, 6))
    header = json.loads((tmp_path / "a" / ".zarray").read_text())
    (tmp_path / "a" / ".zarray").write_text(json.dumps(header | {"dtype": name}))
    found = Array(tmp_path / "a")
    assert found.dtype == ml_dtypes.bfloat16
    assert np.asarray(found).tobytes() == value.tobytes()
    zarr_checkpoint.write(tmp_path, "b", found, found)
    assert Array(tmp_path / "b").header["dtype"] == "bfloat16"


def test_what_is_not_whole_is_refused_by_name(tmp_path):
    make(tmp_path / "a", normal((4, 6)), (2, 6))
    (tmp_path / "a" / "1.0").unlink()
    with pytest.raises(ZarrError, match="1 chunks of 2"):
        np.asarray(Array(tmp_path / "a"))
    (tmp_path / "a" / "1.0").write_bytes(b"cut")
    with pytest.raises(ZarrError, match="a: "):
        np.asarray(Array(tmp_path / "a"))
    for text in ("", "{}", "[1]", '{"shape": 3, "chunks": [1], "dtype": "<f4", "zarr_format": 2}'):
        (tmp_path / "a" / ".zarray").write_text(text)
        with pytest.raises(ZarrError, match="damaged .zarray"):
            Array(tmp_path / "a")
    header = {"shape": [4], "chunks": [4], "dtype": "<f4", "zarr_format": 3}
    for change, told in (({}, "wanted zarr v2"), ({"chunks": [0]}, "damaged.*chunks"),
                         ({"zarr_format": 2, "dtype": "<q9"}, "dtype")):  # fmt: skip
        (tmp_path / "a" / ".zarray").write_text(json.dumps(header | change))
        with pytest.raises(ZarrError, match=told):
            Array(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ZarrError, match="no zarr array"):
            zarr_checkpoint.arrays(where)


def packed(path, data, header):
    """A zarr v2 array of one chunk with these bytes."""
    path.mkdir()
    plain = {"zarr_format": 2, "dtype": "|u1", "filters": None, "order": "C", "fill_value": None}
    (path / ".zarray").write_text(json.dumps(plain | header))
    (path / "0").write_bytes(data)
    return path


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    most = (64 << 20) + 20 * 4096
    pack = {"compressor": {"id": "zlib", "level": 1}}
    for n, (shape, chunks) in enumerate((([most + 1], [most + 1]), ([1], [1 << 40]))):
        header = {"shape": shape, "chunks": chunks} | pack
        path = packed(tmp_path / str(n), bytes(4096), header)
        with pytest.raises(ZarrError, match=f"{n}: its chunks unpack to .* without a compressor"):
            np.asarray(Array(path))
    header = {"shape": [most], "chunks": [most]} | pack  # within the limit: zlib has its say
    with pytest.raises(ZarrError, match="Error reading"):
        np.asarray(Array(packed(tmp_path / "limit", bytes(4096), header)))
    # more is packed than the header says
    header = {"shape": [4], "chunks": [4]}
    path = packed(tmp_path / "zlib", zlib.compress(bytes(1 << 16)), header | pack)
    with pytest.raises(ZarrError, match="zlib: "):
        np.asarray(Array(path))
    blosc = {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 0}}
    lie = bytes([2, 1, 0, 1]) + (1 << 31).to_bytes(4, "little") + bytes(56)
    with pytest.raises(ZarrError, match="blosc.0: it unpacks to 2147483648 bytes, but .* has 4"):
        np.asarray(Array(packed(tmp_path / "blosc", lie, header | blosc)))


@pytest.mark.parametrize("name", ["zlib", "blosc"])
def test_packed_constants_of_a_usual_size_are_read(tmp_path, name):
    value = make(tmp_path / "a", np.zeros((1000, 300), np.float32), (300, 300),
                 compressor={"id": name})  # fmt: skip
    assert sum(p.stat().st_size for p in (tmp_path / "a").iterdir()) < value.nbytes / 50
    np.testing.assert_array_equal(np.asarray(Array(tmp_path / "a")), value)
