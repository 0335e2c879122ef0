"""Recordings in memory as a source of data, for machines and tests without files or decoders.

words = memory.hold("words", [{"audio_filepath": samples, "text": "one two"}, ...])
config["data"]["train"] = (words,)
"""

import numpy as np

from jasr.audio import AudioError
from jasr.data.config import DataError

PREFIX = "memory://"
_held = {}  # {source: (lines, {path: samples})}


def hold(name, lines):
    """ "memory://name", by which this process finds `lines` as a source of a DataConfig.

    Args:
      name: of the source; what had it before is replaced.
      lines: mappings with the keys of a manifest's line. Where the path of a recording would stand,
        at any depth, there is an array f32[S] of mono samples at config.data.sample_rate.

    Raises:
      DataError: an array of another type or number of axes.
    """
    source, arrays = PREFIX + name, {}

    def named(value, where):
        """A value with paths in place of its arrays."""
        if isinstance(value, dict):
            return {key: named(inner, f"{where}, {key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [named(inner, where) for inner in value]
        if not isinstance(value, np.ndarray):
            return value
        if value.ndim != 1 or value.dtype != np.float32:
            raise DataError(f"{where}: {value.dtype}{list(value.shape)}; samples are f32[S], mono")
        path = f"{source}/{len(arrays)}"
        arrays[path] = value
        return path

    made = [named(line, f"{source}, line {n}") for n, line in enumerate(lines, 1)]
    _held[source] = made, arrays
    return source


def lines(source):
    """The mappings of a source. Raises DataError if this process holds none of that name."""
    if source not in _held:
        raise DataError(f"data source {source} is not held by this process (data.memory.hold)")
    return _held[source][0]


def samples(path):
    """f32[S] of a recording that a line names; None for a path of a file.

    Raises AudioError if this process does not hold it.
    """
    if not (isinstance(path, str) and path.startswith(PREFIX)):
        return None
    _, arrays = _held.get(path.rpartition("/")[0], ((), {}))
    if path not in arrays:
        raise AudioError(path, "not held by this process (data.memory.hold)")
    return arrays[path]
