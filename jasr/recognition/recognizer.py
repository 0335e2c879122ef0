"""Recordings to text with times: files or arrays of any length, in bounded memory.

    model = jasr.from_pretrained("runs/an4")
    model.transcribe(["a.wav", "b.flac"])

Recordings are cut into windows (`longform`), windows padded to a few fixed lengths and
batched, so that the second file of a length compiles nothing; results come in the order of the
inputs. A recording that cannot be used gives a result with `error` and does not stop the others.
"""

import collections
import dataclasses
import os
import pathlib
import time
import warnings
from typing import Any

import jax
import numpy as np

from jasr import audio
from jasr.audio import resample
from jasr.decoding.ctc import words
from jasr.recognition import longform
from jasr.recognition.coverage import LEVEL_SECONDS, coverage, doubts
from jasr.recognition.formats import segments
from jasr.systems import loading

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".sph", ".aiff", ".aif", ".au", ".w64")
SHORTEST_BUCKET = 2.0  # s: programs are compiled for windows of so much, twice as much ...
BUCKET_ROWS = (1, 4, 16, 64)
WAITING_JOBS = 64  # results held back for an earlier recording before its batch runs part-full
OVERLAP, LONG_OVERLAP = 4.0, 16.0  # s, of windows of seconds and of minutes
COLUMNS = ("tokens", "start_frame", "end_frame")  # of a window's tokens


def from_pretrained(
    path,
    *,
    step=None,
    item="",
    model=None,
    like="",
    window=0.0,
    overlap=0.0,
    batch_seconds=64.0,
    timestamps="",
    **options,
):
    """The Recognizer of a run, checkpoint step, average, or model of an original system.

    Args:
      path, step, item, model, like: see `jasr.systems.loading.load`.
      window, overlap, batch_seconds, timestamps: of `Recognizer`.
      options: those that the model's system has for transcribing, e.g. beam=4: what
        `python -m experiments.transcribe --help` lists.
    """
    from jasr import compilation_cache

    compilation_cache.enable()
    task, variables, meta = loading.load(path, step, item, model, options, like)
    settings = dict(window=window, overlap=overlap, batch_seconds=batch_seconds)
    return Recognizer(task, variables, meta=meta, timestamps=timestamps, **settings)


def transcribe(path, inputs, **settings):
    """The transcripts of files by the model at `path`: `from_pretrained` and its `transcribe`."""
    return from_pretrained(path, **settings).transcribe(inputs)


def trained_seconds(meta):
    """Seconds of the longest row that a checkpoint was trained on; 0 where it does not say."""
    data = meta.get("config", {}).get("data", {})
    bins = data.get("bucket_duration_bins", ())
    edges = [b[0] if isinstance(b, (list, tuple)) else b for b in bins]
    heard = meta.get("longest", {}).get("samples", 0) / data.get("sample_rate", 16000)
    # "longest_seconds": in steps of earlier revisions
    said = heard or meta.get("longest_seconds")
    return said or max(edges, default=data.get("max_duration", 0.0))


class Recognizer:
    """A task with its weights on the device, transcribing in fixed shapes.

    Args:
      task: a seam.Task that transcribes.
      variables: {"params", "batch_stats"}.
      meta: the checkpoint's, for the length that it was trained on.
      window: seconds that the model sees at once; 0 = what suits it, mostly the length that it was
        trained on. Longer recordings are cut into windows that overlap.
      overlap: seconds shared by neighbouring windows, at most a quarter of them; 0 = OVERLAP, or
        LONG_OVERLAP of windows above a minute.
      batch_seconds: padded audio in one batch at most: sets the memory that is needed.
      timestamps: a kind of timestamps that the model has beside jasr's, added to results.

    Raises:
      ValueError: the model does not transcribe, or has no timestamps of that kind.
    """

    def __init__(
        self,
        task,
        variables,
        *,
        meta=None,
        window=0.0,
        overlap=0.0,
        batch_seconds=64.0,
        timestamps="",
    ):
        self.decoder = decoder = loading.verb(task, "transcribe")
        if timestamps and timestamps not in decoder.extras:
            known = ", ".join(map(repr, decoder.extras)) or "none"
            raise ValueError(f"timestamps {timestamps!r}: this model has {known}")
        self.task, self.meta, self.timestamps = task, meta or {}, timestamps
        self.variables = decoder.prepare(jax.device_put(variables))
        self.sample_rate = decoder.sample_rate
        seconds = window or decoder.window(self.meta, trained_seconds(self.meta))
        overlap = overlap or (OVERLAP if seconds <= 60 else LONG_OVERLAP)
        self.windows = longform.Windows.of(seconds, overlap, self.sample_rate, decoder.frame)
        self.batch_seconds = batch_seconds
        self.programs = {}  # (rows, samples) -> compiled decode
        self.compile_seconds = self.audio_seconds = 0.0
        self._decode = jax.jit(decoder.decode)

    def transcribe(self, inputs, sample_rate=0):
        """Transcripts of recordings, in their order; a single one for a single recording.

        Args:
          inputs: path, binary file object, array f32[S] (or int16), or a list of them.
          sample_rate: of the arrays; 0 = the model's.

        Returns:
          [{"audio_filepath", "duration" in s, "text", "words": [{"word", "start", "end"} in s],
          "segments": [{"segment", "start", "end"}], "coverage": see `coverage`, "warnings":
          [str]}]; of a model that tells no times no words, and one segment a window. The model's
          own totals ("updates" of fast weights) stand beside them, and "timestamp" if another kind
          of timestamps was asked for. A recording that could not be used has "error" too and is
          also announced by a Python warning.
        """
        if getattr(inputs, "ndim", 1) != 1:
            raise ValueError(
                f"an array of shape {inputs.shape}: give one channel, f32[S], or a list of such "
                "arrays; `samples.mean(axis=...)` mixes channels"
            )
        single = is_file(inputs) or hasattr(inputs, "ndim")
        results = list(self.each([inputs] if single else inputs, sample_rate))
        for result in results:
            if "error" in result:
                warnings.warn(f"not transcribed: {result['error']}", stacklevel=2)
        return results[0] if single else results

    def each(self, inputs, sample_rate=0):
        """Yields the transcripts of an iterable of recordings, in order, as they get done.

        Memory holds the waiting batches (one a window length) and the texts not yet asked for.
        """
        waiting = collections.defaultdict(list)
        jobs = collections.deque()
        for number, recording in enumerate(inputs):
            job = Job(recording, f"array {number}")
            jobs.append(job)
            for first, samples in job.read(self.windows, self.sample_rate, sample_rate):
                bucket = self._bucket(len(samples))
                waiting[bucket].append((job, first, samples))
                affordable = max(1, self.batch_seconds * self.sample_rate / bucket)
                if len(waiting[bucket]) == max(r for r in BUCKET_ROWS if r <= affordable):
                    self._run(bucket, waiting.pop(bucket))
            if len(jobs) > WAITING_JOBS:
                for bucket in list(waiting):
                    if any(job is jobs[0] for job, _, _ in waiting[bucket]):
                        self._run(bucket, waiting.pop(bucket))
            while jobs and jobs[0].done:
                yield self._result(jobs.popleft())
        for bucket in sorted(waiting):
            self._run(bucket, waiting[bucket])
        for job in jobs:
            yield self._result(job)

    def _bucket(self, samples):
        """The number of samples that a window is padded to."""
        edge = round(SHORTEST_BUCKET * self.sample_rate)
        while edge < samples:
            edge *= 2
        return min(edge, self.windows.length)

    def _run(self, bucket, items):
        """Decodes waiting windows [(job, first sample, samples)] and gives each job its tokens."""
        rows = min(r for r in BUCKET_ROWS if r >= len(items))
        length = np.zeros(rows, np.int32)
        batch = {"audio": np.zeros((rows, bucket), np.float32), "audio_len": length}
        for row, (_, _, samples) in enumerate(items):
            batch["audio"][row, : len(samples)], length[row] = samples, len(samples)
        program = self.programs.get((rows, bucket))
        if program is None:  # compiled at its first use only
            start = time.perf_counter()
            program = self._decode.lower(self.variables, batch).compile()
            self.programs[rows, bucket] = program
            self.compile_seconds += time.perf_counter() - start
        out = jax.device_get(program(self.variables, batch))
        for row, (job, first, samples) in enumerate(items):
            count = int(out["token_len"][row])
            decoded = first + min(len(samples), int(out["heard"][row]) * self.windows.frame)
            job.spans.append((first / self.sample_rate, decoded / self.sample_rate))
            columns = [out[k][row, :count] for k in (*COLUMNS, *self.decoder.columns)]
            job.pieces.append((first, *columns))
            for name in self.decoder.totals:
                job.totals[name] = job.totals.get(name, 0) + int(out[name][row])
            job.waiting -= 1

    def _result(self, job):
        """The transcript of a job whose windows are all done."""
        duration, decoder = round(job.seconds, 4), self.decoder
        result = {"audio_filepath": job.name, "duration": duration}
        self.audio_seconds += job.seconds
        if job.error:
            nothing = {"windows": 0, "seconds": 0.0, "uncovered": []}
            result |= {"duration": 0.0, "text": "", "words": [], "segments": []}
            return result | {"coverage": nothing, "warnings": [job.error], "error": job.error}
        pieces = sorted(job.pieces, key=lambda p: p[0])
        if longform.timed(pieces):
            columns = longform.join(pieces, self.windows, decoder.tokenizer)
            result["words"] = self._words(columns, duration)
            result["segments"] = segments(result["words"])
        else:
            parts = longform.join_texts(pieces, self.windows, decoder.tokenizer)
            ids = [token for _, tokens in parts for token in tokens]
            columns = ids, *[[-1] * len(ids)] * (len(pieces[0]) - 2)
            result |= {"words": [], "segments": self._segments(parts, duration)}
        result["text"] = decoder.text(columns[0])
        if self.timestamps:
            result["timestamp"] = decoder.extras[self.timestamps](*columns, meta=self.meta)
        heard, covered = result["words"] or result["segments"], coverage(job.spans, job.seconds)
        said = [*job.notes]
        for start, end in covered["uncovered"]:
            said.append(f"nothing was decoded between {start:.3f} and {end:.3f} s")
        said += doubts(heard, np.concatenate(job.levels), job.seconds)
        return result | {"coverage": covered, "warnings": said} | job.totals

    def _words(self, columns, duration):
        """The words of joined columns, with times inside the recording's `duration` in s."""
        decoder, seconds_per_frame = self.decoder, self.windows.frame / self.sample_rate
        found = words(decoder.tokenizer, *columns[:3], seconds_per_frame, decoder.marks)
        for word in found:  # the last frame may reach beyond the last sample; TDT may give it none
            word["start"] = min(word["start"], duration)
            if word["end"] <= word["start"]:
                word["end"] = round(word["start"] + seconds_per_frame, 4)
            word["end"] = min(word["end"], duration)
        return found

    def _segments(self, parts, duration):
        """One segment for each window that has text, of a model without times: windows meet in the
        middle of their overlap."""
        half = self.windows.overlap // 2
        edges = [0.0, *((first + half) / self.sample_rate for first, _ in parts[1:]), duration]
        found = [
            {"segment": self.decoder.text(ids), "start": round(start, 4), "end": round(end, 4)}
            for (_, ids), start, end in zip(parts, edges, edges[1:], strict=False)
        ]
        return [segment for segment in found if segment["segment"]]


@dataclasses.dataclass
class Job:
    """One recording on its way: read in blocks, decoded in windows."""

    recording: Any  # path, file object or array
    name: str
    error: str = ""
    seconds: float = 0.0
    totals: dict = dataclasses.field(default_factory=dict)  # sums over the windows
    waiting: int = 0  # windows read but not decoded
    ended: bool = False
    notes: list = dataclasses.field(default_factory=list)
    levels: list = dataclasses.field(default_factory=lambda: [np.zeros(0, np.float32)])
    pieces: list = dataclasses.field(default_factory=list)
    spans: list = dataclasses.field(default_factory=list)  # (start, end) in s that was decoded

    def __post_init__(self):
        if isinstance(self.recording, (str, os.PathLike)):
            self.name = os.fspath(self.recording)
        elif hasattr(self.recording, "read"):
            self.name = str(getattr(self.recording, "name", type(self.recording).__name__))

    @property
    def done(self):
        return self.ended and (not self.waiting or bool(self.error))

    def read(self, windows, sample_rate, array_rate):
        """Yields (first sample, window); on bad audio ends early with `error` set."""
        try:
            for first, samples in windows.cut(self._blocks(sample_rate, array_rate)):
                self.waiting += 1
                yield first, samples
        except audio.AudioError as e:
            self.error = str(e)
        self.recording, self.ended = None, True

    def _blocks(self, sample_rate, array_rate):
        """Yields the recording's samples in blocks at the model's rate, measuring them."""
        if is_file(self.recording):
            file = self.recording.read() if hasattr(self.recording, "read") else self.recording
            _, rate, channels = audio.info(file)
            if channels > 2:
                self.notes.append(f"{channels} channels were averaged")
            blocks = audio.read_blocks(file, sample_rate, self.notes)
        else:
            rate = array_rate or sample_rate
            blocks = [samples_of(self.recording, rate, sample_rate, self.name)]
        if rate < 0.75 * sample_rate:
            self.notes.append(f"sampled at {rate} Hz: speech above {rate // 2} Hz is missing")
        count, size, rest = 0, round(LEVEL_SECONDS * sample_rate), np.zeros(0, np.float32)
        for block in blocks:
            count += len(block)
            self.seconds = count / sample_rate
            rest = np.concatenate([rest, block])
            whole = len(rest) // size * size
            self.levels.append(decibels(rest[:whole].reshape(-1, size)))
            rest = rest[whole:]
            yield block
        if len(rest):
            self.levels.append(decibels(rest[None]))


def decibels(frames):
    """f32[N] dB of full scale of the power of frames f32[N, S]; -120 at least."""
    power = np.square(frames).mean(axis=1)
    return 10 * np.log10(np.maximum(power, 1e-12)).astype(np.float32)


def is_file(recording):
    """Whether it is a path or a binary file object."""
    return isinstance(recording, (str, os.PathLike)) or hasattr(recording, "read")


def samples_of(array, rate, sample_rate, name):
    """Samples f32[S] of an array at `sample_rate`; AudioError where it cannot be used."""
    array = np.asarray(array)
    if array.ndim != 1 or not len(array):
        raise audio.AudioError(name, f"needs samples of shape [S], S > 0, got {array.shape}")
    if np.issubdtype(array.dtype, np.integer):
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    array = array.astype(np.float32)
    if not np.all(np.isfinite(array)):
        raise audio.AudioError(name, "NaN or infinite samples")
    return resample.resample(array, rate, sample_rate)


def find_recordings(inputs):
    """[(path, name)] of files and of the recordings in directories, and what was found wanting.

    A directory gives every file in it and below with one of SUFFIXES, sorted. Names are for output
    files and CTM: the file's without suffix, with its folders if it was found in a directory; the
    whole path where that is not unique.

    Returns:
      ([(path, name)], [problem]): the problems are directories without recordings.
    """
    found, problems = [], []
    for given in map(pathlib.Path, inputs):
        if not given.is_dir():
            found.append((given, given.stem))
            continue
        below = (pathlib.Path(folder, f) for folder, _, files in os.walk(given) for f in files)
        below = sorted(path for path in below if path.name.lower().endswith(SUFFIXES))
        if not below:
            problems.append(f"{given}: no recordings in it ({' '.join(SUFFIXES)})")
        found += [(p, str(p.relative_to(given).with_suffix(""))) for p in below]
    seen = collections.Counter(name for _, name in found)
    return [
        (path, name if seen[name] == 1 else str(path).lstrip("/").replace("..", "_"))
        for path, name in found
    ], problems
