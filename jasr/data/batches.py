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

import numpy as np

from jasr import audio
from jasr.data import entries, recording
from jasr.data import index as index_lib
from jasr.data.config import DataError
from jasr.data.plan import Plan
from jasr.seam import Item

NEVER = 1 << 62  # a stream without end, for libraries that ask for a length
JUDGED_AFTER = 1000  # utterances tried before their failures are a share (fewer in small sets)


class Loader:
    """Makes batches of an Index by global batch number. Safe to call from several threads."""

    def __init__(self, index, plan, encode, cfg, quarantine_path=""):
        self.index, self.plan, self.encode, self.cfg = index, plan, encode, cfg
        self.quarantine_path, self.fault = quarantine_path, ""
        self._listed = set(entries.loading_lines(quarantine_path))
        self.failed, self._last = {}, ""  # row -> reason
        self.alone = True  # the only process: its failures are all there are
        self._tried = np.zeros(len(index), bool)
        self._lock = threading.Lock()
        seconds = float(index.duration.sum()) * sum(1 / s for s in set(plan.speeds))
        fits = 2 * seconds * cfg.sample_rate <= cfg.cache_mb * 2**20
        self._cache = {} if cfg.cache_audio and fits else None

    def load(self, position, process_index=0, process_count=1):
        """(epoch, bucket number, batch) of a global batch: this process's rows of it."""
        self.alone = process_count == 1
        epoch, bucket, rows = self.plan.batch(position)
        size, samples, tokens = self.plan.shapes[bucket]
        if size % process_count:
            raise DataError(
                f"a batch of {size} rows cannot be shared by {process_count} processes: "
                f"set data.batch_multiple to a multiple of {process_count}"
            )
        share = size // process_count
        mine = rows[process_index * share : (process_index + 1) * share]
        batch = empty((share, samples, tokens))
        for i, row in enumerate(mine):
            self._put(batch, i, row)
        return epoch, bucket, batch

    def _put(self, batch, i, row):
        """Fills row i of the batch; utterances that fail are left out of it."""
        at, texts = 0, []
        for u, speed, gap in zip(row.utterances, row.speeds, row.gaps, strict=True):
            pcm = self.pcm(u, speed)
            if pcm is None:
                continue
            if texts:
                at += gap
            else:
                batch["index"][i] = u
            np.multiply(pcm, np.float32(2**-15), out=batch["audio"][i, at : at + len(pcm)])
            at += len(pcm)
            texts.append(self.index.texts[u])
        tokens = self._tokens(texts, batch["tokens"].shape[1])
        batch["audio_len"][i], batch["token_len"][i] = at, len(tokens)
        batch["tokens"][i, : len(tokens)] = tokens

    def _tokens(self, texts, space):
        """Token ids of joined texts, at most `space`."""
        pieces = [index_lib.encode_text(t, self.encode, 0, self.plan.evaluation)[0] for t in texts]
        if len(pieces) > 1:
            joined = self.encode(" ".join(texts))
            # an encoder may cut joined texts differently and need more than the plan counted
            return joined if len(joined) <= space else sum(pieces, [])
        return pieces[0] if pieces else []

    def pcm(self, row, speed=1.0):
        """Samples i16[S] of an utterance at a speed, or None where it cannot be decoded.

        All audio passes through 16 bits (exact for 16-bit sources at the loader's rate), so that
        cached and fresh audio are the same.
        """
        if self._cache is not None and (pcm := self._cache.get((row, speed))) is not None:
            return pcm
        if row in self.failed:
            return None
        plain = self._cache.get((row, 1.0)) if self._cache is not None else None
        if plain is None:
            try:
                plain = quantise(self._decode(row))
            except audio.AudioError as e:
                self._fail(row, recording.reason_of(e))
                return None
            self._keep(row, 1.0, plain)
        if speed == 1.0:
            return plain
        pcm = quantise(audio.speed(plain * np.float32(2**-15), speed))
        self._keep(row, speed, pcm)
        return pcm

    def _decode(self, row):
        samples = recording.read(self.index, row, self.cfg.sample_rate)
        rate, declared = self.cfg.sample_rate, float(self.index.duration[row])
        if abs(len(samples) / rate - declared) > self.index.tolerance(self.cfg):
            raise audio.AudioError(
                self.index.path(row),
                f"duration mismatch: {declared:.2f} s declared, {len(samples) / rate:.2f} decoded",
            )
        with self._lock:
            self._tried[row] = True
        return samples

    def _keep(self, row, speed, pcm):
        if self._cache is not None:
            self._cache[row, speed] = pcm

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


def empty(bucket):
    """A batch of padding rows of a bucket (B, S, L)."""
    rows, samples, tokens = bucket
    return {
        "audio": np.zeros((rows, samples), np.float32),
        "audio_len": np.zeros(rows, np.int32),
        "tokens": np.zeros((rows, tokens), np.int32),
        "token_len": np.zeros(rows, np.int32),
        "index": np.full(rows, -1, np.int64),
    }


def quantise(x):
    """i16[S] of samples in [-1, 1], rounded; louder ones clip."""
    return np.clip(np.rint(x * np.float32(32768)), -32768, 32767).astype(np.int16)


class _Stream:
    """The numbers start, start + 1, ... through a function, as a random-access source."""

    def __init__(self, function, length):
        self.function, self.length = function, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.function(int(i))


def stream(function, start, stop, num_threads, prefetch):
    """Yields function(i) for i in range(start, stop), computed ahead in threads, in order."""
    if num_threads < 1:
        yield from map(function, range(start, stop))
        return
    try:
        import grain
    except ImportError:  # bare accelerator hosts
        yield from _stream_in_pool(function, start, stop, num_threads, prefetch)
        return
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, 1))
    items = grain.MapDataset.source(_Stream(function, stop))[start:].to_iter_dataset(options)
    iterator = iter(items)
    try:
        yield from iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _stream_in_pool(function, start, stop, num_threads, prefetch):
    from collections import deque
    from concurrent.futures import ThreadPoolExecutor

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
class Train:
    """Endless training batches. `shapes` lists (B, S, L), B global; `fingerprint` names the plan:
    a checkpoint's position means the same batch only under the same fingerprint."""

    loader: Loader

    @property
    def shapes(self):
        return self.loader.plan.shapes

    @property
    def fingerprint(self):
        return self.loader.plan.fingerprint

    def iterate(self, start=0, process_index=0, process_count=1):
        """Yields (epoch, bucket number, batch) of global batches start, start + 1, ... without end.

        The batch holds rows process_index * B / process_count on, B / process_count of them.
        """

        def load(position):
            return self.loader.load(position, process_index, process_count)

        cfg = self.loader.cfg
        return stream(load, start, NEVER, cfg.num_threads, cfg.prefetch)

    def epoch_of(self, position):
        """The epoch that a global batch number lies in."""
        return self.loader.plan.locate(position)[0]

    def batches_in(self, epochs):
        """The number of batches in the first `epochs` passes over the data, a float."""
        whole, part = divmod(epochs, 1)
        plan = self.loader.plan
        counts = [len(plan.epoch(n).bucket) for n in range(int(whole) + (part > 0))]
        return sum(counts[: int(whole)]) + (math.ceil(part * counts[-1]) if part else 0)

    def describe(self):
        """What is trained on, what was left out, and the buckets: a few lines."""
        return f"{self.loader.index.describe()}\n{self.loader.plan.describe()}"

    @property
    def longest_seconds(self):
        """Seconds of the longest bucket's rows."""
        return max(bucket[1] for bucket in self.shapes) / self.loader.cfg.sample_rate

    @property
    def failed(self):
        """{index number: reason} of utterances that could not be decoded so far."""
        return dict(self.loader.failed)


class Eval:
    """Every usable utterance of a set once. texts, ids and durations by index number."""

    def __init__(self, loader):
        self.loader, i = loader, loader.index
        self.texts = [i.texts[n] for n in range(len(i))]
        self.ids = [i.id(n) for n in range(len(i))]
        self.durations = i.duration

    @property
    def shapes(self):
        return self.loader.plan.shapes

    @property
    def bad(self):
        """The entries left out, as Bad records."""
        return self.loader.index.bad

    @property
    def failed(self):
        """{index number: reason} of utterances that could not be decoded so far."""
        return dict(self.loader.failed)

    def item(self, number):
        """The seam.Item of an utterance, with its text as the only field."""
        return Item(self.ids[number], (), {"text": self.texts[number]})

    def entry(self, number):
        """The whole entry of an utterance (dict), with the fields that jasr does not use."""
        return self.loader.index.entry(number)

    def iterate(self, process_index=0, process_count=1):
        """Yields (bucket number, batch), longest utterances first; this process's rows of each."""

        def load(position):
            return self.loader.load(position, process_index, process_count)[1:]

        cfg = self.loader.cfg
        count = len(self.loader.plan.epoch(0).bucket)
        return stream(load, 0, count, cfg.num_threads, cfg.prefetch)

    def describe(self):
        """What is evaluated on, what was left out, and the buckets: a few lines."""
        return f"{self.loader.index.describe()}\n{self.loader.plan.describe()}"


def _quarantine(path, process_index, bad):
    """This process's quarantine file; process 0's also lists what the index leaves out."""
    if path and process_index:
        root, ending = os.path.splitext(path)
        return f"{root}.{process_index}{ending}"
    if path:
        entries.write_quarantine(path, bad, entries.loading_lines(path))
    return path


def open_train(
    cfg,
    encode,
    seed,
    quarantine_path="",
    frames_needed=None,
    seconds_per_frame=0.0,
    process_index=0,
):
    """The Train of `cfg.train`: an endless stream of batches that depends on cfg and seed alone.

    encode: text -> list of token ids; may raise text.TextError (the entry is quarantined).
    frames_needed: tokens -> frames that the loss needs at least (CTC: tokens + repeats), with
    `seconds_per_frame` of the model's output; leaves out texts too long for their audio.
    Raises DataError: no usable data, too many bad entries, or settings that cannot be met.
    """
    index = index_lib.build(cfg.train, encode, cfg, frames_needed, seconds_per_frame)
    path = _quarantine(quarantine_path, process_index, index.bad)
    return Train(Loader(index, Plan(index, cfg, seed), encode, cfg, path))


def open_eval(cfg, source, encode, quarantine_path="", process_index=0):
    """The Eval of one source (or several): no shuffling, no speeds, no joining, no length limits.

    A text that cannot be encoded stays: its row carries the tokens of the words that can be, and
    `texts` the whole of it, so that a word error rate counts it.
    """
    index = index_lib.build(source, encode, cfg, evaluation=True)
    path = _quarantine(quarantine_path, process_index, index.bad)
    return Eval(Loader(index, Plan(index, cfg, 0, evaluation=True), encode, cfg, path))
