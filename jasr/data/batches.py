"""Batches of fixed shapes: reads what the plan says, a few batches ahead, in threads.

A file that cannot be decoded when its turn comes leaves a padding row, a quarantine line and a
count behind; the run goes on until too many have failed. With several processes each has its own
lines and counts: `quarantine.jsonl` is process 0's, `quarantine.1.jsonl` process 1's; whether too
many have failed is judged by all together (`Loader.judge`).
"""

import dataclasses
import math
import os
import threading
import types
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jasr.data import entries
from jasr.data import index as index_lib
from jasr.data.config import DataError, ItemError
from jasr.data.plan import Plan

NEVER = 1 << 62  # a stream without end
JUDGED_AFTER = 1000  # utterances tried before their failures are a share (fewer in small sets)


class Loader:
    """Makes batches of an Index by global batch number. Safe to call from several threads."""

    def __init__(self, index, plan, cfg, quarantine_path=""):
        self.index, self.plan, self.layout, self.cfg = index, plan, plan.layout, cfg
        self.quarantine_path, self.fault = quarantine_path, ""
        self._listed = set(entries.loading_lines(quarantine_path))
        self.failed, self._last = {}, ""  # row -> reason
        self.alone = True  # the only process: its failures are all there are
        self._tried = np.zeros(len(index), bool)
        self._lock = threading.Lock()

    def load(self, position, process_index=0, process_count=1):
        """(epoch, bucket number, batch) of a global batch: this process's rows of it."""
        self.alone = process_count == 1
        epoch, bucket, rows = self.plan.batch(position)
        size, *limits = self.plan.shapes[bucket]
        if size % process_count:
            raise DataError(
                f"a batch of {size} rows cannot be shared by {process_count} processes: "
                f"set data.batch_multiple to a multiple of {process_count}"
            )
        share = size // process_count
        mine = rows[process_index * share : (process_index + 1) * share]
        batch = self.layout.empty((share, *limits))
        for i, row in enumerate(mine):
            self._put(batch, i, row, limits)
        return epoch, bucket, batch

    def _put(self, batch, i, row, limits):
        """Fills row i of the batch; items that fail are left out of it."""
        left = [n for n, item in enumerate(row.items) if item not in self.failed]
        while left:
            items = [self.index.item(row.items[n]) for n in left]
            words = np.asarray([row.words[n] for n in left], np.uint64)
            try:
                self.layout.fill(batch, i, items, words)
            except ItemError as e:
                self._fail(row.items[left.pop(e.number)], str(e))
                for name, blank in self.layout.empty((1, *limits)).items():
                    batch[name][i] = blank[0]
                continue
            batch["index"][i] = row.items[left[0]]
            with self._lock:
                self._tried[[row.items[n] for n in left]] = True
            return

    def _fail(self, row, reason):
        """Quarantines a row met while loading; a single process stops when too many have failed."""
        bad = self.index.bad_row(row, reason)._replace(loading=True)
        with self._lock:
            if row in self.failed:
                return
            self.failed[row], self._tried[row], self._last = reason, True, entries.named(bad)
            self._list(entries.quarantine_line(bad))
        entries.say(f"quarantined {entries.named(bad)}")
        if self.alone:
            self.judge(*self.tally())

    def _list(self, line):
        """Appends a line that is not yet in the quarantine file."""
        if not self.quarantine_path or line in self._listed:
            return
        try:
            with open(self.quarantine_path, "a", encoding="utf-8", errors="backslashreplace") as f:
                f.write(line)
        except OSError as e:
            self.fault = f"{self.quarantine_path} cannot be written: {e.strerror or e}"

    def tally(self):
        """i64[3]: utterances that failed and were tried here, and whether they can be listed."""
        return np.array([len(self.failed), self._tried.sum(), bool(self.fault)])

    def judge(self, failed, tried, faults, processes=1):
        """Raises DataError when too many utterances failed or a quarantine file cannot be written.

        failed, tried, faults: the sum of the `tally` of so many processes.
        """
        if faults:
            raise DataError(self.fault or "a process cannot write its quarantine file: see its log")
        judged = max(tried, min(processes * len(self.index), JUDGED_AFTER))
        if failed > self.cfg.max_bad_share * judged:
            raise DataError(
                f"{failed} of {tried} utterances could not be decoded, more than "
                f"data.max_bad_share={self.cfg.max_bad_share:g} allows"
                + (f"; the last one: {self._last}" if self._last else "")
            )


def stream(function, start, stop, num_threads, prefetch):
    """Yields function(i) for i in range(start, stop), computed ahead in threads, in order."""
    if num_threads < 1:
        yield from map(function, range(start, stop))
        return
    pool, waiting = ThreadPoolExecutor(num_threads), deque()
    try:
        for i in range(start, stop):
            waiting.append(pool.submit(function, i))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass
class _Set:
    """Data that batches are made of. `shapes` lists its buckets (B, *sizes), B global."""

    loader: Loader

    @property
    def shapes(self):
        return self.loader.plan.shapes

    @property
    def layout(self):
        """The seam.Layout of its batches."""
        return self.loader.layout

    @property
    def failed(self):
        """{index number: reason} of items that could not be read so far."""
        return dict(self.loader.failed)

    def facts(self):
        """What the plan depends on; see `plan.Plan.facts`."""
        return self.loader.plan.facts()

    def describe(self):
        """What there is, what was left out, and the buckets: a few lines."""
        return f"{self.loader.index.describe()}\n{self.loader.plan.describe()}"

    def _stream(self, start, stop, process_index, process_count):
        def load(position):
            return self.loader.load(position, process_index, process_count)

        cfg = self.loader.cfg
        return stream(load, start, stop, cfg.num_threads, cfg.prefetch)


class Train(_Set):
    """Endless training batches: a position means the same batch only under the same `facts`."""

    @property
    def fingerprint(self):
        """The digest that names the plan in steps that were saved without its facts."""
        return self.loader.plan.fingerprint

    def iterate(self, start=0, process_index=0, process_count=1):
        """Yields (epoch, bucket number, batch) of global batches start, start + 1, ... without end.

        The batch holds rows process_index * B / process_count on, B / process_count of them.
        """
        return self._stream(start, NEVER, process_index, process_count)

    def epoch_of(self, position):
        """The epoch that a global batch number lies in."""
        return self.loader.plan.locate(position)[0]

    def batches_in(self, epochs):
        """The number of batches in the first `epochs` passes over the data, a float."""
        whole, part = divmod(epochs, 1)
        plan = self.loader.plan
        counts = [len(plan.epoch(n).bucket) for n in range(int(whole) + (part > 0))]
        return sum(counts[: int(whole)]) + (math.ceil(part * counts[-1]) if part else 0)

    @property
    def longest_seconds(self):
        """Seconds of the longest bucket's rows, whose first axis counts samples."""
        return max(bucket[1] for bucket in self.shapes) / self.loader.cfg.sample_rate


class Eval(_Set):
    """Every usable item of a set once; ids and durations (s) by index number."""

    def __init__(self, loader):
        super().__init__(loader)
        index = loader.index
        self.ids = [index.id(n) for n in range(len(index))]
        self.durations = index.duration

    @property
    def bad(self):
        """The entries left out, as Bad records."""
        return self.loader.index.bad

    def item(self, number):
        """The seam.Item of a number, with the fields that its line has."""
        return self.loader.index.item(number)

    def iterate(self, process_index=0, process_count=1):
        """Yields (bucket number, batch), longest items first; this process's rows of each."""
        count = len(self.loader.plan.epoch(0).bucket)
        for _, bucket, batch in self._stream(0, count, process_index, process_count):
            yield bucket, batch


def _quarantine(path, process_index, bad):
    """This process's quarantine file; process 0's also lists what the index leaves out."""
    if path and process_index:
        root, ending = os.path.splitext(path)
        return f"{root}.{process_index}{ending}"
    if path:
        entries.write_quarantine(path, bad, entries.loading_lines(path))
    return path


def open_train(cfg, layout, seed, quarantine_path="", process_index=0, version=index_lib.VERSION):
    """The Train of `cfg.train`: an endless stream of batches that depends on cfg, layout and seed.

    layout: the seam.Layout of the task, or `AudioText(cfg, ...)`.
    version: that of the rules that the run began with, if it goes on; see `plan.Plan.facts`.

    Raises DataError: no usable data, too many bad entries, or settings that cannot be met.
    """
    index = index_lib.build(cfg.train, layout, cfg, version=version)
    layout = layout.for_set(float(index.duration.sum()), index.exact)
    path = _quarantine(quarantine_path, process_index, index.bad)
    plan = Plan(index, layout, cfg, seed, version=version)
    return Train(Loader(index, plan, cfg, path))


def open_eval(cfg, source, layout, quarantine_path="", process_index=0):
    """The Eval of one source (or several): no shuffling, no draws, no joining, no length limits.

    A text that cannot be encoded stays: its row carries the tokens of the words that can be, and
    `item` the whole of it, so that a word error rate counts it.
    """
    paths = {"": quarantine_path}
    return open_evals(cfg, {"": source}, layout, paths, process_index)[""]


def open_evals(cfg, sources, layout, quarantine_paths=None, process_index=0):
    """{name: Eval} of named sources, all with one list of shapes: fitted to all items together."""
    if not sources:
        return {}
    indexes = {name: index_lib.build(s, layout, cfg, scored=True) for name, s in sources.items()}
    exact = all(index.exact for index in indexes.values())
    seconds = float(sum(index.duration.sum() for index in indexes.values()))
    layout = layout.for_set(seconds, exact)
    sizes = np.concatenate([index.sizes for index in indexes.values()])
    together = types.SimpleNamespace(sizes=sizes, weights=(), source=np.zeros(len(sizes), np.int32))
    shapes = Plan(together, layout, cfg, 0, evaluation=True).shapes
    found = {}
    for name, index in indexes.items():
        path = _quarantine((quarantine_paths or {}).get(name, ""), process_index, index.bad)
        plan = Plan(index, layout, cfg, 0, evaluation=True, shapes=shapes)
        found[name] = Eval(Loader(index, plan, cfg, path))
    return found
