"""Distributed checkpoints of Megatron and NeMo in zarr: directories with one zarr v2 array a
tensor, read one at a time and written again in the same layout.

    model.decoder.layers.mlp.linear_fc1.weight/   .zarray, 0.0, 0.1 ...   (a chunk a file)
    model.decoder.layers.mlp._extra_state/        shards of Transformer Engine, no zarr
    optimizer.state.exp_avg.model.decoder.../     .zarray ...
    common.pt  metadata.json

zarr has no bfloat16: Megatron writes the dtype as "bfloat16", which tensorstore knows; what was
left as two bytes without a type ("<V2") is read as bfloat16 too.
"""

import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from jasr.interop.nemo_archive import MOST_GROWTH, SLACK

HEADER = ".zarray"
BFLOAT16 = ("bfloat16", "<V2", "|V2")
LARGEST_HEADER = 1 << 20


class ZarrError(ValueError):
    """A directory that is no whole zarr v2 array; the message begins with its path."""


class Array:
    """An array in a directory: its header is read at once, its chunks by `np.asarray`.

    Attributes:
      path: the directory. header: the dict of .zarray. shape: tuple. dtype: numpy's.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.header = _header(self.path)
        self.shape = tuple(self.header["shape"])
        name = self.header["dtype"]
        try:
            self.dtype = np.dtype(ml_dtypes.bfloat16 if name in BFLOAT16 else name)
        except TypeError as e:
            raise ZarrError(f"{self.path}: a dtype that is not known here, {name!r}") from e

    def __array__(self, dtype=None, copy=None):
        self.check_chunks()
        return np.asarray(_done(self._open().read, self.path), dtype)

    def check_chunks(self):
        """Raises ZarrError unless every chunk has its file (what misses would be read as zeros) and
        the chunks do not unpack to many times their size, as weights hardly do.
        """
        grid = zip(self.shape, self.header["chunks"], strict=True)
        wanted = math.prod(math.ceil(size / chunk) for size, chunk in grid)
        files = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(self.path)
            for name in names
            if not name.startswith(".")
        ]
        if len(files) != wanted:
            raise ZarrError(f"{self.path}: {len(files)} chunks of {wanted}; the copy is not whole")
        chunk = math.prod(self.header["chunks"]) * self.dtype.itemsize
        most = MOST_GROWTH * sum(map(os.path.getsize, files)) + SLACK
        if wanted * chunk > most:
            raise ZarrError(
                f"{self.path}: its chunks unpack to {wanted * chunk} bytes, more than {MOST_GROWTH}"
                f" times their size and {SLACK}, as weights hardly do; if it is honest, write it "
                "again without a compressor"
            )
        compressor = self.header.get("compressor")
        if isinstance(compressor, dict) and compressor.get("id") == "blosc":
            for path in files:  # tensorstore unpacks what their headers claim, not what a chunk has
                with open(path, "rb") as file:
                    claim = int.from_bytes(file.read(8)[4:], "little")
                if claim > chunk:
                    raise ZarrError(f"{path}: it unpacks to {claim} bytes, but a chunk has {chunk}")

    def _open(self):
        import tensorstore as ts

        place, context = _place(self.path), ts.Context()
        if self.header["dtype"] in BFLOAT16[1:]:  # the header is laid over the file's
            header = json.dumps(self.header | {"dtype": "bfloat16", "fill_value": None})
            over = {"driver": "memory", "path": HEADER}
            memory = ts.KvStore.open(over, context=context).result()
            memory.write("", header).result()
            layers = [{"base": place}, {"exact": HEADER, "base": over}]
            place = {"driver": "kvstack", "layers": layers}
        spec = {"driver": "zarr", "kvstore": place}
        return _done(lambda: ts.open(spec, read=True, context=context), self.path)


def _header(path):
    try:
        with open(path / HEADER, "rb") as file:
            header = json.loads(file.read(LARGEST_HEADER))
        for size, chunk in zip(header["shape"], header["chunks"], strict=True):
            if type(size) is not int or type(chunk) is not int or size < 0 or chunk < 1:
                raise ValueError(f"shape {header['shape']}, chunks {header['chunks']}")
        version, _ = header["zarr_format"], header["dtype"]
    except FileNotFoundError:
        raise ZarrError(f"{path}: no {HEADER}, so no zarr v2 array") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ZarrError(f"{path}: a damaged {HEADER} ({type(e).__name__}: {e})") from e
    if version != 2:
        raise ZarrError(f"{path}: zarr_format {version}; wanted zarr v2")
    return header


def arrays(directory):
    """{name: Array} of the arrays in a checkpoint directory, by name.

    Raises:
      ZarrError: none there, or a damaged one.
    """
    directory = pathlib.Path(directory)
    found = {path.parent.name: Array(path.parent) for path in sorted(directory.glob(f"*/{HEADER}"))}
    if not found:
        raise ZarrError(f"{directory}: no zarr array in it; wanted a checkpoint's directory")
    return found


def write(directory, name, value, like=None):
    """Writes an array as `directory`/`name`, every chunk of it, those of zeros too.

    Args:
      value: array of a dtype that zarr or Megatron has.
      like: an Array, whose chunks, order, compressor and file names are kept; one chunk without
        compression if None.
    """
    import tensorstore as ts

    value = np.asarray(value)
    path = pathlib.Path(directory) / name
    kept = ("chunks", "order", "compressor", "filters", "dimension_separator")
    header = {k: like.header[k] for k in kept if k in like.header} if like is not None else {}
    one = {"chunks": [max(n, 1) for n in value.shape], "compressor": None}
    bfloat16 = value.dtype == ml_dtypes.bfloat16
    header = one | header | {"shape": list(value.shape), "fill_value": None}
    header["dtype"] = "bfloat16" if bfloat16 else value.dtype.str
    spec = {
        "driver": "zarr",
        "kvstore": _place(path),
        "metadata": header,
        # zarr reads a chunk without a file and without a fill value as whatever is in memory
        "store_data_equal_to_fill_value": True,
    }
    _done(lambda: _done(lambda: ts.open(spec, create=True), path).write(value), path)


def _place(path):
    return {"driver": "file", "path": f"{path.absolute()}/"}


def _done(start, path):
    """The result of the future that `start()` returns."""
    try:
        return start().result()
    except ValueError as e:  # pages of text: the first sentence says it
        raise ZarrError(f"{path}: {str(e).split(' [')[0].splitlines()[0]}") from e
