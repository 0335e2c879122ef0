"""safetensors files as numpy arrays mapped from the file, and written tensor by tensor.

The format: eight bytes with the length of a JSON header, the header {name: {"dtype", "shape",
"data_offsets"}}, and the tensors' bytes without gaps (github.com/huggingface/safetensors).
"""

import json
import math
import os
import struct

import ml_dtypes
import numpy as np

from jasr.interop.files import replacing

LARGEST_HEADER = 100 << 20  # bytes, as in the original reader
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class SafetensorsError(ValueError):
    """The file is damaged, or its header claims what the file does not have."""


def read(path):
    """{name: read-only array mapped from the file} in the order of the file.

    Raises:
      SafetensorsError: with the path and what is wrong: tensors that overlap, leave gaps or lie
        outside of the file are refused.
    """
    path = os.fspath(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise SafetensorsError(
                f"{path}: a cut file, or no safetensors file (it begins with {start!r})"
            )
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as e:
            raise SafetensorsError(f"{path}: its header cannot be read: {e}") from e
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path}: its header is not a mapping")
    header.pop("__metadata__", None)
    try:
        entries = sorted((*_offsets(entry), name, entry) for name, entry in header.items())
    except (KeyError, TypeError, ValueError) as e:
        raise SafetensorsError(f"{path}: its header is malformed: {type(e).__name__} {e}") from e
    data = np.asarray(np.memmap(path, np.uint8, "r")) if entries else None
    arrays, done = {}, 0
    for begin, end, name, entry in entries:
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise SafetensorsError(f"{path}: {name} has the unknown type {entry.get('dtype')!r}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise SafetensorsError(f"{path}: {name} has the shape {shape!r:.100}")
        if begin != done or end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
            raise SafetensorsError(
                f"{path}: {name} {tuple(shape)} claims bytes {begin} to {end}, which fit neither "
                "its size nor its neighbours"
            )
        if 8 + length + end > size:
            raise SafetensorsError(f"{path}: {name} lies outside of the file, which may be cut")
        part = data[8 + length + begin : 8 + length + end]
        arrays[name] = part.view(dtype).reshape(shape)
        done = end
    if 8 + length + done != size:
        raise SafetensorsError(f"{path}: {size - 8 - length - done} bytes that belong to no tensor")
    return arrays


def _offsets(entry):
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise TypeError(f"data_offsets are {begin!r:.100}, {end!r:.100}")
    return begin, end


def _unique(pairs):
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def write(path, arrays):
    """Writes {name: array}; the file appears whole or not at all.

    Raises:
      SafetensorsError: a dtype that such a file does not have.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the format
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # aligned
    for name in order:
        array = arrays[name]
        if array.dtype not in names:
            raise SafetensorsError(f"{name}: safetensors files hold no {array.dtype}")
        end = at + array.size * array.dtype.itemsize
        shape = [int(n) for n in array.shape]
        header[name] = {"dtype": names[array.dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            flat = np.ascontiguousarray(arrays[name]).reshape(-1)
            file.write(memoryview(flat.view(np.uint8)))
