"""Tensors of torch.save files (.pt, .pth, .bin, .ckpt) as numpy arrays, without torch and without
running anything from the file; and files that torch.load reads, written without torch.

The format (torch >= 1.6): an uncompressed zip of NAME/data.pkl, a pickle in which each tensor is a
view (offset, shape, strides) of a storage, and NAME/data/KEY, the storages' bytes.
"""

import collections
import math
import os
import struct
import typing
import zipfile

import ml_dtypes
import numpy as np

from jasr.interop import pickles, torch_zip
from jasr.interop.files import replacing
from jasr.interop.lazy import Lazy
from jasr.interop.torch_zip import Damage

# Modules whose objects appear in checkpoints as hyper-parameters: read as inert data.
OPAQUE = (
    "argparse.Namespace",
    "collections.defaultdict",
    "datetime",
    "lightning",
    "lightning_fabric",
    "nemo",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "torch.device",
    "transformers",
    "typing",
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")  # protocol 2, which torch uses, says the latter
        for name in "bool bytes complex dict float int list long set str tuple unicode".split()
    ),
)
DTYPES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
}
_OTHERS = (np.uint16, np.uint32, np.uint64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
NAMED = {f"torch.{np.dtype(t).name}": np.dtype(t) for t in (*DTYPES.values(), *_OTHERS)}
STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in DTYPES.items()}
UNTYPED = {"torch.UntypedStorage": None, "torch.storage.UntypedStorage": None}


class TorchFileError(ValueError):
    """The file is damaged, is not torch.save's, or asks for what weights do not need."""


def read(path, *, opaque=(), start=0, size=None):
    """What was given to torch.save, with tensors as read-only numpy arrays mapped from the file.

    Pages are read when they are used, so a large file costs no memory before; copy what must
    outlive a change of the file. bfloat16 comes as ml_dtypes.bfloat16. Parameters come as their
    data; objects of hyper-parameter classes as `pickles.Opaque`.

    Args:
      path: a file of torch.save, torch >= 1.6.
      opaque: more module names, or "module.name"s, whose objects are read as inert data.
      start, size: where in `path` the file lies, in bytes: a member of an uncompressed tar is
        read, and mapped, inside the archive.

    Raises:
      TorchFileError: with the path, what is wrong and what to do.
    """
    path = os.fspath(path)
    size = os.path.getsize(path) - start if size is None else size
    try:
        # an empty file cannot be mapped
        data = np.memmap(path, np.uint8, "r", start, size) if size else np.zeros(0, np.uint8)
        archive = _Archive(np.asarray(data))
        return pickles.loads(
            archive.bytes("data.pkl"),
            functions=_FUNCTIONS,
            values={**NAMED, **STORAGES, **UNTYPED},
            opaque=(*OPAQUE, *opaque),
            persistent=archive.storage,
        )
    except pickles.PickleError as e:
        raise TorchFileError(f"{path}: {e}") from e


class _Storage(typing.NamedTuple):
    array: np.ndarray  # one-dimensional; bytes where the dtype comes with the tensor


class _Archive:
    """The storages and tensors of one file."""

    def __init__(self, data):
        self.map = data
        self.members, name = torch_zip.members(data)
        self.prefix = name.removesuffix("data.pkl")
        if self.prefix + "byteorder" in self.members and self.bytes("byteorder") != b"little":
            raise Damage("written on a big-endian machine; save it again on a little-endian one")

    def bytes(self, name):
        start, size = self.members[self.prefix + name]
        return self.map[start : start + size].tobytes()

    def storage(self, pid):
        """The storage of a persistent id ("storage", type, key, location, number of elements)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise Damage("the pickle refers to something that is not a storage")
        _, dtype, key, _, count = pid
        if type(key) is not str:  # tuples of a pickle share parts: their text may have no end
            raise Damage(f"a storage whose name is a {type(key).__name__}")
        where = self.members.get(f"{self.prefix}data/{key}")
        if where is None:
            raise Damage(f"storage {key!r:.100} is missing from the file")
        if not isinstance(dtype, np.dtype | None) or type(count) is not int:
            raise Damage(f"storage {key!r} has an unknown type")
        size = 1 if dtype is None else dtype.itemsize
        if count * size != where.size:
            raise Damage(
                f"storage {key!r} claims {count} x {size} bytes, the file has {where.size}"
            )
        part = self.map[where.start : where.start + where.size]
        return _Storage(part if dtype is None else part.view(dtype))


def _tensor(storage, offset, size, stride, *_):
    """The view of a storage, if its elements lie inside and are distinct."""
    if not isinstance(storage, _Storage):
        raise Damage("a tensor of something that is not a storage")
    return _view(storage.array, offset, size, stride)


def _tensor_v3(storage, offset, size, stride, grad, hooks, dtype, *_):
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
        raise Damage("a tensor of something that is not a storage, or of an unknown dtype")
    if storage.array.nbytes % dtype.itemsize:
        raise Damage(f"a storage of {storage.array.nbytes} bytes cannot hold {dtype}")
    return _view(storage.array.view(dtype), offset, size, stride)


def _ordered_dict(*args):
    if args:  # torch writes its items one by one
        raise Damage("an OrderedDict made of arguments")
    return collections.OrderedDict()


def _bytes(text, encoding):
    if encoding != "latin1":  # how protocol 2 writes bytes
        raise Damage("bytes as text in another encoding than latin1")
    return text.encode("latin1")


def _view(flat, offset, size, stride):
    """flat[offset + sum i·stride] for all i < size, read-only, if that lies inside `flat` and no
    two elements share memory (an expanded tensor would make a huge array of a tiny file).
    """
    if type(size) is not tuple or type(stride) is not tuple:
        kinds = f"{type(size).__name__} and {type(stride).__name__}"
        raise Damage(f"a tensor whose shape and strides are {kinds}, not tuples")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 32 or any(type(n) is not int for n in numbers):
        raise Damage("a tensor whose shape and strides are not as many whole numbers, at most 32")
    shown = f"a tensor of shape {size}, strides {stride}, offset {offset}"
    if min(numbers) < 0:
        raise Damage(f"{shown}: negative numbers")
    if 0 in size:
        return np.zeros(size, flat.dtype)
    reach = 0  # of the elements so far, beyond the first one
    for step, n in sorted((s, n) for n, s in zip(size, stride, strict=True) if n > 1):
        if step <= reach:
            raise Damage(f"{shown} has elements that share memory; save it as .contiguous()")
        reach += (n - 1) * step
    if offset + reach >= flat.size:
        raise Damage(f"{shown} lies outside its storage of {flat.size} elements")
    flat = flat[offset : offset + reach + 1]
    strides = tuple(s * flat.itemsize if n > 1 else flat.itemsize for n, s in zip(size, stride))
    return np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)


_FUNCTIONS = {  # what the pickle may call, by torch's names
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _bytes,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
}


# ---- writing -------------------------------------------------------------------------------------


def write(path, tree):
    """Writes a file that torch.load(path, weights_only=True) reads: `tree` with its arrays as CPU
    tensors, bit for bit.

    tree: dict, list or tuple of arrays, str, int, float, bool and None. Lazy arrays are read one at
    a time. Arrays that are the same memory (or the same Lazy) are stored once, as torch stores tied
    tensors. The file appears whole or not at all.

    Raises:
      TorchFileError: something that such a file cannot hold, with its place in the tree.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    storages = {}  # (number, array) by where its elements lie
    out = bytearray(b"\x80\x02")
    _emit(out, tree, storages, names, "")
    out += b"."
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "archive/data.pkl", bytes(out))
        _add(archive, "archive/byteorder", b"little")
        for number, array in storages.values():
            flat = np.ascontiguousarray(array).reshape(-1)  # one copy at a time
            _add(archive, f"archive/data/{number}", memoryview(flat.view(np.uint8)))
        _add(archive, "archive/version", b"3\n")


def _add(archive, name, data):
    """Adds a member whose bytes begin at a multiple of 64, as torch's do, for mapping."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    start = archive.fp.tell() + 30 + len(name) + 4
    if len(data) * 1.05 > zipfile.ZIP64_LIMIT:
        start += 20  # the sizes that zipfile adds to the header of a large member
    info.extra = struct.pack("<HH", 0x4246, -start % 64) + bytes(-start % 64)
    archive.writestr(info, data)


def _place(array):
    """The same for two existing arrays only if they are the same elements in the same order."""
    if isinstance(array, Lazy):
        return id(array)
    order = "C" if array.flags.c_contiguous else (array.shape, array.strides)
    return array.__array_interface__["data"][0], array.dtype, array.size, order


def _emit(out, value, storages, names, where):
    """Appends the opcodes of protocol 2 that push `value`."""
    if value is None or isinstance(value, bool):
        out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int) and -(2**31) <= value < 2**31:
        out += b"J" + struct.pack("<i", value)
    elif isinstance(value, int) and -(2**63) <= value < 2**63:
        out += b"\x8a\x08" + struct.pack("<q", value)
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(raw)) + raw
    elif isinstance(value, dict):
        out += b"}("
        for name, item in value.items():
            _emit(out, name, storages, names, where)
            _emit(out, item, storages, names, f"{where}/{name}")
        out += b"u"
    elif isinstance(value, list | tuple):
        out += b"(" if isinstance(value, tuple) else b"]("
        for number, item in enumerate(value):
            _emit(out, item, storages, names, f"{where}/{number}")
        out += b"t" if isinstance(value, tuple) else b"e"
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        array = value if isinstance(value, Lazy) else np.asarray(value)
        if array.dtype not in names:
            raise TorchFileError(f"{where or 'the tree'}: torch files hold no {array.dtype} here")
        number, _ = storages.setdefault(_place(array), (len(storages), array))
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        _emit(out, "storage", storages, names, where)
        out += f"ctorch\n{names[array.dtype]}Storage\n".encode()
        for part in (str(number), "cpu", array.size):
            _emit(out, part, storages, names, where)
        out += b"tQ"
        for part in (0, array.shape, strides, False):
            _emit(out, part, storages, names, where)
        out += b"ccollections\nOrderedDict\n)RtR"
    else:
        raise TorchFileError(f"{where or 'the tree'}: a torch file holds no {type(value).__name__}")
