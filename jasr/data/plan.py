"""The global batch plan: a pure function of (settings, seed, epoch), addressed by one integer.

An epoch orders the items, draws two random words for each, joins some of them into rows, puts the
rows into buckets of one fixed shape each, cuts the buckets into global batches and shuffles those.
It reads no audio and keeps no state, so that batch 12345 is the same in every process, with any
number of threads, before and after a restart. What the words mean, and what an item measures under
them, is the layout's matter. Which items share a row, and their words, come again after PERIOD
epochs (in other batches), so that the epoch of any position is found at once. Random numbers are
raw Philox words, whose stream NumPy guarantees; permutations are stable sorts of them.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import threading
from typing import NamedTuple

import numpy as np

from jasr.data import buckets
from jasr.data.config import DataConfig, DataError
from jasr.data.index import VERSION

ORDER, SIZE, ALONE, ADDED, ROWS, BATCHES = range(6)  # the random streams of an epoch
PERIOD = 64  # epochs after which the same rows come again, in other batches
JOIN_AMONG = 256  # partners are looked for among so many items of the shuffled order
ENOUGH = 1 << 60  # a size without limit

# settings that change no batch
NOT_IN_PLAN = "train valid check max_bad_share cache_audio cache_mb num_threads prefetch".split()
LATER = ("batch_cost",)  # settings that came after plans were known by their `fingerprint` alone


class Row(NamedTuple):
    """One row of a batch: its items (index numbers) and the two words of each."""

    items: tuple
    words: tuple


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of an epoch: row g joins positions first[g] : first[g + 1] of the arrays.

    item i32[M] index numbers, words u64[M,2], first i32[G + 1]; sizes i64[G,n] are upper bounds of
    the rows' sizes.
    """

    item: np.ndarray
    words: np.ndarray
    first: np.ndarray
    sizes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Batch j holds rows members[begin[j] : begin[j + 1]]; what its bucket lacks is padding."""

    rows: Rows
    members: np.ndarray
    begin: np.ndarray
    bucket: np.ndarray


class Plan:
    """Batches by position. `shapes` lists the buckets, tuples (B, *sizes), B global.

    shapes: those of another plan, for sets that are evaluated with the same programs.
    """

    def __init__(self, index, layout, cfg, seed, evaluation=False, shapes=None, version=VERSION):
        self.layout, self.cfg, self.seed = layout, cfg, int(seed)
        self.evaluation, self.version = evaluation, version
        self.index, self.weights, self.source = index, index.weights, index.source
        self.sizes = index.sizes
        self.concat = 1 if evaluation else cfg.concat
        several = not evaluation and (layout.draws or self.concat > 1)
        self.period = PERIOD if several else 1
        if any(self.weights):
            self.period = 0
        self._lock = threading.RLock()
        self._kept, self._ends = functools.lru_cache(2)(self._build), []
        self.shapes = shapes or self._shapes()

    def facts(self):
        """Everything that a position depends on, as JSON has it: settings by name, "seed",
        "shapes", "index" (a digest) and the "version" of the rules."""
        facts = {"version": self.version, "index": self.index.fingerprint(), "seed": self.seed}
        return _json(facts | {"shapes": self.shapes} | self._settings(NOT_IN_PLAN))

    @property
    def fingerprint(self):
        """Hex digest by which steps without `facts` know their plan."""
        settings = sorted(self._settings((*NOT_IN_PLAN, *LATER)).items())
        facts = 2, self.index.fingerprint(), self.seed, self.shapes, settings
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _settings(self, left_out):
        return {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in left_out}

    # ---- positions ----

    def locate(self, position):
        """(epoch, number in it) of a global batch: at most PERIOD epochs are looked at, no audio.

        With weights, whose epochs differ for ever, it is all epochs up to the position.
        """
        if position < 0:
            raise DataError(f"the data position must be 0 or more, got {position}")
        with self._lock:
            ends = self._ends
            while not ends or (ends[-1] <= position and len(ends) != self.period):
                last = ends[-1] if ends else 0
                ends.append(last + len(self.epoch(len(ends)).bucket))
            turns = 0
            if len(ends) == self.period:  # never with weights: their period is 0
                turns, position = divmod(position, ends[-1])
            epoch = bisect.bisect_right(ends, position)
            return turns * self.period + epoch, position - (ends[epoch - 1] if epoch else 0)

    def batch(self, position):
        """(epoch, bucket number, [Row]) of a global batch; rows beyond the list are padding."""
        number, j = self.locate(position)
        epoch = self.epoch(number)
        rows = []
        for g in epoch.members[epoch.begin[j] : epoch.begin[j + 1]]:
            at = slice(epoch.rows.first[g], epoch.rows.first[g + 1])
            words = tuple(map(tuple, epoch.rows.words[at].tolist()))
            rows.append(Row(tuple(epoch.rows.item[at].tolist()), words))
        return number, int(epoch.bucket[j]), rows

    def epoch(self, number):
        """The Epoch; the last two asked for are kept."""
        with self._lock:
            return self._kept(number)

    # ---- one epoch ----

    def _build(self, number):
        limits = np.asarray([bucket[1:] for bucket in self.shapes])
        rows = self._rows(number, limits[-1])
        buckets_of = [np.searchsorted(limits[:, k], x) for k, x in enumerate(rows.sizes.T)]
        sizes, count = [bucket[0] for bucket in self.shapes], len(rows.sizes)
        shuffled = np.arange(count)
        if not self.evaluation:
            shuffled = permutation(count, self.seed, number, ROWS)
        batches = buckets.fill(np.maximum.reduce(buckets_of), sizes, shuffled)
        if not self.evaluation:
            order = permutation(len(batches), self.seed, number, BATCHES)
            batches = [batches[j] for j in order]
        members = np.concatenate([rows_of for _, rows_of in batches]).astype(np.int32)
        begin = np.append(0, np.cumsum([len(rows_of) for _, rows_of in batches]))
        return Epoch(rows, members, begin, np.asarray([b for b, _ in batches]))

    def words(self, count, number):
        """u64[count,2]: the two random words of each item of an epoch, in its order.

        They come again after PERIOD epochs: an item is drawn in at most 64 ways (64 starts of a
        long recording, say), unless the sources have weights. Zeros where nothing is drawn.
        """
        if self.evaluation:
            return np.zeros((count, 2), np.uint64)
        streams = (random_words(count, self.seed, number, kind) for kind in (SIZE, ADDED))
        return np.stack(list(streams), axis=1)

    def _rows(self, number, limits):
        """The Rows of an epoch, none above the sizes `limits`; they repeat with `period`."""
        number = number % self.period if self.period else number
        order = self._order(number).astype(np.int32)
        count, words = len(order), self.words(len(order), number)
        sizes, adds = self.layout.drawn(self.sizes[order], words)
        if (long := (sizes > limits).any(axis=1)).any():  # drawn beyond the last explicit bucket
            words[long, 0] = 0
            sizes[long], adds[long] = self.layout.drawn(self.sizes[order[long]], words[long])
        if self.concat == 1:
            return Rows(order, words, np.arange(count + 1, dtype=np.int32), sizes)
        alone = uniform(count, self.seed, number, ALONE) >= self.cfg.concat_share
        most = round(self.cfg.concat_duration * self.cfg.sample_rate) or limits[0]
        joined = np.append(min(most, limits[0]), limits[1:])
        row = join(sizes, adds, ~alone, self.concat, joined)
        by_row = np.argsort(row, kind="stable")
        begins = np.flatnonzero(np.append(True, np.diff(row[by_row]) != 0))
        adds = adds[by_row]
        adds[begins] = 0
        first = np.append(begins, count).astype(np.int32)
        sizes = np.add.reduceat(sizes[by_row] + adds, begins)
        return Rows(order[by_row], words[by_row], first, sizes)

    def _order(self, number):
        """i64[M] index numbers of the epoch's items in the order in which they are joined.

        Without weights each item comes once. With weights an epoch has as many items as the index;
        each source gives its share of them and walks on through its own permutations, so that none
        of its items comes again before all have come.
        """
        total = len(self.sizes)
        if self.evaluation:  # longest first
            return np.argsort(-self.sizes[:, 0], kind="stable")
        if not any(self.weights):
            return permutation(total, self.seed, number, ORDER)
        chosen = []
        for s, take in enumerate(shares(self.weights, total)):
            mine = np.flatnonzero(self.source == s)
            if not len(mine):
                raise DataError(f"data source {s} has a weight, but no usable utterance")
            begin = number * take
            passes = range(begin // len(mine), -(-(begin + take) // len(mine)))
            walk = [mine[permutation(len(mine), self.seed, p, ORDER, s)] for p in passes]
            skip = begin % len(mine)
            chosen += [np.concatenate(walk)[skip : skip + take]] if walk else []
        rows = np.concatenate(chosen)
        return rows[permutation(total, self.seed, number, ORDER)]

    # ---- buckets ----

    def _shapes(self):
        cfg, largest = self.cfg, self.layout.drawn(self.sizes, None)[0].max(axis=0)
        given = buckets.explicit(cfg, self.layout)
        if self.evaluation or not len(given):
            given = np.zeros((0, len(largest)), np.int64)
        limit = int(largest[0])
        if len(given):
            limit = int(given[-1, 0])
        elif self.concat > 1:
            limit = max(limit, round(cfg.concat_duration * cfg.sample_rate))
        limit = buckets.rounded(limit, cfg.length_multiple)
        bound = [int(given[-1, k]) if given[:, k].any() else ENOUGH for k in range(len(largest))]
        rows = self._rows(0, np.asarray([limit, *bound[1:]])).sizes
        edges = given[:, 0].tolist()
        if not edges:
            count = len(cfg.bucket_duration_bins) or cfg.num_buckets
            edges = buckets.best_edges(rows[:, 0], count, cfg.length_multiple, limit)
        columns = [[buckets.rounded(e, cfg.length_multiple) for e in edges]]
        for k in range(1, len(largest)):
            others = given[:, k].tolist()
            if not any(others):
                most = int(max(largest[k], np.quantile(rows[:, k], 0.999)))
                others = buckets.other_limits(rows[:, 0], rows[:, k], edges, most)
            elif others[-1] < largest[k]:
                name = self.layout.axes[k]
                raise DataError(
                    f"the last of data.bucket_duration_bins holds {others[-1]} {name}, but one "
                    f"item has {largest[k]}: raise it or set data.max_{name}={others[-1]}"
                )
            columns.append([buckets.round_up(max(x, 1), cfg.token_multiple) for x in others])
        limits = np.asarray(columns).T
        sizes = buckets.batch_sizes(cfg, self.layout, limits, self.evaluation)
        shapes = list(zip(sizes, *columns, strict=True))
        return self._even(shapes, rows) if self.evaluation else shapes

    def _even(self, shapes, sizes):
        """Shapes of a fixed set: as many batches as before, with as little padding as possible."""
        self.shapes = shapes
        bucket = self._build(0).bucket
        even = []
        for b, (size, *limits) in enumerate(shapes):
            if count := int((bucket == b).sum()):
                fits = (sizes[:, 0] <= limits[0]).sum()
                least = -(-int(min(fits, size * count)) // count)
                size = min(size, buckets.round_up(least, self.cfg.batch_multiple))
            even.append((size, *limits))
        return even

    def describe(self):
        """The buckets, one line each, and the share of padding in the first epoch's costs."""
        epoch, cost = self.epoch(0), self.layout.cost
        counts = np.bincount(epoch.bucket, minlength=len(self.shapes))
        lines = [
            f"bucket {b}: {count} batches of {self.layout.label(bucket)}"
            for b, (count, bucket) in enumerate(zip(counts, self.shapes, strict=True))
        ]
        shapes = np.asarray(self.shapes)
        room = (cost(shapes[:, 1:]) * shapes[:, 0] * counts).sum()
        share = 100 * (1 - cost(epoch.rows.sizes).sum() / room)
        lines.append(f"{len(epoch.bucket)} batches in epoch 0, {share:.1f} % padding")
        return "\n".join(lines)


def changes(saved, now):
    """{name: (saved, now)} of two plans' `facts` where they differ; a setting that one of them
    lacks has its default."""
    default = _json(dataclasses.asdict(DataConfig()))
    old, new = default | saved, default | now
    return {k: (old.get(k), new.get(k)) for k in sorted(old | new) if old.get(k) != new.get(k)}


def _json(x):
    """x as it comes back from JSON."""
    return json.loads(json.dumps(x))


def listed(changes):
    """One line of `changes`: settings with both values, else that shapes or recordings differ."""
    settings = {k: v for k, v in changes.items() if k not in ("index", "shapes", "version")}
    if settings:
        return ", ".join(
            f"config.{k if k == 'seed' else f'data.{k}'} (it was {old!r}, now it is {new!r})"
            for k, (old, new) in settings.items()
        )
    return "the recordings, their lengths or the lists that name them"


def random_words(count, *key):
    """u64[count] of the Philox stream that the integers `key` name."""
    return np.random.Philox(np.random.SeedSequence([int(k) for k in key])).random_raw(count)


def uniform(count, *key):
    """f64[count] in [0, 1) of the stream `key`."""
    return (random_words(count, *key) >> np.uint64(11)) * 2.0**-53


def permutation(count, *key):
    """i64[count]: the numbers below `count` in the order of the stream `key`."""
    return np.argsort(random_words(count, *key), kind="stable")


def shares(weights, total):
    """Whole numbers in proportion to `weights` that sum to `total` (largest remainders)."""
    exact = np.asarray(weights) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[i] += 1
    return counts.tolist()


def join(sizes, adds, may, most, limits):
    """i64[M] row labels, equal for items that share a row; a label is the row's first member.

    Among each JOIN_AMONG items that `may` be joined, the longest one left (on the first axis)
    takes the longest one that fits beside it, and so on up to `most`: rows come out near the limits
    (best-fit decreasing bin packing). Each item counts with its sizes i64[M,n] and what it adds
    behind another, i64[M,n]; which of a row's adds falls away, because it comes first, is not known
    yet, so that the least one is deducted. limits: i64[n].
    """
    label, full = np.arange(len(sizes)), sizes + adds
    room, *spaces = (limits + np.minimum(adds.min(axis=0, initial=ENOUGH), limits)).tolist()
    for begin in range(0, len(sizes), JOIN_AMONG):
        free = begin + np.flatnonzero(may[begin : begin + JOIN_AMONG])
        free = free[np.argsort(full[free, 0], kind="stable")].tolist()
        lengths, others = full[free, 0].tolist(), full[free, 1:].tolist()
        while free:
            members, length, used = [free.pop()], lengths.pop(), others.pop()
            while len(members) < most:
                i = bisect.bisect_right(lengths, room - length) - 1
                if i < 0:
                    break
                more = list(map(int.__add__, used, others[i]))
                if any(map(int.__gt__, more, spaces)):
                    break
                length, used = length + lengths.pop(i), more
                others.pop(i)
                members.append(free.pop(i))
            label[members] = min(members)
    return label
