"""What a data source says, line by line: a Line each, a Bad for what is none.

NeMo manifests are read here, lhotse's formats in `shar`, whose cuts become lines with the keys of a
manifest. What items a line holds is its layout's matter; recordings with a text, which are most,
are read by `spoken`.
"""

import functools
import gzip
import json
import math
import os
import sys
from typing import NamedTuple

from jasr.data import memory
from jasr.data.config import DataError
from jasr.seam import Item, Piece

NAMES = ("id", "utt_id", "audio_filepath", "offset", "duration")  # of a line: no fields of items


class Line(NamedTuple):
    """A line of a list: the file that holds it, its number there, and what it says.

    values: the keys of a NeMo manifest; `audio_filepath` is a path relative to the list's folder,
    or a whole seam.Piece where lhotse's cut says more.
    """

    list_path: str
    number: int
    values: dict


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


def lines_of(source):
    """Yields a Line or Bad for each line of a source, whose kind is seen from itself."""
    from jasr.data import shar

    if source.startswith(memory.PREFIX):
        yield from (Line(source, n, line) for n, line in enumerate(memory.lines(source), 1))
    elif os.path.isdir(source):
        yield from shar.shar_lines(source)
    elif not os.path.isfile(source):
        raise DataError(f"data source {source} does not exist")
    elif shar.is_cutset(source):
        yield from shar.cut_lines(source)
    else:
        for number, values, reason in json_lines(source):
            is_line = values is not None
            yield Line(source, number, values) if is_line else Bad(source, number, "", "", reason)


def items_of(source, items):
    """Yields (Line, Item) or a Bad for each item of a source.

    items: seam.Layout.items, or another function of a line's values.
    """
    for line in lines_of(source):
        if isinstance(line, Bad):
            yield line
            continue
        try:
            for item in items(line.values):
                yield line, item
        except DataError as e:
            yield bad_line(line, str(e))


def bad_line(line, reason):
    """The Bad of a Line."""
    audio = line.values.get("audio_filepath")
    audio = audio.source if isinstance(audio, Piece) else audio
    return Bad(*line[:2], id_of(line.values), audio if isinstance(audio, str) else "", reason)


def id_of(values):
    """The identifier that a line gives, or ""."""
    return str(values.get("id") or values.get("utt_id") or "")


def spoken(values):
    """The Item of a line that is a recording and its text. Raises DataError with the reason."""
    if missing := [k for k in ("audio_filepath", "text") if values.get(k) is None]:
        raise DataError(f"missing key: {', '.join(missing)}")
    if not isinstance(values["text"], str):
        raise DataError(f"text is not a string: {values['text']!r:.80}")
    fields = {k: v for k, v in values.items() if k not in NAMES}
    return Item(id_of(values), (piece_of(values),), fields)


def piece_of(values):
    """The Piece that audio_filepath, offset and duration of a line name; DataError: none."""
    name = values.get("audio_filepath")
    if isinstance(name, Piece):
        return name
    start, seconds = (-1.0 if (x := values.get(k)) is None else x for k in ("offset", "duration"))
    if not isinstance(name, str) or not name:
        raise DataError(f"audio_filepath is not a path: {name!r:.80}")
    if not is_number(start) or not is_number(seconds):
        raise DataError(f"offset or duration is not a number: {start!r:.40}, {seconds!r:.40}")
    if start >= 0 and seconds < 0:
        raise DataError("missing key: duration, needed beside offset")
    if seconds == 0 or (seconds < 0 and values.get("duration") is not None):
        raise DataError(f"duration is not above 0: {seconds!r}")
    return Piece(os.path.expanduser(name), start=start, seconds=seconds)


def texts(sources):
    """Yields the texts of sources without a look at the audio: what a tokenizer is made from.

    Text files (.txt, a sentence a line) are sources here too. Says on standard error how many
    entries were left out.

    Raises:
      DataError: a source that cannot be read.
    """
    for path, _ in source_pairs(sources):
        if path.endswith(".txt"):
            try:
                with open(path, encoding="utf-8-sig") as f:
                    yield from f
            except (OSError, UnicodeDecodeError) as e:
                raise DataError(f"cannot read {path}: {e}") from e
            continue
        bad = []
        for found in items_of(path, lambda values: [spoken(values)]):
            if isinstance(found, Bad):
                bad.append(found)
            else:
                yield found[1].fields["text"]
        if bad:
            say(f"{path}: {len(bad)} entries left out; {named(bad[0])}")


def json_lines(path):
    """Yields (line number, dict or None, reason) for each line of a JSON-lines file.

    Byte-order marks, CRLF, blank lines and .gz are accepted. DataError: an unreadable file.
    """
    decode = json.JSONDecoder().decode
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                if not raw.strip():
                    continue
                try:
                    value = decode(raw.decode().removeprefix("\ufeff"))
                except (ValueError, RecursionError) as e:
                    yield number, None, f"bad JSON: {e}"
                    continue
                if isinstance(value, dict):
                    yield number, value, ""
                else:
                    yield number, None, f"bad JSON: a {type(value).__name__}, not an object"
    except (OSError, EOFError) as e:
        raise DataError(f"cannot read {path}: {e}") from e


def is_number(x):
    """Whether x is a finite int or float (not a bool)."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


@functools.lru_cache(maxsize=64)
def folder_of(list_path):
    """The absolute folder of a list."""
    return os.path.dirname(os.path.abspath(list_path))


def in_folder(list_path, file):
    """The path of an audio file named in a list."""
    if file.startswith(memory.PREFIX):
        return file
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
