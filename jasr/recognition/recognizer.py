"""Recordings to text with times: files or arrays of any length, in bounded memory.

    model = jasr.from_pretrained("runs/an4")
    model.transcribe(["a.wav", "b.flac"])

Recordings are cut into windows (decoding/longform.py), windows padded to a few fixed lengths and
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
from jasr.recognition.coverage import LEVEL_SECONDS, coverage, doubts, not_decoded
from jasr.recognition.formats import segments

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".sph", ".aiff", ".aif", ".au", ".w64")
SHORTEST_BUCKET = 2.0  # s: programs are compiled for windows of so much, twice as much ...
BUCKET_ROWS = (1, 4, 16, 64)
WAITING_JOBS = 64  # results held back for an earlier recording before its batch runs part-full
LOCAL_SECONDS = 600.0  # the window of local attention
OVERLAP, LONG_OVERLAP = 4.0, 16.0  # s, of windows of seconds and of minutes
COLUMNS = ("tokens", "start_frame", "end_frame", "durations")  # of a window's tokens


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
    from jasr.systems import loading

    compilation_cache.enable()
    task, variables, meta = loading.load(path, step, item, model, options, like)
    settings = dict(window=window, overlap=overlap, batch_seconds=batch_seconds)
    return Recognizer(task, variables, meta=meta, timestamps=timestamps, **settings)


def transcribe(path, inputs, **settings):
    """The transcripts of files by the model at `path`: `from_pretrained` and its `transcribe`."""
    return from_pretrained(path, **settings).transcribe(inputs)


def trained_seconds(meta):
    """The window for a checkpoint: the longest row it was trained on, within 8 to 30 s.

    What a NeMo archive's config says of its training data goes up to 60 s.
    """
    data = meta.get("config", {}).get("data", {})
    bins = data.get("bucket_duration_bins", ())
    edges = [b[0] if isinstance(b, (list, tuple)) else b for b in bins]
    longest = meta.get("longest_seconds") or max(edges, default=data.get("max_duration", 0.0))
    if longest:
        return min(30.0, max(8.0, longest))
    nemo = nemo_section(meta, "train_ds").get("max_duration")
    return min(60.0, max(8.0, nemo)) if isinstance(nemo, (int, float)) else 20.0


def nemo_section(meta, name):
    """A section of the NeMo config that a model came with; {} without one."""
    config = meta.get("nemo", {}).get("config", {})
    found = config.get(name) or (config.get("model") or {}).get(name)
    return found if isinstance(found, dict) else {}


class Recognizer:
    """A task with its weights on the device, transcribing in fixed shapes.

    Args:
      task: with predict, tokenizer, front_end.sample_rate and seconds_per_frame; NeMo's with text,
        marks and timestamps.
      variables: {"params", "batch_stats"}.
      meta: the checkpoint's, for the length that it was trained on.
      window: seconds that the model sees at once; 0 = what it was trained on, with local
        attention LOCAL_SECONDS. Longer recordings are cut into windows that overlap.
      overlap: seconds shared by neighbouring windows, at most a quarter of them; 0 = OVERLAP, or
        LONG_OVERLAP of windows above a minute.
      batch_seconds: padded audio in one batch at most: sets the memory that is needed.
      timestamps: "nemo" adds NeMo's own to results.

    Raises:
      ValueError: NeMo's timestamps of a model that is not NeMo's.
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
        if timestamps not in ("", "nemo") or (timestamps and not hasattr(task, "timestamps")):
            raise ValueError(f"timestamps {timestamps!r}: only 'nemo', of NeMo's models")
        self.task, self.meta, self.timestamps = task, meta or {}, timestamps
        self.variables = jax.device_put(variables)
        if hasattr(task, "tables"):
            self.variables = {**self.variables, "tables": jax.jit(task.tables)(self.variables)}
        self.sample_rate = task.front_end.sample_rate
        frame = round(task.seconds_per_frame * self.sample_rate)
        encoder = getattr(getattr(task, "config", None), "encoder", None)
        usual = LOCAL_SECONDS if getattr(encoder, "is_local", False) else trained_seconds(self.meta)
        seconds = window or usual
        overlap = overlap or (OVERLAP if seconds <= 60 else LONG_OVERLAP)
        self.windows = longform.Windows.of(seconds, overlap, self.sample_rate, frame)
        self.batch_seconds = batch_seconds
        self.programs = {}  # (rows, samples) -> compiled predict
        self.compile_seconds = self.run_seconds = self.audio_seconds = 0.0
        self._predict = jax.jit(task.predict)

    def transcribe(self, inputs, sample_rate=0):
        """Transcripts of recordings, in their order; a single one for a single recording.

        Args:
          inputs: path, binary file object, array f32[S] (or int16), or a list of them.
          sample_rate: of the arrays; 0 = the model's.

        Returns:
          [{"audio_filepath", "duration" in s, "text", "words": [{"word", "start", "end"} in s],
          "segments": [{"segment", "start", "end"}], "coverage": see `coverage`, "warnings":
          [str]}], with "updates" if the model has fast weights and "timestamp" if NeMo's were
          asked for; a recording that could not be used has "error" too and is also announced by a
          Python warning.
        """
        if getattr(inputs, "ndim", 1) != 1:
            raise ValueError(
                f"an array of shape {inputs.shape}: give one channel, f32[S], or a list of such "
                "arrays; `samples.mean(axis=...)` mixes channels"
            )
        single = is_file(inputs) or getattr(inputs, "ndim", 0) == 1
        results = list(self.stream([inputs] if single else inputs, sample_rate))
        for result in results:
            if "error" in result:
                warnings.warn(f"not transcribed: {result['error']}", stacklevel=2)
        return results[0] if single else results

    def stream(self, inputs, sample_rate=0):
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
                if len(waiting[bucket]) == self._most_rows(bucket):
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

    def _most_rows(self, bucket):
        affordable = self.batch_seconds * self.sample_rate / bucket
        return max(r for r in BUCKET_ROWS if r <= max(1, affordable))

    def program(self, rows, samples):
        """The compiled `predict` of a batch shape; compiled at its first use only."""
        shape = rows, samples
        if shape not in self.programs:
            start = time.perf_counter()
            batch = {
                "audio": jax.ShapeDtypeStruct(shape, np.float32),
                "audio_len": jax.ShapeDtypeStruct((rows,), np.int32),
            }
            self.programs[shape] = self._predict.lower(self.variables, batch).compile()
            self.compile_seconds += time.perf_counter() - start
        return self.programs[shape]

    def _run(self, bucket, items):
        """Decodes waiting windows [(job, first sample, samples)] and gives each job its tokens."""
        rows = min(r for r in BUCKET_ROWS if r >= len(items))
        program = self.program(rows, bucket)
        start = time.perf_counter()
        batch = {
            "audio": np.zeros((rows, bucket), np.float32),
            "audio_len": np.zeros(rows, np.int32),
        }
        for row, (_, _, samples) in enumerate(items):
            batch["audio"][row, : len(samples)] = samples
            batch["audio_len"][row] = len(samples)
        out = jax.device_get(program(self.variables, batch))
        for row, (job, first, samples) in enumerate(items):
            length, frames = int(out["token_len"][row]), int(out["logit_len"][row])
            columns = [out[k][row, :length] for k in COLUMNS if k in out]
            if length and "full" in out and out["full"][row]:  # it stopped at its last token
                frames = int(columns[2][-1])
            decoded = first + min(len(samples), frames * self.windows.frame)
            job.take(first, columns, int(out["updates"][row]) if "updates" in out else None)
            job.spans.append((first / self.sample_rate, decoded / self.sample_rate))
        self.run_seconds += time.perf_counter() - start

    def _result(self, job):
        """The transcript of a job whose windows are all done."""
        result = {"audio_filepath": job.name, "duration": round(job.seconds, 4)}
        self.audio_seconds += job.seconds
        if job.error:
            nothing = {"windows": 0, "seconds": 0.0, "uncovered": []}
            empty = {"duration": 0.0, "text": "", "words": [], "segments": [], "coverage": nothing}
            return {**result, **empty, "warnings": [job.error], "error": job.error}
        tokenizer = self.task.tokenizer
        columns = longform.join(sorted(job.pieces, key=lambda p: p[0]), self.windows, tokenizer)
        marks = getattr(self.task, "marks", frozenset())
        found = words(tokenizer, *columns[:3], self.task.seconds_per_frame, marks)
        for word in found:  # the last frame may reach beyond the last sample; TDT may give it none
            word["start"] = min(word["start"], result["duration"])
            if word["end"] <= word["start"]:
                word["end"] = round(word["start"] + self.task.seconds_per_frame, 4)
            word["end"] = min(word["end"], result["duration"])
        result["text"] = getattr(self.task, "text", tokenizer.decode)(columns[0])
        result["words"], result["segments"] = found, segments(found)
        if self.timestamps:
            result["timestamp"] = self.task.timestamps(*columns, **nemo_times_options(self.meta))
        result["coverage"] = coverage(job.spans, job.seconds)
        result["warnings"] = [
            *job.notes,
            *not_decoded(result["coverage"]["uncovered"]),
            *doubts(found, np.concatenate(job.levels), job.seconds),
        ]
        return result if job.updates is None else {**result, "updates": job.updates}


def nemo_times_options(meta):
    """What the NeMo config of a model says of its timestamps, for `nemo_times.timestamps`."""
    given = nemo_section(meta, "decoding")
    separators = given.get("segment_seperators")  # NeMo's spelling
    options = {"separators": tuple(separators)} if isinstance(separators, list) else {}
    return options | {"segment_gap": given.get("segment_gap_threshold")}


@dataclasses.dataclass
class Job:
    """One recording on its way: read in blocks, decoded in windows."""

    recording: Any  # path, file object or array
    name: str
    error: str = ""
    seconds: float = 0.0
    updates: int | None = None  # of fast weights, if the model has any
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

    def take(self, first, columns, updates):
        """Receives the tokens of one window."""
        self.pieces.append((first, *columns))
        if updates is not None:
            self.updates = (self.updates or 0) + updates
        self.waiting -= 1

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
        below = sorted(
            pathlib.Path(folder, file)
            for folder, _, files in os.walk(given)
            for file in files
            if file.lower().endswith(SUFFIXES)
        )
        if not below:
            problems.append(f"{given}: no recordings in it ({' '.join(SUFFIXES)})")
        found += [(p, str(p.relative_to(given).with_suffix(""))) for p in below]
    seen = collections.Counter(name for _, name in found)
    return [
        (path, name if seen[name] == 1 else str(path).lstrip("/").replace("..", "_"))
        for path, name in found
    ], problems
