"""Recordings in memory as a source of data, for machines and tests without files or decoders.

words = memory.hold("words", [{"audio_filepath": samples, "text": "one two"}, ...])
config["data"]["train"] = (words,)
"""

import numpy as np

from jasr.data.config import DataError

PREFIX = "memory://"
_lines, _arrays = {}, {}


def hold(name, lines):
    """ "memory://name", by which this process finds `lines` as a source of a DataConfig.

    Args:
      name: of the source; what had it before is replaced.
      lines: mappings with the keys of a manifest's line. Where the path of a recording would stand,
        at any depth, there is an array f32[S] of mono samples at config.data.sample_rate.

    Raises:
      DataError: an array of another type or number of axes.
    """
    source = PREFIX + name
    for old in [path for path in _arrays if path.startswith(f"{source}/")]:
        del _arrays[old]
    _lines[source] = [_named(line, f"{source}/{n}") for n, line in enumerate(lines, 1)]
    return source


def _named(value, name):
    """A value with names in place of its arrays, which are kept under them."""
    if isinstance(value, dict):
        return {key: _named(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner, f"{name}.{n}") for n, inner in enumerate(value)]
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim != 1 or value.dtype != np.float32:
        raise DataError(f"{name} is {value.dtype}{list(value.shape)}; samples are f32[S], mono")
    _arrays[name] = value
    return name


def lines(source):
    """The mappings of a source. Raises DataError if this process holds none of that name."""
    if source not in _lines:
        raise DataError(f"data source {source} is not held by this process (data.memory.hold)")
    return _lines[source]


def samples(path):
    """f32[S] of a recording that a line names; None for a path of a file.

    Raises DataError if it is not held any more.
    """
    if not (isinstance(path, str) and path.startswith(PREFIX)):
        return None
    if path not in _arrays:
        raise DataError(f"{path} is not held by this process (data.memory.hold)")
    return _arrays[path]
