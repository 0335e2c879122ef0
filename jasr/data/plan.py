"""The global batch plan: a pure function of (settings, seed, epoch), addressed by one integer.

An epoch orders the utterances, draws a speed for each, joins some of them into rows, puts the rows
into buckets of one fixed shape each, cuts the buckets into global batches and shuffles those. It
reads no audio and keeps no state, so position 12345 is the same batch in every process, with any
number of threads, before and after a restart. Random numbers are raw Philox words, whose stream
NumPy guarantees; permutations are stable sorts of them.
"""

import dataclasses
import hashlib
import threading

import numpy as np

from jasr.data.index import DataError

SPEED_SLACK = 32  # samples by which resampling may round a stretched utterance up
ESTIMATE_ROWS = 200_000  # at most so many rows are looked at to choose buckets


def random_words(count, *key):
    """u64[count] of the Philox stream named by the integers `key`."""
    return np.random.Philox(np.random.SeedSequence([int(k) for k in key])).random_raw(count)


def uniform(count, *key):
    """f64[count] in [0, 1) of the stream named by `key`."""
    return (random_words(count, *key) >> np.uint64(11)) * 2.0**-53


def permutation(count, *key):
    """i64[count]: the numbers below `count` in the order of the stream named by `key`."""
    return np.argsort(random_words(count, *key), kind="stable")


# names of the random streams of an epoch
ORDER, SPEED, ALONE, GAP, BATCHES = range(5)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of an epoch in order: row g joins utterances first[g] : first[g + 1].

    utterance i64[M] index numbers, speed f64[M], gap i64[M] samples of silence before an
    utterance (0 before the first of a row), first i64[G + 1], samples i64[G] and tokens i64[G]
    upper bounds of a row's sizes.
    """

    utterance: np.ndarray
    speed: np.ndarray
    gap: np.ndarray
    first: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The batches of an epoch: batch j holds rows members[begin[j] : begin[j + 1]] of `rows`,
    the missing ones up to the bucket's size being padding."""

    rows: Rows
    members: np.ndarray
    begin: np.ndarray
    bucket: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One row of a batch: index numbers, speeds and gaps (samples before each) of its parts."""

    utterances: tuple
    speeds: tuple
    gaps: tuple


class Plan:
    """Batches by position. `shapes` lists (B, S, L) of each bucket, B global."""

    def __init__(self, index, cfg, seed, evaluation=False):
        self.cfg, self.seed, self.evaluation = cfg, int(seed), evaluation
        self.weights, self.source = index.weights, index.source
        self.seconds = index.duration
        self.tokens = index.token_count.astype(np.int64)
        self.slack = 0 if index.exact else round(cfg.duration_tolerance * cfg.sample_rate)
        check_settings(cfg)
        if evaluation:
            self.speeds, self.concat = (1.0,), 1
        else:
            self.speeds, self.concat = tuple(map(float, cfg.speeds)), cfg.concat
        self.shapes = self._shapes()
        self._lock = threading.Lock()
        self._epochs = {}
        self._ends = []  # position after each epoch so far
        text = repr((index.fingerprint(), self.seed, self.shapes, _plan_settings(cfg)))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    # ---- positions ----

    def locate(self, position):
        """(epoch, batch within it) of a global batch number."""
        if position < 0:
            raise DataError(f"data position {position} is negative")
        if self._constant():
            return divmod(position, self._count(0))
        while not self._ends or self._ends[-1] <= position:
            with self._lock:
                last = self._ends[-1] if self._ends else 0
                epoch = len(self._ends)
            count = self._count(epoch)
            with self._lock:
                if len(self._ends) == epoch:
                    self._ends.append(last + count)
        epoch = int(np.searchsorted(self._ends, position, side="right"))
        return epoch, position - (self._ends[epoch - 1] if epoch else 0)

    def batch(self, position):
        """(epoch, bucket number, [RowPlan]) of a global batch; rows beyond the list are padding."""
        number, j = self.locate(position)
        epoch = self.epoch(number)
        rows = []
        for g in epoch.members[epoch.begin[j] : epoch.begin[j + 1]]:
            part = slice(epoch.rows.first[g], epoch.rows.first[g + 1])
            rows.append(
                RowPlan(
                    tuple(epoch.rows.utterance[part].tolist()),
                    tuple(epoch.rows.speed[part].tolist()),
                    tuple(epoch.rows.gap[part].tolist()),
                )
            )
        return number, int(epoch.bucket[j]), rows

    def epoch(self, number):
        """The Epoch; the last two asked for are kept."""
        with self._lock:
            if number in self._epochs:
                return self._epochs[number]
        epoch = self._build(number)
        with self._lock:
            self._epochs[number] = epoch
            for old in sorted(self._epochs)[:-2]:
                if old != number:
                    del self._epochs[old]
        return epoch

    def _constant(self):
        """Whether every epoch has the same number of batches: nothing random sizes the rows."""
        return len(set(self.speeds)) == 1 and self.concat == 1 and not any(self.weights)

    def _count(self, number):
        return len(self.epoch(number).bucket)

    # ---- one epoch ----

    def _order(self, number):
        """i64[M] index numbers of the epoch's utterances, shuffled (evaluation: longest first).

        Without weights each utterance comes once. With weights an epoch has as many utterances as
        the index; source s gives its share of them, walking on through its own permutations, so
        that no utterance of a source comes twice before all have come once.
        """
        total = len(self.seconds)
        if self.evaluation:
            return np.argsort(-self.seconds, kind="stable")
        if not any(self.weights):
            return permutation(total, self.seed, number, ORDER)
        chosen = []
        for s, take in enumerate(shares(self.weights, total)):
            mine = np.flatnonzero(self.source == s)
            if not len(mine):
                continue
            begin = number * take
            passes = range(begin // len(mine), (begin + take - 1) // len(mine) + 1 if take else 0)
            walked = [mine[permutation(len(mine), self.seed, p, ORDER, s)] for p in passes]
            if walked:
                skip = begin % len(mine)
                chosen.append(np.concatenate(walked)[skip : skip + take])
        rows = np.concatenate(chosen)
        return rows[permutation(len(rows), self.seed, number, ORDER)]

    def _lengths(self, utterances, speeds):
        """i64[M]: upper bounds of the samples at these speeds."""
        exact = np.ceil(self.seconds[utterances] / speeds * self.cfg.sample_rate)
        return exact.astype(np.int64) + np.where(speeds == 1.0, 1, SPEED_SLACK)

    def _rows(self, number, max_samples, max_tokens):
        """The Rows of an epoch, none above the given sizes."""
        order = self._order(number)
        speed = np.asarray(self.speeds)[self._draw(len(order), len(self.speeds), number)]
        samples = self._lengths(order, speed)
        slow = samples > max_samples  # would outgrow the last explicit bucket: as recorded
        speed = np.where(slow, 1.0, speed)
        samples = np.where(slow, self._lengths(order, np.ones_like(speed)), samples)
        tokens = self.tokens[order]
        if self.concat == 1:
            first = np.arange(len(order) + 1)
            return Rows(order, speed, np.zeros(len(order), np.int64), first, samples, tokens)
        low, high = (g * self.cfg.sample_rate for g in self.cfg.concat_gap)
        gap = np.round(low + (high - low) * uniform(len(order), self.seed, number, GAP))
        gap = gap.astype(np.int64)
        alone = uniform(len(order), self.seed, number, ALONE) >= self.cfg.concat_share
        opens = join(samples, gap, tokens, alone, self.concat, max_samples, max_tokens)
        begins = np.flatnonzero(opens)
        gap = np.where(opens, 0, gap)
        return Rows(
            order,
            speed,
            gap,
            np.append(begins, len(order)),
            np.add.reduceat(samples + gap, begins),
            np.add.reduceat(tokens + ~opens, begins),
        )

    def _draw(self, count, choices, number):
        if choices == 1:
            return np.zeros(count, np.int64)
        return (random_words(count, self.seed, number, SPEED) % np.uint64(choices)).astype(np.int64)

    def _build(self, number):
        _, s, t = self.shapes[-1]
        rows = self._rows(number, s - self.slack, t)
        bucket = self._bucket_of(rows)
        members, begin, kinds = fill(bucket, [b for b, _, _ in self.shapes])
        if not self.evaluation:
            order = permutation(len(kinds), self.seed, number, BATCHES)
            sizes = np.diff(begin)[order]
            picked = np.repeat(begin[:-1][order] - np.append(0, np.cumsum(sizes)[:-1]), sizes)
            members, kinds = members[picked + np.arange(len(members))], kinds[order]
            begin = np.append(0, np.cumsum(sizes))
        return Epoch(rows, members, begin, kinds)

    def _bucket_of(self, rows):
        """i64[G]: the first bucket that holds a row."""
        by_samples = np.searchsorted([s - self.slack for _, s, _ in self.shapes], rows.samples)
        by_tokens = np.searchsorted([t for _, _, t in self.shapes], rows.tokens)
        return np.maximum(by_samples, by_tokens)

    # ---- buckets ----

    def _shapes(self):
        cfg = self.cfg
        slowest = np.full(len(self.seconds), min(self.speeds))
        limit = int(self._lengths(np.arange(len(self.seconds)), slowest).max())
        edges, most = self._explicit()
        if edges:
            limit = edges[-1]
        # the longest text of a joined row: what a first look at joining by length alone gives
        huge = int(self.tokens.sum()) + len(self.tokens) + 1
        rows = self._rows(0, limit, huge if self.concat > 1 else int(self.tokens.max()))
        look = slice(0, ESTIMATE_ROWS)
        samples, tokens = rows.samples[look], rows.tokens[look]
        cap = int(max(self.tokens.max(), np.quantile(tokens, 0.999)))
        if not edges:
            edges = best_edges(samples, cfg.num_buckets, cfg.length_multiple, limit)
        if not most:
            most = [cap] * len(edges)
            for b, inside in enumerate(np.split(np.argsort(samples), _cuts(samples, edges))):
                if b < len(edges) - 1:
                    most[b] = int(np.quantile(tokens[inside], 0.995)) if len(inside) else 1
            most = np.minimum(np.maximum.accumulate(most), cap).tolist()
        elif most[-1] < self.tokens.max():
            raise DataError(
                f"the last bucket holds {most[-1]} tokens, but there is a text of "
                f"{self.tokens.max()}: raise it or set data.max_tokens={most[-1]}"
            )
        up = cfg.length_multiple
        lengths = [-(-(e + self.slack) // up) * up for e in edges]
        texts = [-(-max(t, 1) // cfg.token_multiple) * cfg.token_multiple for t in most]
        return list(zip(self._sizes(lengths), lengths, texts, strict=True))

    def _explicit(self):
        """(samples, tokens) of data.bucket_duration_bins, each [] where not given."""
        bins = self.cfg.bucket_duration_bins
        if self.evaluation or not bins:
            return [], []
        pairs = [b if isinstance(b, (tuple, list)) else (b, 0) for b in bins]
        room = 1 + (SPEED_SLACK if set(self.speeds) != {1.0} else 0)
        edges = [int(np.ceil(float(d) * self.cfg.sample_rate)) + room for d, _ in pairs]
        most = [int(t) for _, t in pairs]
        if edges != sorted(edges) or most != sorted(most):
            raise DataError(f"data.bucket_duration_bins must not decrease: {bins}")
        return edges, most if all(most) else []

    def _sizes(self, lengths):
        """Rows of each bucket's global batches."""
        cfg, multiple = self.cfg, self.cfg.batch_multiple
        sizes = list(cfg.bucket_batch_size)
        if not sizes or (self.evaluation and len(sizes) != 1):
            sizes = [int(cfg.batch_duration * cfg.sample_rate / s) for s in lengths]
            sizes = [max(multiple, b // multiple * multiple) for b in sizes]
        elif len(sizes) == 1:
            sizes = sizes * len(lengths)
        if len(sizes) != len(lengths):
            raise DataError(
                f"data.bucket_batch_size has {len(sizes)} numbers for {len(lengths)} buckets"
            )
        wrong = [b for b in sizes if b < 1 or b % multiple]
        if wrong:
            raise DataError(
                f"data.bucket_batch_size {wrong} must be multiples of data.batch_multiple={multiple}"
            )
        return sizes

    def padding_share(self, number=0):
        """Share of the epoch's padded samples that are padding."""
        epoch = self.epoch(number)
        padded = sum(self.shapes[b][0] * self.shapes[b][1] for b in epoch.bucket)
        used = self._lengths(epoch.rows.utterance, epoch.rows.speed).sum()
        return 1.0 - float(used) / float(padded)

    def describe(self):
        """The buckets, one line each, and the share of padding in the first epoch."""
        epoch = self.epoch(0)
        rate = self.cfg.sample_rate
        lines = [
            f"bucket {b}: {n} rows × {s / rate:.2f} s × {t} tokens, "
            f"{int((epoch.bucket == b).sum())} batches an epoch"
            for b, (n, s, t) in enumerate(self.shapes)
        ]
        lines.append(
            f"{len(epoch.bucket)} batches an epoch, {100 * self.padding_share():.1f} % padding"
        )
        return "\n".join(lines)


def shares(weights, total):
    """Whole numbers in proportion to `weights` that sum to `total` (largest remainders)."""
    exact = np.asarray(weights) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[i] += 1
    return counts.tolist()


def join(samples, gap, tokens, alone, most, max_samples, max_tokens):
    """bool[M]: which utterances open a row, when up to `most` neighbours share one.

    Utterances are taken in blocks of `most`; inside a block, each joins the row before it while
    the sizes (with `gap` samples and one token between) stay within the limits. Those `alone`
    stay so.
    """
    count = len(samples)
    blocks = -(-count // most)

    def blocked(x):
        return np.append(x, np.zeros(blocks * most - count, x.dtype)).reshape(blocks, most)

    samples, gap, tokens, alone = map(blocked, (samples, gap, tokens, alone))
    opens = np.ones((blocks, most), bool)
    length, text = samples[:, 0].copy(), tokens[:, 0].copy()
    for k in range(1, most):
        longer, more = length + gap[:, k] + samples[:, k], text + 1 + tokens[:, k]
        joins = (longer <= max_samples) & (more <= max_tokens)
        joins &= ~alone[:, k] & ~alone[:, k - 1]
        length = np.where(joins, longer, samples[:, k])
        text = np.where(joins, more, tokens[:, k])
        opens[:, k] = ~joins
    return opens.reshape(-1)[:count]


def fill(bucket, sizes):
    """(members, begin, kinds): batches of rows, each bucket's in the order of the rows.

    What is missing in a bucket's last batch is taken from the next smaller bucket, whose rows fit
    too; so at most the smallest bucket ends in a batch that is not full.
    """
    groups = [np.flatnonzero(bucket == b) for b in range(len(sizes))]
    kinds = []
    for b in range(len(sizes) - 1, -1, -1):
        below = b - 1
        while len(groups[b]) % sizes[b] and below >= 0:
            missing = -len(groups[b]) % sizes[b]
            groups[b] = np.concatenate([groups[b], groups[below][:missing]])
            groups[below] = groups[below][missing:]
            below -= 1
        kinds += [b] * -(-len(groups[b]) // sizes[b])
    order = range(len(sizes) - 1, -1, -1)
    members = np.concatenate([groups[b] for b in order])
    lengths = np.concatenate(
        [
            np.minimum(sizes[b], len(groups[b]) - np.arange(0, len(groups[b]), sizes[b]))
            for b in order
        ]
    )
    return members, np.append(0, np.cumsum(lengths)).astype(np.int64), np.asarray(kinds)


def _cuts(samples, edges):
    """Where the sorted samples pass each edge but the last."""
    return np.searchsorted(np.sort(samples), edges[:-1], side="right")


def best_edges(samples, count, multiple, limit):
    """Ascending upper edges (samples) of at most `count` buckets with the least padding.

    Dynamic programming over a histogram in steps of `multiple` (coarser where the range is long);
    the last edge is `limit`.
    """
    step = multiple * -(-limit // (multiple * 512))
    bins = -(-limit // step)
    number = np.minimum((samples - 1) // step, bins - 1)
    rows = np.append(0, np.cumsum(np.bincount(number, minlength=bins)))
    tops = np.arange(1, bins + 1) * step
    cost = np.where(np.arange(bins + 1)[:, None] <= np.arange(bins)[None, :], 0.0, np.inf)
    cost = cost + (rows[1:][None, :] - rows[:, None]) * tops[None, :]  # bucket of bins i..j
    best, choice = cost[0], []
    for _ in range(count - 1):
        through = best[:, None] + cost[1:, :]  # previous bucket ends at bin i, this one at j
        before = np.argmin(through, axis=0)
        value = through[before, np.arange(bins)]
        choice.append(np.where(value < best, before, -1))
        best = np.minimum(best, value)
    edges, end = [], bins - 1
    for before in reversed(choice):
        if before[end] >= 0:
            edges.append(int(tops[end]))
            end = int(before[end])
    edges.append(int(tops[end]))
    return [*sorted(set(edges))[:-1], limit]


def check_settings(cfg):
    """Raises DataError on settings that no plan can follow."""
    if cfg.num_buckets < 1 or cfg.batch_multiple < 1 or cfg.concat < 1:
        raise DataError("data.num_buckets, data.batch_multiple and data.concat must be at least 1")
    if not cfg.speeds or min(cfg.speeds) <= 0:
        raise DataError(f"data.speeds must be factors above 0, got {cfg.speeds}")
    if cfg.length_multiple < 1 or cfg.token_multiple < 1:
        raise DataError("data.length_multiple and data.token_multiple must be at least 1")
    if len(cfg.concat_gap) != 2 or not 0 <= cfg.concat_gap[0] <= cfg.concat_gap[1]:
        raise DataError(f"data.concat_gap must be (least, most) seconds, got {cfg.concat_gap}")


NOT_IN_PLAN = {
    "train", "valid", "check", "max_bad_share", "cache_audio", "cache_mb", "num_threads", "prefetch",
}  # fmt: skip


def _plan_settings(cfg):
    return sorted((k, v) for k, v in dataclasses.asdict(cfg).items() if k not in NOT_IN_PLAN)
