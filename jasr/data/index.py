"""One index of utterances over NeMo manifests, lhotse CutSets and lhotse Shar directories.

The index holds columns (numpy arrays and byte blobs), not a Python object a row, so that ten
million utterances fit beside a training run. What cannot be used is kept as a `Bad` with its
source, line, identifier and reason; what can be is not touched by what cannot.
"""

import array
import dataclasses
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jasr.data import buckets, recording
from jasr.data.config import DataError
from jasr.data.entries import (
    Bad,
    entries_of,
    in_folder,
    named,
    open_list,
    reason_class,
    source_pairs,
)
from jasr.text import TextError

EXACT = 0.02  # seconds by which decoded audio may differ from its header
HEADER_CHECK_ROWS = 20_000  # data.check="auto" reads the headers of sets up to this size

COLUMNS = {
    "source": "i",
    "list": "i",
    "line": "i",
    "at": "q",
    "file": "i",
    "byte_start": "q",
    "byte_size": "q",
    "start": "d",
    "duration": "d",
    "channel": "i",
    "token_count": "i",
}
TYPES = {"d": np.float64, "i": np.int32, "q": np.int64}


class Strings:
    """Many strings in one blob; `strings[i] -> str`. Grows by `append`."""

    def __init__(self):
        self.blob, self.ends = bytearray(), array.array("q", [0])

    def append(self, text):
        self.blob += text.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.blob))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return bytes(self.blob[self.ends[i] : self.ends[i + 1]]).decode("utf-8", "surrogatepass")


@dataclasses.dataclass
class Index:
    """The usable utterances as columns, and the account of those that are not.

    columns, one value a row: source (number in `sources`), list (number in `lists`), line and at
    (its line there, and that line's byte offset), file (number in `files`), byte_start and
    byte_size (inside a tar; -1: a file of its own), start (s; -1: the whole recording), duration
    (s), channel (-1: the mean), token_count.
    """

    sources: list
    weights: tuple
    columns: dict
    files: Strings
    lists: Strings
    ids: Strings
    texts: Strings
    bad: list = dataclasses.field(default_factory=list)
    exact: bool = False  # durations were read from the audio

    def __getattr__(self, name):
        if name in COLUMNS:
            return self.columns[name]
        raise AttributeError(name)

    def __len__(self):
        return len(self.columns["duration"])

    @property
    def bad_count(self):
        """Entries left out for a defect (not by a setting)."""
        return sum(not b.filtered for b in self.bad)

    def path(self, row):
        """The audio file (or tar) of a row."""
        return in_folder(self.lists[self.list[row]], self.files[self.file[row]])

    def id(self, row):
        """The row's identifier: its source's, else the audio's path (and part) as written."""
        if ident := self.ids[row]:
            return ident
        part = f"@{self.start[row]:g}+{self.duration[row]:g}" if self.start[row] >= 0 else ""
        return self.files[self.file[row]] + part

    def entry(self, row):
        """The row's whole entry (dict), extra fields included, read again from its source."""
        with open_list(self.lists[self.list[row]]) as f:
            f.seek(int(self.at[row]))
            return json.loads(f.readline().decode("utf-8-sig"))

    def bad_row(self, row, reason, filtered=False):
        """The Bad of a row."""
        where = self.lists[self.list[row]], int(self.line[row]), self.id(row), self.path(row)
        return Bad(*where, reason, filtered)

    def tolerance(self, cfg):
        """Seconds by which a row's decoded audio may differ from its duration."""
        return min(EXACT, cfg.duration_tolerance) if self.exact else cfg.duration_tolerance

    def fingerprint(self):
        """Hex digest of what the plan depends on: order, durations, texts' sizes, file names."""
        h = hashlib.sha256(repr(self.weights).encode())
        for column in (self.source, self.token_count, np.round(self.duration * 1e4)):
            h.update(column.astype("<i8").tobytes())
        h.update(self.ids.blob)
        for file in self.files:
            h.update(os.path.basename(file).encode("utf-8", "surrogatepass"))
        return h.hexdigest()[:16]

    def describe(self):
        """A few lines: utterances and hours of each source, and what was left out and why."""
        lines = []
        for s, path in enumerate(self.sources):
            seconds = self.duration[self.source == s]
            weight = f", weight {self.weights[s]:g}" if any(self.weights) else ""
            hours = seconds.sum() / 3600
            lines.append(f"{path}: {len(seconds)} utterances, {hours:.2f} h{weight}")
        counts = Counter((b.filtered, reason_class(b.reason)) for b in self.bad)
        for (filtered, reason), n in sorted(counts.items()):
            lines.append(f"  {'left out' if filtered else 'quarantined'} {n}: {reason}")
        return "\n".join(lines)


def build(sources, encode, cfg, frames_needed=None, seconds_per_frame=0.0, evaluation=False):
    """The Index of `sources`, as `collect` gives it, if enough of it is usable.

    Raises DataError when a source cannot be read, nothing usable is left, or more than
    `cfg.max_bad_share` of the entries is bad.
    """
    index = collect(sources, encode, cfg, frames_needed, seconds_per_frame, evaluation)
    stop_if_too_bad(index, cfg.max_bad_share)
    return index


def collect(sources, encode, cfg, frames_needed=None, seconds_per_frame=0.0, evaluation=False):
    """The Index of `sources`, its `bad` holding every entry left out.

    encode: text -> list of token ids; may raise TextError. frames_needed: tokens -> frames that
    the loss needs at least, of `seconds_per_frame` each; utterances too short for their text (at
    the fastest speed) are bad. With `evaluation`, the duration and token limits do not apply, and
    a text that cannot be encoded keeps its row. Raises DataError for an unreadable source.
    """
    buckets.check(cfg)
    if frames_needed and not seconds_per_frame > 0:
        raise DataError("frames_needed needs seconds_per_frame above 0")
    pairs = source_pairs(sources)
    b = _Builder()
    for number, (path, _) in enumerate(pairs):
        for e in entries_of(path):
            if isinstance(e, Bad):
                b.bad.append(e)
                continue
            tokens, reason = encode_text(e.text, encode, cfg.min_tokens, evaluation)
            if reason:
                full = in_folder(e.list_path, e.file)
                b.bad.append(Bad(e.list_path, e.line, e.id or e.file, full, reason))
                continue
            needed = frames_needed(tokens) * seconds_per_frame if frames_needed else 0.0
            b.add(e, number, len(tokens), needed)
    index = b.index(pairs)
    ok = np.ones(len(index), bool)
    _drop_repeats(index, ok, np.frombuffer(b.audio_keys, np.uint64), "duplicate audio")
    _drop_repeats(index, ok, np.frombuffer(b.id_keys, np.uint64), "duplicate id")
    _check_audio(index, ok, cfg)
    _filter(index, ok, np.frombuffer(b.needed), cfg, evaluation)
    if cfg.check == "decode":
        _look_at(recording.decoded_seconds, index, ok, np.flatnonzero(ok), cfg)
    index = take(index, ok)
    order = {path: n for n, (path, _) in enumerate(pairs)}
    index.bad.sort(key=lambda x: (order.get(x.source, len(order)), x.source, x.line))
    return index


def encode_text(text, encode, min_tokens, evaluation):
    """(tokens, reason): the tokens of a text, or why it cannot be used.

    In evaluation, words that cannot be encoded are left out of the tokens instead.
    """
    if not text.strip():
        return [], "" if min_tokens == 0 else "empty text"
    try:
        return encode(text), ""
    except TextError as e:
        if not evaluation:
            return [], f"text cannot be encoded: {e}"
    known = [word for word in text.split() if _encodes(word, encode)]
    return (encode(" ".join(known)) if known else []), ""


def _encodes(text, encode):
    try:
        encode(text)
    except TextError:
        return False
    return True


class _Builder:
    """Grows the columns of an Index from entries."""

    def __init__(self):
        self.columns = {name: array.array(code) for name, code in COLUMNS.items()}
        self.needed = array.array("d")
        self.audio_keys, self.id_keys = array.array("Q"), array.array("Q")
        self.files, self.lists, self.ids, self.texts = Strings(), Strings(), Strings(), Strings()
        self.bad = []
        self.last_file = self.last_list = None

    def add(self, e, source, token_count, seconds_needed):
        if e.list_path != self.last_list:
            self.lists.append(e.list_path)
            self.last_list, self.last_file = e.list_path, None
        if e.file != self.last_file:
            self.files.append(e.file)
            self.last_file, self.full = e.file, in_folder(e.list_path, e.file)
        row = (source, len(self.lists) - 1, e.line, e.at, len(self.files) - 1, e.byte_start)
        row += (e.byte_size, e.start, e.duration, e.channel, token_count)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.ids.append(e.id)
        self.texts.append(e.text)
        self.needed.append(seconds_needed)
        part = f"{e.start:.4f}+{e.duration:.4f}" if e.start >= 0 else ""
        audio = f"{source}\0{self.full}\0{e.byte_start}\0{e.channel}\0{part}"
        self.audio_keys.append(key := _hash(audio))
        self.id_keys.append(_hash(f"{source}\0{e.id}") if e.id else key)

    def index(self, pairs):
        columns = {
            name: np.frombuffer(self.columns[name], TYPES[code]).copy()
            for name, code in COLUMNS.items()
        }
        sources, weights = [p for p, _ in pairs], tuple(w for _, w in pairs)
        strings = (self.files, self.lists, self.ids, self.texts)
        return Index(sources, weights, columns, *strings, self.bad)


def _hash(name):
    raw = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little")


def _drop_repeats(index, ok, keys, what):
    """Leaves out the later ones of rows with the same key."""
    rows = np.flatnonzero(ok)
    _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    for i in np.flatnonzero(firsts != np.arange(len(rows))):
        row, other = int(rows[i]), int(rows[firsts[i]])
        ok[row] = False
        index.bad.append(index.bad_row(row, f"{what}: as in line {index.line[other]}"))


def _check_audio(index, ok, cfg):
    """Compares the rows with their files, as far as headers tell; fills in durations."""
    kind = cfg.check
    if kind == "auto":
        kind = "header" if len(index) <= HEADER_CHECK_ROWS else "files"
    rows = np.flatnonzero(ok)
    if kind == "files":
        for row in rows:
            if not os.path.isfile(index.path(row)):
                ok[row] = False
                index.bad.append(index.bad_row(row, "missing file"))
    index.exact = kind in ("header", "decode")
    if not index.exact:
        rows = np.flatnonzero(ok & (index.duration < 0))
    _look_at(recording.header_seconds, index, ok, rows, cfg)


def _look_at(look, index, ok, rows, cfg):
    """Takes durations from `look(index, row, cfg)`, which says a reason where a row is bad."""
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        found = pool.map(lambda row: look(index, row, cfg), rows.tolist())
        for row, seconds in zip(rows.tolist(), found, strict=True):
            if isinstance(seconds, str):
                ok[row] = False
                index.bad.append(index.bad_row(row, seconds))
            else:
                index.duration[row] = seconds


def _filter(index, ok, needed, cfg, evaluation):
    """Leaves out what the limits of `cfg` exclude, and texts too long for their audio."""
    seconds, tokens = index.duration, index.token_count
    fastest = 1.0 if evaluation else max(1.0, *cfg.speeds)
    tests = [(seconds < needed * fastest, False, "text too long for its audio: {t} in {d:.2f} s")]
    if not evaluation:
        tests += [
            (seconds < cfg.min_duration, True, "too short: {d:.2f} s"),
            (_above(seconds, longest(cfg)), True, "too long: {d:.2f} s"),
            (tokens < cfg.min_tokens, True, "too few tokens: {t}"),
            (_above(tokens, cfg.max_tokens), True, "too many tokens: {t}"),
        ]
    for fails, filtered, reason in tests:
        for row in np.flatnonzero(ok & fails):
            said = reason.format(d=seconds[row], t=tokens[row])
            index.bad.append(index.bad_row(row, said, filtered))
        ok &= ~fails


def _above(values, limit):
    """bool[N]: above a limit, of which 0 is none."""
    return values > limit if limit > 0 else np.zeros(len(values), bool)


def longest(cfg):
    """Seconds of the longest utterance allowed, by max_duration and the last explicit bucket."""
    limits = [cfg.max_duration] if cfg.max_duration > 0 else []
    if cfg.bucket_duration_bins:
        last = cfg.bucket_duration_bins[-1]
        limits.append(float(last[0] if isinstance(last, (tuple, list)) else last))
    return min(limits, default=0.0)


def take(index, ok):
    """The index with the rows where `ok` alone."""
    if ok.all():
        return index
    rows = np.flatnonzero(ok).tolist()
    ids, texts = Strings(), Strings()
    for row in rows:
        ids.append(index.ids[row])
        texts.append(index.texts[row])
    columns, files = {name: column[rows] for name, column in index.columns.items()}, Strings()
    old = columns["file"]
    begins = np.append(True, old[1:] != old[:-1])[: len(old)]
    for file in old[begins]:  # a file that no row is left of is no part of the index
        files.append(index.files[file])
    columns["file"] = (np.cumsum(begins) - 1).astype(np.int32)
    return dataclasses.replace(index, columns=columns, files=files, ids=ids, texts=texts)


def stop_if_too_bad(index, max_bad_share):
    """Raises DataError when nothing is usable or the share of bad entries is too great."""
    bad, total = index.bad_count, len(index) + len(index.bad)
    worst = Counter(reason_class(x.reason) for x in index.bad).most_common(3)
    reasons = ", ".join(f"{n} × {r}" for r, n in worst)
    examples = "; ".join(map(named, index.bad[:3]))
    sources = ", ".join(index.sources)
    if not total:
        raise DataError(f"no utterance in {sources}: it is empty")
    if not len(index):
        raise DataError(f"no usable utterance in {sources} of {total}: {reasons}; {examples}")
    if bad > max_bad_share * total:
        raise DataError(
            f"{bad} of {total} entries of {sources} are bad ({reasons}), more than "
            f"data.max_bad_share={max_bad_share:g}: {examples}. `python -m experiments.doctor "
            "data` lists them all; repair them or raise data.max_bad_share."
        )
