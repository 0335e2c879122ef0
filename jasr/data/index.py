"""One index of utterances over NeMo manifests, lhotse CutSets and lhotse Shar directories.

The index holds columns (numpy arrays and byte blobs), not one Python object a row, so that ten
million utterances fit beside a training run. What cannot be used goes to the quarantine with its
source, line, identifier and reason; what is used is not touched by what is not.
"""

import array
import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from jasr import audio
from jasr.text import TextError

HEADER_CHECK_ROWS = 20_000  # "auto" reads the headers of sets up to this size


class DataError(ValueError):
    """Data cannot be used: a missing source, too many bad entries, impossible settings."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained and validated on, and how utterances are put into batches.

    Sources are manifests (`.jsonl`, `.json`), CutSets (`.jsonl`, `.jsonl.gz`) or Shar directories;
    a source may be a pair [path, weight]. Durations in seconds, sizes in what their name says.
    """

    train: tuple = ()
    valid: tuple = ()
    sample_rate: int = 16000
    # which utterances are used; 0 for a maximum = no limit
    min_duration: float = 0.1
    max_duration: float = 40.0
    min_tokens: int = 1
    max_tokens: int = 0
    # what counts as bad, and how much of it is accepted
    check: str = "auto"  # "none" | "files" exist | "header" is read | "decode" all | "auto"
    duration_tolerance: float = 0.1  # manifest against file
    max_bad_share: float = 0.05
    # buckets: estimated from the data, or given as upper edges: seconds, or (seconds, tokens)
    num_buckets: int = 4
    bucket_duration_bins: tuple = ()
    bucket_batch_size: tuple = ()  # rows of each bucket (or one number for all); () = by duration
    batch_duration: float = 120.0  # padded seconds in one global batch
    batch_multiple: int = 1  # global batch sizes are multiples of it (devices)
    length_multiple: int = 1280  # samples
    token_multiple: int = 8
    # variety
    speeds: tuple = (1.0,)
    concat: int = 1  # up to so many utterances in one row
    concat_share: float = 1.0  # share of the utterances that may be joined with others
    concat_gap: tuple = (0.1, 0.4)  # seconds of silence between them
    # the loader
    cache_audio: bool = True
    cache_mb: int = 2048
    num_threads: int = 2
    prefetch: int = 8  # batches


class Entry(NamedTuple):
    """One utterance as its source describes it; seconds; duration < 0 = not given."""

    line: int
    at: int  # byte offset of the line in its (uncompressed) file
    id: str
    path: str
    byte_start: int  # -1: the audio is the whole file
    byte_size: int
    start: float  # -1: the audio is the whole recording
    duration: float
    channel: int  # -1: the mean of all
    text: str
    list_path: str  # the file that holds the line


class Bad(NamedTuple):
    """One entry that cannot be used. `filtered`: left out by a setting, not by a defect."""

    source: str
    line: int
    id: str
    audio: str
    reason: str
    filtered: bool = False


class Strings:
    """Many strings in one blob; `strings[i] -> str`. Grows by `append`."""

    def __init__(self):
        self.blob, self.ends = bytearray(), array.array("q", [0])

    def append(self, text):
        self.blob += text.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.blob))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return bytes(self.blob[self.ends[i] : self.ends[i + 1]]).decode("utf-8", "surrogateescape")


@dataclasses.dataclass
class Index:
    """The usable utterances as columns, and the account of those that are not.

    duration f64[N] seconds, token_count i32[N], source i32[N] (number in `sources`), start f64[N]
    (-1 = the whole recording), byte_start i64[N] / byte_size i64[N] (inside a tar; -1 = a file).
    """

    sources: list
    weights: tuple
    duration: np.ndarray
    token_count: np.ndarray
    source: np.ndarray
    start: np.ndarray
    channel: np.ndarray
    byte_start: np.ndarray
    byte_size: np.ndarray
    line: np.ndarray
    at: np.ndarray
    list_number: np.ndarray
    file_number: np.ndarray
    files: Strings
    lists: Strings
    ids: Strings
    texts: Strings
    bad: list
    exact: bool  # durations were read from the files

    def __len__(self):
        return len(self.duration)

    @property
    def bad_count(self):
        return sum(not b.filtered for b in self.bad)

    def path(self, row):
        """The audio file (or tar) of a row."""
        return self.files[int(self.file_number[row])]

    def entry(self, row):
        """The row's whole entry (dict), extra fields included, read again from its source."""
        path = self.lists[int(self.list_number[row])]
        with open_list(path) as f:
            f.seek(int(self.at[row]))
            return json.loads(f.readline().decode("utf-8-sig"))

    def fingerprint(self):
        """Hex digest of what the plan depends on: order, names, durations and token counts."""
        h = hashlib.sha256()
        for column in (self.source, self.token_count, np.round(self.duration * 1e4).astype("<i8")):
            h.update(np.ascontiguousarray(column).tobytes())
        h.update(bytes(self.ids.blob))
        h.update(repr(self.weights).encode())
        return h.hexdigest()[:16]

    def describe(self):
        """A few lines: utterances and hours of each source, and what was left out and why."""
        lines = []
        for s, path in enumerate(self.sources):
            mine = self.source == s
            weight = f", weight {self.weights[s]:g}" if any(self.weights) else ""
            lines.append(
                f"{path}: {int(mine.sum())} utterances, "
                f"{self.duration[mine].sum() / 3600:.2f} h{weight}"
            )
        for (filtered, reason), n in sorted(
            Counter((b.filtered, reason_class(b.reason)) for b in self.bad).items()
        ):
            lines.append(f"  {'left out' if filtered else 'quarantined'} {n}: {reason}")
        return "\n".join(lines)


def reason_class(reason):
    """The reason without its particulars: what is before the first colon."""
    return reason.split(":", 1)[0]


def open_list(path):
    """A binary file over a manifest, decompressed if its name ends in .gz."""
    if path.endswith(".gz"):
        import gzip

        return gzip.open(path, "rb")
    return open(path, "rb")


def source_pairs(sources):
    """[(path, weight)] of a sources setting: a path, a list of paths, or of [path, weight].

    Weight 0 stands for "not given"; weights are given to all sources or to none.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = (sources,)
    if len(sources) == 2 and isinstance(sources[0], str) and isinstance(sources[1], (int, float)):
        sources = (sources,)
    pairs = []
    for s in sources:
        path, weight = (s, 0.0) if isinstance(s, (str, os.PathLike)) else s
        if not isinstance(s, (str, os.PathLike)) and not weight > 0:
            raise DataError(f"the weight of source {path} must be above 0, got {weight!r}")
        pairs.append((os.fspath(path), float(weight)))
    if not pairs:
        raise DataError("no data source given: set data.train / data.valid to a manifest")
    if any(w for _, w in pairs) and not all(w for _, w in pairs):
        raise DataError(f"give a weight to every source or to none: {pairs}")
    return pairs


def json_lines(path):
    """Yields (line number, byte offset, dict or None, reason) of a JSON-lines file."""
    at = 0
    try:
        with open_list(path) as f:
            for number, raw in enumerate(f, 1):
                here, at = at, at + len(raw)
                if not raw.strip():
                    continue
                try:
                    value = json.loads(raw.decode("utf-8-sig"))
                except ValueError as e:
                    yield number, here, None, f"bad JSON: {e}"
                    continue
                if isinstance(value, dict):
                    yield number, here, value, ""
                else:
                    yield number, here, None, f"bad JSON: a {type(value).__name__}, not an object"
    except (OSError, EOFError) as e:
        raise DataError(f"cannot read {path}: {e}") from e


def manifest_entries(path):
    """Yields an Entry or Bad for each line of a NeMo manifest."""
    folder = os.path.dirname(os.path.abspath(path))
    for number, at, d, reason in json_lines(path):
        if d is None:
            yield Bad(path, number, "", "", reason)
            continue
        name, text = d.get("audio_filepath"), d.get("text")
        ident = str(d.get("id") or d.get("utt_id") or name or "")
        where = (path, number, ident, name if isinstance(name, str) else "")
        missing = [k for k in ("audio_filepath", "text") if d.get(k) is None]
        if missing:
            yield Bad(*where, f"missing key: {', '.join(missing)}")
        elif not isinstance(text, str):
            yield Bad(*where, f"text is not a string: {text!r:.80}")
        elif not isinstance(name, str) or not name:
            yield Bad(*where, f"audio_filepath is not a path: {name!r:.80}")
        else:
            start, duration = d.get("offset", -1.0), d.get("duration", -1.0)
            start = -1.0 if start is None else start
            duration = -1.0 if duration is None else duration
            if not is_number(start) or not is_number(duration):
                yield Bad(*where, f"offset or duration is not a number: {start!r}, {duration!r}")
                continue
            if "offset" in d and start >= 0 and duration < 0:
                yield Bad(*where, "missing key: duration (needed beside offset)")
                continue
            if start >= 0 and ident == name:
                ident = f"{name}@{start:g}+{duration:g}"
            full = os.path.normpath(os.path.join(folder, os.path.expanduser(name)))
            yield Entry(number, at, ident, full, -1, -1, start, duration, -1, text, path)


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and np.isfinite(x)


def entries_of(source):
    """Yields Entry or Bad for each utterance of one source; the kind is seen from the source."""
    from jasr.data import shar

    if os.path.isdir(source):
        return shar.shar_entries(source)
    if not os.path.isfile(source):
        raise DataError(f"data source {source} does not exist")
    if shar.is_cutset(source):
        return shar.cutset_entries(source)
    return manifest_entries(source)


COLUMNS = {
    "duration": "d",
    "token_count": "i",
    "source": "i",
    "start": "d",
    "channel": "i",
    "byte_start": "q",
    "byte_size": "q",
    "line": "i",
    "at": "q",
    "list_number": "i",
    "file_number": "i",
}


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
        if e.path != self.last_file:
            self.files.append(e.path)
            self.last_file = e.path
        if e.list_path != self.last_list:
            self.lists.append(e.list_path)
            self.last_list = e.list_path
        self.ids.append(e.id)
        self.texts.append(e.text)
        self.needed.append(seconds_needed)
        part = f"{e.channel} {e.start:.4f}+{e.duration:.4f}" if e.start >= 0 else e.channel
        self.audio_keys.append(_hash(f"{source}\0{e.path}\0{e.byte_start}\0{part}"))
        self.id_keys.append(_hash(f"{source}\0{e.id}"))
        lists, files = len(self.lists) - 1, len(self.files) - 1
        row = (e.duration, token_count, source, e.start, e.channel, e.byte_start, e.byte_size)
        row += (e.line, e.at, lists, files)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def finish(self, pairs):
        types = {"d": np.float64, "i": np.int32, "q": np.int64}
        columns = {
            name: np.frombuffer(self.columns[name], types[code]).copy()
            for name, code in COLUMNS.items()
        }
        return Index(
            sources=[p for p, _ in pairs],
            weights=tuple(w for _, w in pairs),
            **columns,
            files=self.files,
            lists=self.lists,
            ids=self.ids,
            texts=self.texts,
            bad=self.bad,
            exact=False,
        )


def _hash(name):
    raw = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(raw, "little")


def build(sources, encode, cfg, frames_needed=None, seconds_per_frame=0.0, evaluation=False):
    """The Index of `sources`, its `bad` holding every entry left out.

    encode: text -> list of token ids; may raise TextError. frames_needed: tokens -> frames that
    the loss needs at least, of `seconds_per_frame` each; utterances too short for their text (at
    the fastest speed) are bad. With `evaluation`, nothing is left out by the duration and token
    limits, and a text that cannot be encoded keeps its row with the tokens of its known words.

    Raises DataError when a source cannot be read, nothing usable is left, or more than
    `cfg.max_bad_share` of the entries is bad.
    """
    pairs = source_pairs(sources)
    b = _Builder()
    for number, (path, _) in enumerate(pairs):
        for e in entries_of(path):
            if isinstance(e, Bad):
                b.bad.append(e)
                continue
            tokens, reason = encode_entry(e.text, encode, cfg.min_tokens, evaluation)
            if reason:
                b.bad.append(Bad(e.list_path, e.line, e.id, e.path, reason))
                continue
            needed = frames_needed(tokens) * seconds_per_frame if frames_needed else 0.0
            b.add(e, number, len(tokens), needed)
    index = b.finish(pairs)
    ok = np.ones(len(index), bool)
    for keys, what in ((b.audio_keys, "duplicate audio"), (b.id_keys, "duplicate id")):
        _drop_repeats(index, ok, np.frombuffer(keys, np.uint64), what)
    _check_audio(index, ok, cfg)
    _filter(index, ok, np.frombuffer(b.needed), cfg, evaluation)
    index = _take(index, ok)
    order = {path: n for n, (path, _) in enumerate(pairs)}
    index.bad.sort(key=lambda x: (order.get(x.source, 0), x.source, x.line))
    stop_if_too_bad(index, cfg.max_bad_share)
    return index


def encode_entry(text, encode, min_tokens, evaluation):
    """(tokens, reason): the tokens of a text, or why there are none."""
    if not text.strip():
        return [], "" if min_tokens == 0 else "empty text"
    try:
        return encode(text), ""
    except TextError as e:
        if not evaluation:
            return [], f"text cannot be encoded: {e}"
    known = []
    for word in text.split():
        try:
            encode(word)
            known.append(word)
        except TextError:
            pass
    return (encode(" ".join(known)) if known else []), ""


def _leave_out(index, ok, row, reason, filtered=False):
    ok[row] = False
    index.bad.append(
        Bad(
            index.lists[int(index.list_number[row])],
            int(index.line[row]),
            index.ids[row],
            index.path(row),
            reason,
            filtered,
        )
    )


def _drop_repeats(index, ok, keys, what):
    rows = np.flatnonzero(ok)
    if not len(rows):
        return
    _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    for i in np.flatnonzero(firsts != np.arange(len(rows))):
        line = int(index.line[rows[firsts[i]]])
        _leave_out(index, ok, int(rows[i]), f"{what}: as in line {line}")


def _check_audio(index, ok, cfg):
    """Compares the rows with their files as far as `cfg.check` says; fills in durations."""
    kinds = ("none", "files", "header", "decode", "auto")
    if cfg.check not in kinds:
        raise DataError(f"data.check must be one of {', '.join(kinds)}, got {cfg.check!r}")
    kind = cfg.check
    if kind == "auto":
        kind = "header" if len(index) <= HEADER_CHECK_ROWS else "files"
    rows = np.flatnonzero(ok)
    if kind in ("none", "files"):
        if kind == "files":
            for row in rows:
                if not os.path.isfile(index.path(row)):
                    _leave_out(index, ok, row, "missing file")
        rows = np.flatnonzero(ok & (index.duration < 0))
    look = decoded_seconds if kind == "decode" else header_seconds
    for row, found in zip(rows, _in_threads(lambda r: look(index, r, cfg), rows), strict=True):
        if isinstance(found, str):
            _leave_out(index, ok, row, found)
        else:
            index.duration[row] = found
    index.exact = kind in ("header", "decode")


def _in_threads(function, rows):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        yield from pool.map(function, rows.tolist())


def header_seconds(index, row, cfg):
    """Seconds of the row's audio by its header, or the reason why it cannot be used."""
    try:
        seconds = audio.info(audio_file(index, row))[0]
    except audio.AudioError as e:
        return audio_reason(e)
    except OSError as e:
        return f"unreadable audio: {e.strerror or e}"
    return agreed_seconds(index, row, seconds, cfg)


def decoded_seconds(index, row, cfg):
    """Seconds of the row's audio after decoding all of it, or the reason against it."""
    found = header_seconds(index, row, cfg)
    if isinstance(found, str):
        return found
    try:
        return len(read_audio(index, row, cfg.sample_rate)) / cfg.sample_rate
    except audio.AudioError as e:
        return audio_reason(e)


def audio_reason(e):
    """The quarantine reason of an AudioError."""
    if e.reason.startswith("missing file") or "No such file" in e.reason:
        return "missing file"
    return f"undecodable audio: {e.reason}"


def agreed_seconds(index, row, seconds, cfg):
    """Seconds to plan with where file and manifest agree, else the reason."""
    start, duration = float(index.start[row]), float(index.duration[row])
    slack = cfg.duration_tolerance
    if start >= 0:
        if start + duration > seconds + slack:
            return (
                f"duration mismatch: the segment ends at {start + duration:.2f} s, "
                f"the file at {seconds:.2f} s"
            )
        return min(duration, seconds - start)
    if duration >= 0 and abs(duration - seconds) > slack:
        return f"duration mismatch: {duration:.2f} s declared, the file has {seconds:.2f} s"
    return seconds


def audio_file(index, row):
    """The row's audio as a path, or as bytes where it lies inside a tar."""
    path = index.path(row)
    if index.byte_start[row] < 0:
        return path
    with open(path, "rb") as f:
        f.seek(int(index.byte_start[row]))
        data = f.read(int(index.byte_size[row]))
    if len(data) != index.byte_size[row]:
        raise audio.AudioError(path, f"truncated tar: member {index.ids[row]} is cut off")
    return data


def read_audio(index, row, sample_rate):
    """Samples f32[S] of a row, mono at `sample_rate`. Raises audio.AudioError."""
    start, channel = float(index.start[row]), int(index.channel[row])
    try:
        file = audio_file(index, row)
        if start < 0 and channel < 0:
            return audio.read(file, sample_rate)
        duration = float(index.duration[row]) if start >= 0 else -1.0
        return read_part(file, max(start, 0.0), duration, channel, sample_rate)
    except OSError as e:
        raise audio.AudioError(index.path(row), e.strerror or str(e)) from e


def read_part(file, start, duration, channel, sample_rate):
    """Samples f32[S] from `start` s on for `duration` s, without decoding what comes before.

    duration -1: to the end; channel -1: the mean of all. Raises audio.AudioError.
    """
    import io

    import soundfile

    name = "segment" if isinstance(file, bytes) else file
    try:
        with soundfile.SoundFile(io.BytesIO(file) if isinstance(file, bytes) else file) as f:
            rate, first = f.samplerate, round(start * f.samplerate)
            if first >= f.frames:
                raise audio.AudioError(name, f"the segment starts at {start:.2f} s, after the end")
            if channel >= f.channels:
                raise audio.AudioError(name, f"channel {channel} of {f.channels} asked for")
            f.seek(first)
            count = round(duration * rate) if duration >= 0 else -1
            samples = f.read(count, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise audio.AudioError(name, str(e)) from e
    samples = samples.mean(axis=1) if channel < 0 else samples[:, channel]
    if not len(samples) or not np.isfinite(samples).all():
        raise audio.AudioError(name, "no samples, or NaN or infinite ones, in the segment")
    return audio.resample(samples, rate, sample_rate)


def _filter(index, ok, needed, cfg, evaluation):
    """Leaves out what the limits of `cfg` exclude, and texts too long for their audio."""
    fastest = 1.0 if evaluation else max(max(cfg.speeds, default=1.0), 1.0)
    tests = [(index.duration < needed * fastest, False, "text too long for its audio: {t} tokens")]
    if not evaluation:
        tests += [
            (index.duration < cfg.min_duration, True, "too short: {d:.2f} s"),
            (over(index.duration, longest(cfg)), True, "too long: {d:.2f} s"),
            (index.token_count < cfg.min_tokens, True, "too few tokens: {t}"),
            (over(index.token_count, cfg.max_tokens), True, "too many tokens: {t}"),
        ]
    for fails, filtered, reason in tests:
        for row in np.flatnonzero(ok & fails):
            said = reason.format(d=index.duration[row], t=index.token_count[row])
            if not filtered:
                said += f" in {index.duration[row]:.2f} s"
            _leave_out(index, ok, int(row), said, filtered)


def over(values, limit):
    """bool[N]: above a limit where 0 is none."""
    return values > limit if limit > 0 else np.zeros(len(values), bool)


def longest(cfg):
    """Seconds of the longest utterance allowed, by max_duration and the last explicit bin."""
    limits = [cfg.max_duration] if cfg.max_duration > 0 else []
    if cfg.bucket_duration_bins:
        last = cfg.bucket_duration_bins[-1]
        limits.append(float(last[0] if isinstance(last, (tuple, list)) else last))
    return min(limits, default=0.0)


def _take(index, ok):
    """The index with the rows where `ok` alone."""
    if ok.all():
        return index
    rows = np.flatnonzero(ok)
    changed = {name: getattr(index, name)[rows] for name in COLUMNS}
    for name in ("ids", "texts"):
        old, new = getattr(index, name), Strings()
        for row in rows.tolist():
            new.append(old[row])
        changed[name] = new
    return dataclasses.replace(index, **changed)


def stop_if_too_bad(index, max_bad_share):
    """Raises DataError when nothing is usable or the share of bad entries is too great."""
    bad, total = index.bad_count, len(index) + len(index.bad)
    worst = Counter(reason_class(x.reason) for x in index.bad).most_common(3)
    reasons = ", ".join(f"{n} × {r}" for r, n in worst)
    examples = "; ".join(f"{x.source}:{x.line} {x.reason}" for x in index.bad[:3])
    if not len(index):
        why = (
            f"all {total} entries were left out ({reasons}): {examples}" if total else "it is empty"
        )
        raise DataError(f"no usable utterance in {', '.join(index.sources)}: {why}")
    if bad > max_bad_share * total:
        raise DataError(
            f"{bad} of {total} entries are bad ({reasons}), more than data.max_bad_share="
            f"{max_bad_share:g}: {examples}. Repair them (experiments.doctor data lists all) or "
            "raise data.max_bad_share."
        )


def write_quarantine(path, bad):
    """Writes one JSON line for each Bad, replacing the file at once."""
    part = f"{path}.{os.getpid()}"
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
        for b in bad:
            f.write(quarantine_line(b))
    os.replace(part, path)


def quarantine_line(b):
    """The JSON line of a Bad: source, line, id, audio, reason, filtered."""
    return json.dumps(b._asdict(), ensure_ascii=False) + "\n"


def say(text):
    """Prints to standard error, where logs go."""
    print(text, file=sys.stderr, flush=True)
