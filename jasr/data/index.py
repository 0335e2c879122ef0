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

# A piece: its number in `files` and what seam.Piece says of it; `PACK` makes one as bytes.
PIECE = np.dtype("i4, i8, i8, f8, f8, i4")
PIECE.names = ("file", "byte_start", "byte_size", "start", "seconds", "channel")
PACK = struct.Struct("=iqqddi").pack


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

    rows i32[N,3]: each item's source (number in `sources`), list (number in `lists`) and line.
    pieces PIECE[P]: file (number in `files`, names as the item's list has them), byte_start and
    byte_size (inside a tar; -1: a file of its own), start (s; -1: the whole recording), seconds,
    channel (-1: the mean). Item i has the pieces first_piece[i] : first_piece[i + 1].
    sizes f64[N,n] are what the layout made of each; fields hold JSON, so that no list is read again
    (a packed one would be unpacked from its start each time).
    """

    sources: list
    weights: tuple
    rows: np.ndarray
    pieces: np.ndarray
    first_piece: np.ndarray
    sizes: np.ndarray
    files: Strings
    lists: Strings
    ids: Strings
    fields: Strings
    bad: list
    exact: bool = False  # seconds were read from the audio

    def __len__(self):
        return len(self.rows)

    @property
    def source(self):
        """i32[N]: each item's source."""
        return self.rows[:, 0]

    @property
    def owner(self):
        """i64[P]: the item of each piece."""
        return np.repeat(np.arange(len(self)), np.diff(self.first_piece))

    @property
    def duration(self):
        """f64[N]: seconds of each item's pieces together."""
        return np.bincount(self.owner, self.pieces["seconds"], len(self))

    @property
    def bad_count(self):
        """Entries left out for a defect (not by a setting)."""
        return sum(not b.filtered for b in self.bad)

    def part(self, row):
        """PIECE[...]: the pieces of an item, to read or to change."""
        return self.pieces[self.first_piece[row] : self.first_piece[row + 1]]

    def pieces_of(self, row):
        """The seam.Pieces of an item, their sources as paths that can be opened."""
        path, _ = self.place(row)
        return tuple(
            Piece(in_folder(path, self.files[file]), *rest)
            for file, *rest in self.part(row).tolist()
        )

    def item(self, row):
        """The seam.Item of a row."""
        return Item(self.id(row), self.pieces_of(row), json.loads(self.fields[row]))

    def id(self, row):
        """The row's identifier: its source's, else its pieces' paths (and parts) as written."""
        return self.ids[row] or self.made_id(row)

    def made_id(self, row):
        """The identifier of an item whose source gives none."""
        made = [
            self.files[file] + (f"@{start:g}+{seconds:g}" if start >= 0 else "")
            for file, _, _, start, seconds, _ in self.part(row).tolist()
        ]
        return " ".join(made) or ":".join(map(str, self.place(row)))

    def place(self, row):
        """(list, line) that an item stands in."""
        _, number, line = self.rows[row].tolist()
        return self.lists[number], line

    def bad_row(self, row, reason, filtered=False):
        """The Bad of a row."""
        audio = next((p.source for p in self.pieces_of(row)), "")
        return Bad(*self.place(row), self.id(row), audio, reason, filtered)

    def fingerprint(self):
        """Hex digest of what the plan depends on: order, sizes, identifiers, file names."""
        h = hashlib.sha256(repr(self.weights).encode())
        first, *later = self.sizes.T
        for column in (self.source, *map(np.round, later), np.round(first * 1e4)):
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
    total = len(index) + len(index.bad)
    worst = Counter(reason_class(x.reason) for x in index.bad).most_common(3)
    reasons = ", ".join(f"{n} × {r}" for r, n in worst)
    examples = "; ".join(map(named, index.bad[:3]))
    sources = ", ".join(index.sources)
    if not total:
        raise DataError(f"no utterance in {sources}: it is empty")
    if not len(index):
        raise DataError(f"no usable utterance in {sources} of {total}: {reasons}; {examples}")
    if index.bad_count > cfg.max_bad_share * total:
        raise DataError(
            f"{index.bad_count} of {total} entries of {sources} are bad ({reasons}), more than "
            f"data.max_bad_share={cfg.max_bad_share:g}: {examples}. `python -m experiments.doctor "
            "data` lists them all; repair them or raise data.max_bad_share."
        )
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
    index, same_audio, same_content, same_id = _read(pairs, layout, scored)
    ok = np.ones(len(index), bool)
    same, said = same_content, "duplicate: {} says the same"
    if version == 2:
        same, said = same_audio, "duplicate audio: as in {}"
    _drop_repeats(index, ok, same, said)
    keys = np.where(same_id == 0, same, same_id)
    _drop_repeats(index, ok, keys, "duplicate id: {} has it for something else")
    _check_audio(index, ok, cfg)
    for row in np.flatnonzero(ok & np.isnan(index.sizes[:, 0])):
        try:
            index.sizes[row] = layout.sizes(index.item(row), scored)
        except DataError as e:
            _leave_out(index, ok, row, str(e), isinstance(e, LengthError) and e.filtered)
    rows = np.flatnonzero(ok & (same_id == 0))
    _tell_apart(index, [int(rows[i]) for i, _ in _repeats(same_audio[rows])])
    index = take(index, ok)
    order = {path: n for n, (path, _) in enumerate(pairs)}
    index.bad.sort(key=lambda x: (order.get(x.source, len(order)), x.source, x.line))
    return index


def _read(pairs, layout, scored):
    """The Index of all items that the lines of sources hold, and three keys of each, i64[N], for
    comparison: its source and audio, these and its fields, its source and identifier (0: none).

    The sizes of an item that is too long or short by its line are NaN: they are taken again when
    its file has said how long it is.
    """
    files, lists, ids, fields = Strings(), Strings(), Strings(), Strings()
    rows, pieces, sizes, keys = array.array("i"), bytearray(), array.array("d"), array.array("q")
    bad, dumps = [], json.JSONEncoder(ensure_ascii=False).encode
    last_list = last_file = full = None
    for source, (path, _) in enumerate(pairs):
        for found in items_of(path, layout.items):
            if isinstance(found, Bad):
                bad.append(found)
                continue
            line, item = found
            try:
                sizes.extend(layout.sizes(item, scored))
            except LengthError:
                sizes.extend((np.nan,) * len(layout.axes))
            except DataError as e:
                where = in_folder(line.list_path, item.pieces[0].source) if item.pieces else ""
                entry = bad_line(line, str(e))
                bad.append(entry._replace(id=item.id or entry.audio, audio=where))
                continue
            if line.list_path != last_list:
                last_list, last_file = line.list_path, None
                lists.append(last_list)
            audio, said = source, dumps(item.fields)
            for file, *place in item.pieces:
                if file != last_file:
                    last_file, full = file, in_folder(last_list, file)
                    files.append(file)
                pieces += PACK(len(files) - 1, *place)
                byte_start, _, start, seconds, channel = place
                part = (round(start, 4), round(seconds, 4)) if start >= 0 else ()
                audio = hash((audio, full, byte_start, channel, part))
            # hashes are compared with each other alone: another process may have others
            keys.extend((audio, hash((audio, said)), hash((source, item.id)) if item.id else 0))
            rows.extend((source, len(lists) - 1, line.number, len(item.pieces)))
            ids.append(item.id)
            fields.append(said)
    rows = np.array(rows, np.int32).reshape(-1, 4)
    index = Index(
        [p for p, _ in pairs],
        tuple(w for _, w in pairs),
        rows[:, :3].copy(),
        np.frombuffer(pieces, PIECE),
        np.append(0, np.cumsum(rows[:, 3])),
        np.array(sizes).reshape(-1, len(layout.axes)),
        files,
        lists,
        ids,
        fields,
        bad,
    )
    return index, *np.array(keys).reshape(-1, 3).T


def _leave_out(index, ok, row, reason, filtered=False):
    ok[row] = False
    index.bad.append(index.bad_row(row, reason, filtered))


def _drop_repeats(index, ok, keys, reason):
    """Leaves out the later ones of rows with the same key."""
    rows = np.flatnonzero(ok)
    for i, first in _repeats(keys[rows]):
        row, other = int(rows[i]), int(rows[first])
        (path, line), (here, _) = index.place(other), index.place(row)
        where = f"line {line}" if path == here else f"line {line} of {path}"
        _leave_out(index, ok, row, reason.format(where))


def _repeats(keys):
    """Pairs (number of a key that came before, number where it came first)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    later = np.flatnonzero(firsts != np.arange(len(keys)))
    return zip(later.tolist(), firsts[later].tolist(), strict=True)


def _tell_apart(index, later):
    """Gives the rows `later`, of audio that came before, identifiers that also say their fields."""
    if later:
        ids = list(index.ids)
        for row in later:
            digest = hashlib.sha256(index.fields[row].encode("utf-8", "surrogatepass"))
            ids[row] = f"{index.made_id(row)}#{digest.hexdigest()[:8]}"
        index.ids = Strings(ids)


def _check_audio(index, ok, cfg):
    """Compares the rows with their files, as far as headers tell, and takes seconds from them."""
    kind = cfg.check
    if kind == "auto":
        kind = "header" if len(index) <= HEADER_CHECK_ROWS else "files"
    if kind == "files":
        for row in np.flatnonzero(ok):
            if not all(map(recording.is_there, index.pieces_of(row))):
                _leave_out(index, ok, row, "missing file")
    index.exact = kind in ("header", "decode")
    looked = ok
    if not index.exact:
        looked = ok & np.isin(np.arange(len(index)), index.owner[index.pieces["seconds"] < 0])
    _look_at(recording.header_seconds, index, ok, np.flatnonzero(looked), cfg)
    if kind == "decode":
        _look_at(recording.decoded_seconds, index, ok, np.flatnonzero(ok), cfg)


def _look_at(look, index, ok, rows, cfg):
    """Takes seconds from `look(piece, cfg)`, which says a reason where a piece is bad; sizes of
    other seconds become NaN."""

    def found_of(row):
        found = [look(piece, cfg) for piece in index.pieces_of(row)]
        return next((x for x in found if isinstance(x, str)), found)

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for row, found in zip(rows.tolist(), pool.map(found_of, rows.tolist()), strict=True):
            if isinstance(found, str):
                _leave_out(index, ok, row, found)
                continue
            mine = index.part(row)["seconds"]
            if (mine != found).any():
                index.sizes[row] = np.nan
                mine[:] = found


def take(index, ok):
    """The index with the rows where `ok` alone."""
    if ok.all():
        return index
    rows, pieces = np.flatnonzero(ok), index.pieces[ok[index.owner]]
    # a file that no row is left of is no part of the index
    kept, pieces["file"] = np.unique(pieces["file"], return_inverse=True)
    return dataclasses.replace(
        index,
        rows=index.rows[rows],
        pieces=pieces,
        first_piece=np.append(0, np.cumsum(np.diff(index.first_piece)[rows])),
        sizes=index.sizes[rows],
        files=Strings(map(index.files.__getitem__, kept.tolist())),
        ids=Strings(map(index.ids.__getitem__, rows.tolist())),
        fields=Strings(map(index.fields.__getitem__, rows.tolist())),
    )
