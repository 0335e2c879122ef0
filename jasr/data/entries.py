"""What a data source says, line by line: an Entry for each utterance, a Bad for what is none.

NeMo manifests are read here, lhotse's formats in `shar`. Nothing of an entry is interpreted beyond
its types; whether its audio and text can be used is the index's matter.
"""

import functools
import json
import math
import os
import sys
from typing import NamedTuple

from jasr.data.config import DataError


class Entry(NamedTuple):
    """One utterance as its source describes it."""

    list_path: str  # the file that holds its line
    line: int
    at: int  # byte offset of the line in the (uncompressed) file
    id: str  # "" where the source gives none: the path stands for it
    file: str  # path of the audio, or of the tar that holds it; relative to the list's folder
    byte_start: int  # of the audio inside a tar; -1: the audio is a file of its own
    byte_size: int
    start: float  # seconds; -1: the audio is the whole recording
    duration: float  # seconds; -1: not given
    channel: int  # -1: the mean of all
    text: str


class Bad(NamedTuple):
    """One entry that is left out.

    filtered: by a setting, not for a defect; loading: it failed when its turn came in training.
    """

    source: str
    line: int
    id: str
    audio: str
    reason: str
    filtered: bool = False
    loading: bool = False


def source_pairs(sources):
    """[(path, weight)] of a sources setting: a path, or a sequence of paths or [path, weight].

    Weight 0 stands for "none given". Raises DataError: no source, or weights for some only.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = (sources,)
    if len(sources) == 2 and isinstance(sources[1], (int, float)):
        sources = (sources,)
    pairs = []
    for s in sources:
        given = not isinstance(s, (str, os.PathLike))
        if given and (len(s) != 2 or not is_number(s[1]) or s[1] <= 0):
            raise DataError(f"a data source is a path or [path, weight above 0], got {s!r}")
        path, weight = s if given else (s, 0.0)
        pairs.append((os.fspath(path), float(weight)))
    if not pairs:
        raise DataError("no data source given: set data.train (or data.valid) to a manifest")
    if len({w > 0 for _, w in pairs}) > 1:
        raise DataError(f"give a weight to every data source or to none: {pairs}")
    return pairs


def entries_of(source):
    """Yields an Entry or Bad for each utterance of a source, whose kind is seen from itself."""
    from jasr.data import shar

    if os.path.isdir(source):
        return shar.shar_entries(source)
    if not os.path.isfile(source):
        raise DataError(f"data source {source} does not exist")
    if shar.is_cutset(source):
        return shar.cutset_entries(source)
    return manifest_entries(source)


def texts(sources):
    """Yields the texts of sources without a look at the audio: what a tokenizer is made from."""
    for path, _ in source_pairs(sources):
        for e in entries_of(path):
            if isinstance(e, Entry):
                yield e.text


def sentences(sources):
    """Yields the texts of manifests, CutSets, Shar directories and plain text files (.txt, a
    sentence a line); says on standard error how many entries were left out.

    Raises:
      DataError: a source that cannot be read.
    """
    for path, _ in source_pairs(sources):
        if path.endswith(".txt"):
            yield from _lines(path)
            continue
        bad = []
        for entry in entries_of(path):
            if isinstance(entry, Entry):
                yield entry.text
            else:
                bad.append(entry)
        if bad:
            say(f"{path}: {len(bad)} entries left out; {named(bad[0])}")


def _lines(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            yield from f
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read {path}: {e}") from e


def manifest_entries(path):
    """Yields an Entry or Bad for each line of a NeMo manifest."""
    for number, at, d, reason in json_lines(path):
        if d is None:
            yield Bad(path, number, "", "", reason)
            continue
        name, text = d.get("audio_filepath"), d.get("text")
        ident = str(d.get("id") or d.get("utt_id") or "")
        missing = [k for k in ("audio_filepath", "text") if d.get(k) is None]
        start, duration = (-1.0 if (x := d.get(k)) is None else x for k in ("offset", "duration"))
        if missing:
            reason = f"missing key: {', '.join(missing)}"
        elif not isinstance(text, str):
            reason = f"text is not a string: {text!r:.80}"
        elif not isinstance(name, str) or not name:
            reason = f"audio_filepath is not a path: {name!r:.80}"
        elif not is_number(start) or not is_number(duration):
            reason = f"offset or duration is not a number: {start!r:.40}, {duration!r:.40}"
        elif start >= 0 and duration < 0:
            reason = "missing key: duration, needed beside offset"
        elif 0 in (duration,) or (duration < 0 and d.get("duration") is not None):
            reason = f"duration is not above 0: {duration!r}"
        else:
            name = os.path.expanduser(name)
            yield Entry(path, number, at, ident, name, -1, -1, start, duration, -1, text)
            continue
        yield Bad(path, number, ident, name if isinstance(name, str) else "", reason)


def json_lines(path):
    """Yields (line number, byte offset, dict or None, reason) for each line of a JSON-lines file.

    Byte-order marks, CRLF and blank lines are accepted. Raises DataError for an unreadable file.
    """
    at = 0
    try:
        with open_list(path) as f:
            for number, raw in enumerate(f, 1):
                here, at = at, at + len(raw)
                if not raw.strip():
                    continue
                try:
                    value = json.loads(raw.decode("utf-8-sig"))
                except (ValueError, RecursionError) as e:
                    yield number, here, None, f"bad JSON: {e}"
                    continue
                if isinstance(value, dict):
                    yield number, here, value, ""
                else:
                    yield number, here, None, f"bad JSON: a {type(value).__name__}, not an object"
    except (OSError, EOFError) as e:
        raise DataError(f"cannot read {path}: {e}") from e


def open_list(path):
    """A binary file over a manifest, decompressed where its name ends in .gz."""
    if path.endswith(".gz"):
        import gzip

        return gzip.open(path, "rb")
    return open(path, "rb")


def is_number(x):
    """Whether x is a finite int or float (not a bool)."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


@functools.lru_cache(maxsize=64)
def folder_of(list_path):
    """The absolute folder of a list."""
    return os.path.dirname(os.path.abspath(list_path))


def in_folder(list_path, file):
    """The path of an audio file named in a list."""
    return os.path.normpath(os.path.join(folder_of(list_path), file))


def reason_class(reason):
    """A reason without its particulars: what is before the first colon."""
    return reason.split(":", 1)[0]


def named(bad):
    """One line that names a Bad: source:line audio: reason."""
    where = f"{bad.source}:{bad.line}" if bad.line else bad.source
    return f"{' '.join(filter(None, (where, bad.audio or bad.id)))}: {bad.reason}"


def quarantine_line(bad):
    """The JSON line of a Bad: source, line, id, audio, reason, filtered, loading."""
    return json.dumps(bad._asdict(), ensure_ascii=False) + "\n"


def loading_lines(path):
    """The lines of a quarantine file (if there is one) about what failed while it was loaded."""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as f:
            return [line for line in f if line.endswith('"loading": true}\n')]
    except FileNotFoundError:
        return []


def write_quarantine(path, bad, keep=()):
    """Writes the lines `keep` and one JSON line for each Bad, replacing the file at once."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    part = f"{path}.{os.getpid()}"
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
        f.writelines([*map(quarantine_line, bad), *keep])
    os.replace(part, path)


def say(text):
    """Prints to standard error, where logs go."""
    print(text, file=sys.stderr, flush=True)
