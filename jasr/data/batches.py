"""Batches of fixed shapes: reads what the plan says, a few batches ahead, in threads.

A file that cannot be decoded when its turn comes leaves a padding row, a quarantine line and a
count behind; the run goes on until too many have failed. With several processes each has its own
lines and counts: `quarantine.jsonl` is process 0's, `quarantine.1.jsonl` process 1's; whether too
many have failed is judged by all together (`judge`).
"""

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


class _Set:
    """Batches of an Index by global batch number. Safe to call from several threads.

    shapes: the buckets (B, *sizes), B global; layout: the seam.Layout of the batches; failed:
    {index number: reason} of items that could not be read so far.
    """

    def __init__(self, index, plan, cfg, quarantine_path=""):
        self.index, self.plan, self.cfg = index, plan, cfg
        self.layout, self.shapes, self.facts = plan.layout, plan.shapes, plan.facts
        self.quarantine_path, self.fault = quarantine_path, ""
        self._listed = set(entries.loading_lines(quarantine_path))
        self.failed, self._last = {}, ""
        self.alone = True  # the only process: its failures are all there are
        self._tried = np.zeros(len(index), bool)
        self._lock = threading.Lock()

    def describe(self):
        """What there is, what was left out, and the buckets: a few lines."""
        return f"{self.index.describe()}\n{self.plan.describe()}"

    def load(self, position, process_index=0, process_count=1):
        """(epoch, bucket number, batch) of a global batch: this process's rows of it."""
        self.alone = process_count == 1
        epoch, bucket, rows = self.plan.batch(position)
        size, *limits = self.shapes[bucket]
        if size % process_count:
            raise DataError(
                f"a batch of {size} rows cannot be shared by {process_count} processes: "
                f"set data.batch_multiple to a multiple of {process_count}"
            )
        share = size // process_count
        batch = self.layout.empty((share, *limits))
        for i, row in enumerate(rows[process_index * share : (process_index + 1) * share]):
            self._put(batch, i, row, limits)
        return epoch, bucket, batch

    def stream(self, start, stop, *process):
        """Yields `load` of positions start..stop - 1 in order, computed ahead in threads."""
        if self.cfg.num_threads < 1:
            yield from (self.load(i, *process) for i in range(start, stop))
            return
        pool, waiting = ThreadPoolExecutor(self.cfg.num_threads), deque()
        try:
            for i in range(start, stop):
                waiting.append(pool.submit(self.load, i, *process))
                if len(waiting) > self.cfg.prefetch:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _put(self, batch, i, row, limits):
        """Fills row i of the batch; items that fail are left out of it."""
        left = [n for n, item in enumerate(row.items) if item not in self.failed]
        while left:
            numbers = [row.items[n] for n in left]
            words = np.asarray([row.words[n] for n in left], np.uint64)
            try:
                self.layout.fill(batch, i, list(map(self.index.item, numbers)), words)
            except ItemError as e:
                self._fail(row.items[left.pop(e.number)], str(e))
                for name, blank in self.layout.empty((1, *limits)).items():
                    batch[name][i] = blank[0]
                continue
            batch["index"][i] = numbers[0]
            with self._lock:
                self._tried[numbers] = True
            return

    def _fail(self, row, reason):
        """Quarantines a row met while loading; a single process stops when too many have failed."""
        bad = self.index.bad_row(row, reason)._replace(loading=True)
        line, path = entries.quarantine_line(bad), self.quarantine_path
        with self._lock:
            if row in self.failed:
                return
            self.failed[row], self._tried[row], self._last = reason, True, entries.named(bad)
            try:
                if path and line not in self._listed:
                    with open(path, "a", encoding="utf-8", errors="backslashreplace") as f:
                        f.write(line)
            except OSError as e:
                self.fault = f"{path} cannot be written: {e.strerror or e}"
        entries.say(f"quarantined {entries.named(bad)}")
        if self.alone:
            self.judge(*self.tally())

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


class Train(_Set):
    """Endless training batches: a position means the same batch only under the same `facts`."""

    @property
    def fingerprint(self):
        """The digest that names the plan in steps that were saved without its facts."""
        return self.plan.fingerprint

    def iterate(self, start=0, process_index=0, process_count=1):
        """Yields (epoch, bucket number, batch) of global batches start, start + 1, ... without end.

        The batch holds rows process_index * B / process_count on, B / process_count of them.
        """
        return self.stream(start, NEVER, process_index, process_count)

    def epoch_of(self, position):
        """The epoch that a global batch number lies in."""
        return self.plan.locate(position)[0]

    def batches_in(self, epochs):
        """The number of batches in the first `epochs` passes over the data, a float."""
        counts = [len(self.plan.epoch(n).bucket) for n in range(math.ceil(epochs))]
        whole, part = divmod(epochs, 1)
        return sum(counts[: int(whole)]) + (math.ceil(part * counts[-1]) if part else 0)

    def longest(self):
        """{axis of the layout: the largest size of a row on it}."""
        sizes = zip(*(bucket[1:] for bucket in self.shapes), strict=True)
        return dict(zip(self.layout.axes, map(max, sizes), strict=True))


class Eval(_Set):
    """Every usable item of a set once; ids and durations (s) by index number, the entries left out
    as Bad records in `bad`, and item(number), the seam.Item with the fields of its line."""

    def __init__(self, *made):
        super().__init__(*made)
        index = self.index
        self.ids = [index.id(n) for n in range(len(index))]
        self.durations, self.bad, self.item = index.duration, index.bad, index.item

    def iterate(self, process_index=0, process_count=1):
        """Yields (bucket number, batch), longest items first; this process's rows of each."""
        count = len(self.plan.epoch(0).bucket)
        for _, bucket, batch in self.stream(0, count, process_index, process_count):
            yield bucket, batch


def _quarantine(path, process_index, bad):
    """This process's quarantine file; process 0's also lists what the index leaves out."""
    root, ending = os.path.splitext(path)
    if path and process_index:
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
    return Train(index, plan, cfg, path)


def open_eval(cfg, source, layout, quarantine_path="", process_index=0):
    """The Eval of one source (or several): no shuffling, no draws, no joining, no length limits.

    A text that cannot be encoded stays: its row carries the tokens of the words that can be, and
    `item` the whole of it, so that a word error rate counts it.
    """
    return open_evals(cfg, {"": source}, layout, {"": quarantine_path}, process_index)[""]


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
        found[name] = Eval(index, plan, cfg, path)
    return found
