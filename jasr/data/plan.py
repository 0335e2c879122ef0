"""The global batch plan: a pure function of (settings, seed, epoch), addressed by one integer.

An epoch orders the utterances, draws a speed for each, joins some of them into rows, puts the rows
into buckets of one fixed shape each, cuts the buckets into global batches and shuffles those. It
reads no audio and keeps no state, so that batch 12345 is the same in every process, with any number
of threads, before and after a restart. Which utterances share a row, and their speeds, come again
after PERIOD epochs (in other batches), so that the epoch of any position is found at once. Random
numbers are raw Philox words, whose stream NumPy guarantees; permutations are stable sorts of them.
"""

import bisect
import dataclasses
import hashlib
import threading
from typing import NamedTuple

import numpy as np

from jasr.data import buckets
from jasr.data.config import DataError

ORDER, SPEED, ALONE, GAP, ROWS, BATCHES = range(6)  # the random streams of an epoch
VERSION = 2  # of the rules by which rows are joined; part of the fingerprint
PERIOD = 64  # epochs after which the same rows come again, in other batches
SPEED_SLACK = 32  # samples by which a stretched utterance may be longer than computed
JOIN_AMONG = 256  # partners are looked for among so many utterances of the shuffled order

NOT_IN_PLAN = (
    "train valid check max_bad_share cache_audio cache_mb num_threads prefetch".split()
)  # settings that change no batch


class Row(NamedTuple):
    """One row of a batch: its utterances (index numbers), their speeds, and the samples of silence
    before each."""

    utterances: tuple
    speeds: tuple
    gaps: tuple


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of an epoch: row g joins positions first[g] : first[g + 1] of the arrays.

    utterance i32[M] index numbers, choice u8[M] number of the speed, gap i32[M] samples of silence
    before (0 at the begin of a row), first i32[G + 1]; samples i64[G] and tokens i64[G] are upper
    bounds of the rows' sizes.
    """

    utterance: np.ndarray
    choice: np.ndarray
    gap: np.ndarray
    first: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Batch j holds rows members[begin[j] : begin[j + 1]]; what its bucket lacks is padding."""

    rows: Rows
    members: np.ndarray
    begin: np.ndarray
    bucket: np.ndarray


class Plan:
    """Batches by position. `shapes` lists (B, S, L) of each bucket, B global; `fingerprint` names
    everything that a position depends on."""

    def __init__(self, index, cfg, seed, evaluation=False):
        self.cfg, self.seed, self.evaluation = cfg, int(seed), evaluation
        self.weights, self.source = index.weights, index.source
        self.seconds, self.tokens = index.duration, index.token_count
        self.tolerance = index.tolerance(cfg)  # longer than that, audio is refused
        speeds = (1.0,) if evaluation else tuple(map(float, cfg.speeds))
        self.draws, self.speeds = len(speeds), (*speeds, 1.0)  # the last: when it fits no other way
        self.concat = 1 if evaluation else cfg.concat
        self.period = PERIOD if len(set(speeds)) > 1 or self.concat > 1 else 1
        if any(self.weights):
            self.period = 0
        self._lock = threading.RLock()
        self._epochs, self._ends = {}, []
        self.shapes = self._shapes()
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_IN_PLAN}
        facts = (VERSION, index.fingerprint(), self.seed, self.shapes, sorted(settings.items()))
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

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
            speeds = tuple(self.speeds[c] for c in epoch.rows.choice[at])
            utterances, gaps = epoch.rows.utterance[at].tolist(), epoch.rows.gap[at].tolist()
            rows.append(Row(tuple(utterances), speeds, tuple(gaps)))
        return number, int(epoch.bucket[j]), rows

    def epoch(self, number):
        """The Epoch; the last two asked for are kept."""
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) > 1:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[number] = self._build(number)
            return self._epochs[number]

    # ---- one epoch ----

    def _build(self, number):
        _, samples, tokens = self.shapes[-1]
        rows = self._rows(number, samples, tokens, self._joined_limit(samples))
        by_samples = np.searchsorted([s for _, s, _ in self.shapes], rows.samples)
        by_tokens = np.searchsorted([t for _, _, t in self.shapes], rows.tokens)
        sizes, count = [b for b, _, _ in self.shapes], len(rows.samples)
        shuffled = np.arange(count)
        if not self.evaluation:
            shuffled = permutation(count, self.seed, number, ROWS)
        batches = buckets.fill(np.maximum(by_samples, by_tokens), sizes, shuffled)
        if not self.evaluation:
            order = permutation(len(batches), self.seed, number, BATCHES)
            batches = [batches[j] for j in order]
        members = np.concatenate([rows_of for _, rows_of in batches]).astype(np.int32)
        begin = np.append(0, np.cumsum([len(rows_of) for _, rows_of in batches]))
        return Epoch(rows, members, begin, np.asarray([b for b, _ in batches]))

    def _joined_limit(self, samples):
        """Samples up to which rows are joined, given those of the largest bucket."""
        limit = round(self.cfg.concat_duration * self.cfg.sample_rate)
        return min(limit or samples, samples)

    def _rows(self, number, max_samples, max_tokens, joined_samples):
        """The Rows of an epoch, none above the given sizes; they repeat with `period`."""
        number = number % self.period if self.period else number
        order = self._order(number).astype(np.int32)
        count = len(order)
        choice = np.zeros(count, np.uint8)
        if self.draws > 1:
            words = random_words(count, self.seed, number, SPEED)
            choice = (words % np.uint64(self.draws)).astype(np.uint8)
        samples = self._lengths(order, choice)
        if (long := samples > max_samples).any():  # stretched beyond the last explicit bucket
            choice[long] = self.draws
            samples[long] = self._lengths(order[long], choice[long])
        tokens = self.tokens[order].astype(np.int64)
        if self.concat == 1:
            none = np.zeros(count, np.int32)
            return Rows(order, choice, none, np.arange(count + 1, dtype=np.int32), samples, tokens)
        low, high = (x * self.cfg.sample_rate for x in self.cfg.concat_gap)
        gap = np.round(low + (high - low) * uniform(count, self.seed, number, GAP)).astype(np.int32)
        alone = uniform(count, self.seed, number, ALONE) >= self.cfg.concat_share
        row = join(samples, gap, tokens, ~alone, self.concat, joined_samples, max_tokens)
        by_row = np.argsort(row, kind="stable")
        begins = np.flatnonzero(np.append(True, np.diff(row[by_row]) != 0))
        gap, samples, tokens = gap[by_row], samples[by_row], tokens[by_row]
        gap[begins] = 0
        joints = np.ones(count, np.int64)
        joints[begins] = 0
        first = np.append(begins, count).astype(np.int32)
        sums = np.add.reduceat(samples + gap, begins), np.add.reduceat(tokens + joints, begins)
        return Rows(order[by_row], choice[by_row], gap, first, *sums)

    def _lengths(self, utterances, choice):
        """i64[M]: upper bounds of the samples of utterances at their speeds."""
        speeds = np.asarray(self.speeds)[choice]
        seconds = (self.seconds[utterances] + self.tolerance) / speeds
        exact = np.ceil(seconds * self.cfg.sample_rate)
        return exact.astype(np.int64) + np.where(speeds == 1.0, 1, SPEED_SLACK)

    def _order(self, number):
        """i64[M] index numbers of the epoch's utterances in the order in which they are joined.

        Without weights each utterance comes once. With weights an epoch has as many utterances as
        the index; each source gives its share of them and walks on through its own permutations,
        so that none of its utterances comes again before all have come.
        """
        total = len(self.seconds)
        if self.evaluation:  # longest first
            return np.argsort(-self.seconds, kind="stable")
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
        cfg, everything = self.cfg, np.arange(len(self.seconds))
        slowest = np.full(len(everything), int(np.argmin(self.speeds[: self.draws])))
        limit = int(self._lengths(everything, slowest).max())
        edges, most = [], []
        if not self.evaluation:
            edges, most = buckets.explicit(cfg, self.tolerance)
        if edges:
            limit = edges[-1]
        elif self.concat > 1:
            limit = max(limit, round(cfg.concat_duration * cfg.sample_rate))
        limit = self._rounded(limit)
        enough = int(self.tokens.sum(dtype=np.int64)) + len(self.tokens)
        limits = limit, most[-1] if most else enough, self._joined_limit(limit)
        rows = self._rows(0, *limits)
        most_tokens = int(max(self.tokens.max(), np.quantile(rows.tokens, 0.999)))
        if not edges:
            multiple = cfg.length_multiple
            count = len(cfg.bucket_duration_bins) or cfg.num_buckets
            edges = buckets.best_edges(rows.samples, count, multiple, limit)
        if not most:
            most = buckets.token_limits(rows.samples, rows.tokens, edges, most_tokens)
        elif most[-1] < self.tokens.max():
            raise DataError(
                f"the last of data.bucket_duration_bins holds {most[-1]} tokens, but a text has "
                f"{self.tokens.max()}: raise it or set data.max_tokens={most[-1]}"
            )
        lengths = [self._rounded(e) for e in edges]
        texts = [buckets.round_up(max(t, 1), cfg.token_multiple) for t in most]
        sizes = buckets.batch_sizes(cfg, lengths, self.evaluation)
        shapes = list(zip(sizes, lengths, texts, strict=True))
        return self._even(shapes, rows) if self.evaluation else shapes

    def _rounded(self, samples):
        """A bucket's length: with one sample more, a multiple."""
        return buckets.round_up(samples + 1, self.cfg.length_multiple) - 1

    def _even(self, shapes, rows):
        """Shapes of a fixed set: as many batches as before, with as little padding as possible."""
        self.shapes = shapes
        bucket = self._build(0).bucket
        even = []
        for b, (size, samples, tokens) in enumerate(shapes):
            if count := int((bucket == b).sum()):
                fits = (rows.samples <= samples).sum()
                least = -(-int(min(fits, size * count)) // count)
                size = min(size, buckets.round_up(least, self.cfg.batch_multiple))
            even.append((size, samples, tokens))
        return even

    def padding_share(self, number=0):
        """Share of an epoch's padded samples that are no speech."""
        epoch = self.epoch(number)
        padded = sum(self.shapes[b][0] * self.shapes[b][1] for b in epoch.bucket)
        speeds = np.asarray(self.speeds)[epoch.rows.choice]
        used = float((self.seconds[epoch.rows.utterance] / speeds).sum()) * self.cfg.sample_rate
        return 1.0 - used / float(padded)

    def describe(self):
        """The buckets, one line each, and the share of padding in the first epoch."""
        epoch = self.epoch(0)
        lines = []
        for b, (size, samples, tokens) in enumerate(self.shapes):
            seconds, count = samples / self.cfg.sample_rate, int((epoch.bucket == b).sum())
            lines.append(
                f"bucket {b}: {count} batches of {size} × {seconds:.2f} s, {tokens} tokens"
            )
        share = 100 * self.padding_share()
        lines.append(f"{len(epoch.bucket)} batches in epoch 0, {share:.1f} % padding")
        return "\n".join(lines)


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


def join(samples, gap, tokens, may, most, max_samples, max_tokens):
    """i64[M] row labels, equal for utterances that share a row; a label is the row's first member.

    Among each JOIN_AMONG utterances that `may` be joined, the longest one left takes the longest
    one that fits beside it, and so on up to `most`: rows come out near max_samples (best-fit
    decreasing bin packing). Sizes count one token and the gap of each utterance; which of a row's
    gaps falls away, because it comes first, is not known yet, so that the least one is deducted.
    """
    label = np.arange(len(samples))
    room = max_samples + int(gap.min(initial=max_samples))
    for begin in range(0, len(samples), JOIN_AMONG):
        free = begin + np.flatnonzero(may[begin : begin + JOIN_AMONG])
        free = free[np.argsort(samples[free] + gap[free], kind="stable")].tolist()
        lengths = (samples[free] + gap[free]).tolist()
        while free:
            members, length = [free.pop()], lengths.pop()
            text = int(tokens[members[0]])
            while len(members) < most:
                i = bisect.bisect_right(lengths, room - length) - 1
                if i < 0 or text + 1 + tokens[free[i]] > max_tokens:
                    break
                length += lengths.pop(i)
                members.append(free.pop(i))
                text += 1 + int(tokens[members[-1]])
            label[members] = min(members)
    return label
