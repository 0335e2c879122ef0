"""One index of items over NeMo manifests, lhotse CutSets and lhotse Shar directories.

The index holds columns (numpy arrays and byte blobs), not a Python object an item, so that ten
million items fit beside a training run. What cannot be used is kept as a `Bad` with its source,
line, identifier and reason; what can be is not touched by what cannot.
"""

import array
import dataclasses
import hashlib
import json
import os
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jasr.data import buckets, recording
from jasr.data.config import DataError, LengthError
from jasr.data.entries import Bad, bad_line, in_folder, items_of, named, reason_class, source_pairs
from jasr.seam import Item, Piece

HEADER_CHECK_ROWS = 20_000  # data.check="auto" reads the headers of sets up to this size
VERSION = 3  # of the rules; 2 took two items of the same audio for repeats, whatever their fields

ROW = struct.Struct("=iiiqqqq")  # source, list, line, then what only building needs
PIECE = struct.Struct("=iqqddi")
NAMES = {
    ROW: ("source", "list", "line", "pieces", "audio_key", "content_key", "id_key"),
    PIECE: ("file", "byte_start", "byte_size", "start", "seconds", "channel"),
}


def columns_of(records, kind):
    """{name: array[N]} of packed records of a kind, ROW or PIECE."""
    fields = zip(NAMES[kind], kind.format[1:], strict=True)
    types = {"i": np.int32, "q": np.int64, "d": np.float64}
    table = np.frombuffer(records, [(name, types[code]) for name, code in fields])
    return {name: table[name].copy() for name in NAMES[kind]}


class Strings:
    """Many strings in one blob; `strings[i] -> str`. Grows by `append`."""

    def __init__(self, items=()):
        self.blob, self.ends = bytearray(), array.array("q", [0])
        for text in items:
            self.append(text)

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
    """The usable items as columns, and the account of those that are not.

    rows, one value an item: source (number in `sources`), list (number in `lists`) and line there.
    pieces, one value a piece: file (number in `files`; `homes` says in which list), byte_start and
    byte_size (inside a tar; -1: a file of its own), start (s; -1: the whole recording), seconds,
    channel (-1: the mean). Item i has the pieces first_piece[i] : first_piece[i + 1].
    sizes f64[N,n] are what the layout made of each; fields hold JSON, so that no list is read again
    (a packed one would be unpacked from its start each time).
    """

    sources: list
    weights: tuple
    rows: dict
    pieces: dict
    first_piece: np.ndarray
    sizes: np.ndarray
    files: Strings
    homes: np.ndarray
    lists: Strings
    ids: Strings
    fields: Strings
    bad: list = dataclasses.field(default_factory=list)
    exact: bool = False  # seconds were read from the audio

    def __len__(self):
        return len(self.first_piece) - 1

    @property
    def source(self):
        """i32[N]: each item's source."""
        return self.rows["source"]

    @property
    def duration(self):
        """f64[N]: seconds of each item's pieces together."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.first_piece))
        return np.bincount(owner, self.pieces["seconds"], len(self))

    @property
    def bad_count(self):
        """Entries left out for a defect (not by a setting)."""
        return sum(not b.filtered for b in self.bad)

    def piece(self, number):
        """The seam.Piece of a number, its source as a path that can be opened."""
        file, *rest = (column[number].item() for column in self.pieces.values())
        return Piece(in_folder(self.lists[self.homes[file]], self.files[file]), *rest)

    def pieces_of(self, row):
        """The Pieces of an item."""
        return tuple(map(self.piece, range(self.first_piece[row], self.first_piece[row + 1])))

    def item(self, row):
        """The seam.Item of a row."""
        return Item(self.id(row), self.pieces_of(row), json.loads(self.fields[row]))

    def id(self, row):
        """The row's identifier: its source's, else its pieces' paths (and parts) as written."""
        return self.ids[row] or self.made_id(row)

    def made_id(self, row):
        """The identifier of an item whose source gives none."""
        made = []
        for p in range(self.first_piece[row], self.first_piece[row + 1]):
            start, seconds = self.pieces["start"][p], self.pieces["seconds"][p]
            part = f"@{start:g}+{seconds:g}" if start >= 0 else ""
            made.append(self.files[self.pieces["file"][p]] + part)
        return " ".join(made) or f"{self.lists[self.rows['list'][row]]}:{self.rows['line'][row]}"

    def place(self, row):
        """(list, line) that an item stands in."""
        return self.lists[self.rows["list"][row]], int(self.rows["line"][row])

    def bad_row(self, row, reason, filtered=False):
        """The Bad of a row."""
        pieces = self.pieces_of(row)
        audio = pieces[0].source if pieces else ""
        return Bad(*self.place(row), self.id(row), audio, reason, filtered)

    def fingerprint(self):
        """Hex digest of what the plan depends on: order, sizes, identifiers, file names."""
        h = hashlib.sha256(repr(self.weights).encode())
        later = [np.round(self.sizes[:, k]) for k in range(1, self.sizes.shape[1])]
        for column in (self.source, *later, np.round(self.sizes[:, 0] * 1e4)):
            h.update(column.astype("<i8").tobytes())
        h.update(self.ids.blob)
        for file in self.files:
            h.update(os.path.basename(file).encode("utf-8", "surrogatepass"))
        return h.hexdigest()[:16]

    def describe(self):
        """A few lines: utterances and hours of each source, and what was left out and why."""
        lines, duration = [], self.duration
        for s, path in enumerate(self.sources):
            seconds = duration[self.source == s]
            weight = f", weight {self.weights[s]:g}" if any(self.weights) else ""
            hours = seconds.sum() / 3600
            lines.append(f"{path}: {len(seconds)} utterances, {hours:.2f} h{weight}")
        counts = Counter((b.filtered, reason_class(b.reason)) for b in self.bad)
        for (filtered, reason), n in sorted(counts.items()):
            lines.append(f"  {'left out' if filtered else 'quarantined'} {n}: {reason}")
        return "\n".join(lines)


def build(sources, layout, cfg, scored=False, version=VERSION):
    """The Index of `sources`, as `collect` gives it, if enough of it is usable.

    Raises DataError when a source cannot be read, nothing usable is left, or more than
    `cfg.max_bad_share` of the entries is bad.
    """
    index = collect(sources, layout, cfg, scored, version)
    stop_if_too_bad(index, cfg.max_bad_share)
    return index


def collect(sources, layout, cfg, scored=False, version=VERSION):
    """The Index of `sources`, its `bad` holding every entry left out.

    layout: the seam.Layout that says what items a line has and what they measure.
    scored: see seam.Layout.sizes.
    version: 2 for the rules of runs that began with them.

    Raises DataError for an unreadable source.
    """
    buckets.check(cfg)
    pairs = source_pairs(sources)
    b = _Builder(len(layout.axes))
    for number, (path, _) in enumerate(pairs):
        for found in items_of(path, layout.items):
            if isinstance(found, Bad):
                b.bad.append(found)
                continue
            line, item = found
            try:
                b.add(line, number, item, layout.sizes(item, scored))
            except LengthError:  # looked at again when the file has said how long it is
                b.add(line, number, item, None)
            except DataError as e:
                b.bad.append(_bad_item(line, item, str(e)))
    index = b.index(pairs)
    ok = np.ones(len(index), bool)
    if version == 2:
        _drop_repeats(index, ok, b.audio_keys, "duplicate audio: as in {}")
    else:
        _drop_repeats(index, ok, b.content_keys, "duplicate: {} says the same")
    same = b.audio_keys if version == 2 else b.content_keys
    keys = np.where(b.id_keys == 0, same, b.id_keys)
    _drop_repeats(index, ok, keys, "duplicate id: {} has it for something else")
    changed = _check_audio(index, ok, cfg)
    _measure(index, ok, changed | np.isnan(index.sizes[:, 0]), layout, scored)
    _tell_apart(index, ok, b)
    index = take(index, ok)
    order = {path: n for n, (path, _) in enumerate(pairs)}
    index.bad.sort(key=lambda x: (order.get(x.source, len(order)), x.source, x.line))
    return index


def _bad_item(line, item, reason):
    """The Bad of an item that never got a row."""
    full = in_folder(line.list_path, item.pieces[0].source) if item.pieces else ""
    return bad_line(line, reason)._replace(id=item.id or bad_line(line, "").audio, audio=full)


class _Builder:
    """Grows the columns of an Index from items."""

    def __init__(self, axes):
        self.rows, self.pieces, self.sizes = bytearray(), bytearray(), array.array("d")
        self.files, self.lists, self.ids, self.fields = Strings(), Strings(), Strings(), Strings()
        self.homes, self.bad, self.unmeasured = array.array("i"), [], (np.nan,) * axes
        self.last_file = self.last_list = None
        self.dumps = json.JSONEncoder(ensure_ascii=False).encode

    def add(self, line, source, item, sizes):
        if line.list_path != self.last_list:
            self.lists.append(line.list_path)
            self.last_list, self.last_file = line.list_path, None
        audio, fields = source, self.dumps(item.fields)
        for file, *place in item.pieces:
            if file != self.last_file:
                self.files.append(file)
                self.homes.append(len(self.lists) - 1)
                self.last_file, self.full = file, in_folder(self.last_list, file)
            self.pieces += PIECE.pack(len(self.files) - 1, *place)
            start, seconds = place[2:4]
            part = (round(start, 4), round(seconds, 4)) if start >= 0 else ()
            audio = hash((audio, self.full, place[0], place[4], part))
        # hashes are compared with each other alone: another process may have others
        keys = audio, hash((audio, fields)), hash((source, item.id)) if item.id else 0
        count = len(item.pieces)
        self.rows += ROW.pack(source, len(self.lists) - 1, line.number, count, *keys)
        self.sizes.extend(self.unmeasured if sizes is None else sizes)
        self.ids.append(item.id)
        self.fields.append(fields)

    def index(self, pairs):
        """The Index of all that was added."""
        rows = columns_of(self.rows, ROW)
        self.audio_keys, self.content_keys = rows.pop("audio_key"), rows.pop("content_key")
        self.id_keys = rows.pop("id_key")
        return Index(
            [p for p, _ in pairs],
            tuple(w for _, w in pairs),
            rows,
            columns_of(self.pieces, PIECE),
            np.append(0, np.cumsum(rows.pop("pieces"))),
            np.frombuffer(self.sizes).reshape(-1, len(self.unmeasured)).copy(),
            self.files,
            np.frombuffer(self.homes, np.int32).copy(),
            self.lists,
            self.ids,
            self.fields,
            self.bad,
        )


def _drop_repeats(index, ok, keys, reason):
    """Leaves out the later ones of rows with the same key."""
    rows = np.flatnonzero(ok)
    for i, first in _repeats(keys[rows]):
        row, other = int(rows[i]), int(rows[first])
        ok[row] = False
        (path, line), (here, _) = index.place(other), index.place(row)
        where = f"line {line}" if path == here else f"line {line} of {path}"
        index.bad.append(index.bad_row(row, reason.format(where)))


def _repeats(keys):
    """Pairs (number of a key that came before, number where it came first)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    later = np.flatnonzero(firsts != np.arange(len(keys)))
    return zip(later.tolist(), firsts[later].tolist(), strict=True)


def _tell_apart(index, ok, built):
    """Gives items without an identifier over the same pieces one that also says their fields."""
    rows = np.flatnonzero(ok & (built.id_keys == 0))
    later = {int(rows[i]) for i, _ in _repeats(built.audio_keys[rows])}
    if later:
        index.ids = Strings(
            f"{index.made_id(i)}#{_digest(index.fields[i])}" if i in later else index.ids[i]
            for i in range(len(index))
        )


def _digest(text):
    """Eight hex digits of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _check_audio(index, ok, cfg):
    """Compares the rows with their files, as far as headers tell, and takes seconds from them.

    Returns bool[N]: where seconds changed.
    """
    kind = cfg.check
    if kind == "auto":
        kind = "header" if len(index) <= HEADER_CHECK_ROWS else "files"
    if kind == "files":
        for row in np.flatnonzero(ok):
            if not all(map(recording.is_there, index.pieces_of(row))):
                ok[row] = False
                index.bad.append(index.bad_row(row, "missing file"))
    index.exact = kind in ("header", "decode")
    changed = np.zeros(len(index), bool)
    looked = ok
    if not index.exact:
        unknown = np.repeat(np.arange(len(index)), np.diff(index.first_piece))
        looked = ok & np.isin(np.arange(len(index)), unknown[index.pieces["seconds"] < 0])
    _look_at(recording.header_seconds, index, ok, np.flatnonzero(looked), changed, cfg)
    if kind == "decode":
        _look_at(recording.decoded_seconds, index, ok, np.flatnonzero(ok), changed, cfg)
    return changed


def _look_at(look, index, ok, rows, changed, cfg):
    """Takes seconds from `look(piece, cfg)`, which says a reason where a piece is bad."""

    def found_of(row):
        found = [look(piece, cfg) for piece in index.pieces_of(row)]
        return next((x for x in found if isinstance(x, str)), found)

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for row, found in zip(rows.tolist(), pool.map(found_of, rows.tolist()), strict=True):
            if isinstance(found, str):
                ok[row] = False
                index.bad.append(index.bad_row(row, found))
                continue
            mine = index.pieces["seconds"][index.first_piece[row] : index.first_piece[row + 1]]
            changed[row] |= (mine != found).any()
            mine[:] = found


def _measure(index, ok, todo, layout, scored):
    """Takes the sizes of rows whose seconds changed, and leaves out what the layout refuses."""
    for row in np.flatnonzero(ok & todo):
        try:
            index.sizes[row] = layout.sizes(index.item(row), scored)
        except DataError as e:
            ok[row] = False
            filtered = isinstance(e, LengthError) and e.filtered
            index.bad.append(index.bad_row(row, str(e), filtered))


def take(index, ok):
    """The index with the rows where `ok` alone."""
    if ok.all():
        return index
    rows, counts = np.flatnonzero(ok), np.diff(index.first_piece)
    pieces = np.flatnonzero(np.repeat(ok, counts))
    columns = {name: column[pieces] for name, column in index.pieces.items()}
    old = columns["file"]
    begins = np.append(True, old[1:] != old[:-1])[: len(old)]
    kept = old[begins]  # a file that no row is left of is no part of the index
    columns["file"] = (np.cumsum(begins) - 1).astype(np.int32)
    return dataclasses.replace(
        index,
        rows={name: column[rows] for name, column in index.rows.items()},
        pieces=columns,
        first_piece=np.append(0, np.cumsum(counts[rows])),
        sizes=index.sizes[rows],
        files=Strings(map(index.files.__getitem__, kept.tolist())),
        homes=index.homes[kept],
        ids=Strings(map(index.ids.__getitem__, rows.tolist())),
        fields=Strings(map(index.fields.__getitem__, rows.tolist())),
    )


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
