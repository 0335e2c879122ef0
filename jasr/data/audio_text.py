"""The layout of recognition: one recording and its text a row, or several joined by silence."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from jasr import audio
from jasr.data import entries, recording
from jasr.data.config import DataConfig, DataError, ItemError, LengthError
from jasr.text import TextError

EXACT = 0.02  # seconds by which decoded audio may differ from its header
SPEED_SLACK = 32  # samples by which a stretched utterance may be longer than computed


@dataclasses.dataclass(frozen=True)
class AudioText:
    """The seam.Layout of audio f32[B,S] and its tokens i32[B,L].

    config: the DataConfig whose limits, speeds and gaps hold.
    sample_rate: Hz of what the model hears.
    encode: text -> list of token ids; may raise text.TextError.
    frames_needed: tokens -> frames that the loss needs at least (CTC: tokens + repeats), of
      `seconds_per_frame` each; leaves out texts too long for their audio at the fastest speed.
    """

    config: DataConfig
    sample_rate: int
    encode: Callable
    frames_needed: Callable | None = None
    seconds_per_frame: float = 0.0
    tolerance: float | None = None  # s by which audio may differ from its pieces' seconds
    cache: dict | None = None  # {(pieces, speed): i16[S]}

    axes = ("samples", "tokens")

    def __post_init__(self):
        if self.frames_needed and not self.seconds_per_frame > 0:
            raise DataError("frames_needed needs seconds_per_frame above 0")
        if self.tolerance is None:
            object.__setattr__(self, "tolerance", self.config.duration_tolerance)

    @property
    def draws(self):
        """Whether there are several speeds."""
        return len(set(self.config.speeds)) > 1

    def items(self, values):
        """The one Item of a line of a manifest or cut."""
        return (entries.spoken(values),)

    def sizes(self, item, scored):
        """(seconds, tokens) of an item; see seam.Layout.sizes."""
        tokens = encode_text(item.fields["text"], self.encode, self.config.min_tokens, scored)
        seconds, count = sum([p.seconds for p in item.pieces]), len(tokens)
        if scored:
            return seconds, count
        cfg, frames = self.config, self.frames_needed(tokens) if self.frames_needed else 0
        if seconds < frames * self.seconds_per_frame * self.fastest:
            reason = f"text too long for its audio: {count} in {seconds:.2f} s"
            raise LengthError(reason, filtered=False)
        if seconds < cfg.min_duration:
            raise LengthError(f"too short: {seconds:.2f} s")
        if self.longest < seconds:
            raise LengthError(f"too long: {seconds:.2f} s")
        if count < cfg.min_tokens:
            raise LengthError(f"too few tokens: {count}")
        if 0 < cfg.max_tokens < count:
            raise LengthError(f"too many tokens: {count}")
        return seconds, count

    @functools.cached_property
    def fastest(self):
        """The factor of the highest speed, at least 1."""
        return max(1.0, *self.config.speeds)

    @functools.cached_property
    def longest(self):
        """Seconds of the longest utterance allowed: max_duration, or the last explicit bucket."""
        limits = [self.config.max_duration if self.config.max_duration > 0 else np.inf]
        for last in self.config.bucket_duration_bins[-1:]:
            limits.append(float(last[0] if isinstance(last, (tuple, list)) else last))
        return min(limits)

    def for_set(self, seconds, exact):
        """The layout for a set; see seam.Layout.for_set.

        Raises:
          DataError: the recordings would be read at another rate than the model hears.
        """
        cfg = self.config
        if cfg.sample_rate != self.sample_rate:
            raise DataError(
                f"config.data.sample_rate {cfg.sample_rate} differs from "
                f"config.front_end.sample_rate {self.sample_rate}"
            )
        copies = sum(1 / s for s in {1.0, *map(float, cfg.speeds)})
        fits = 2 * seconds * copies * self.sample_rate <= cfg.cache_mb * 2**20
        return dataclasses.replace(
            self,
            tolerance=min(EXACT, cfg.duration_tolerance) if exact else cfg.duration_tolerance,
            cache={} if cfg.cache_audio and fits else None,
        )

    # ---- what is drawn ----

    def speeds(self, words):
        """f64[M]: the speeds that words u64[M,2] draw; 1 where nothing is drawn."""
        speeds = np.asarray(self.config.speeds, float)
        return np.where(words[:, 0] > 0, speeds[words[:, 0] % np.uint64(len(speeds))], 1.0)

    def gaps(self, words):
        """i64[M]: samples of silence before an utterance behind another, as words draw them."""
        low, high = (x * self.sample_rate for x in self.config.concat_gap)
        part = (words[:, 1] >> np.uint64(11)) * 2.0**-53
        return np.round(low + (high - low) * part).astype(np.int64)

    def drawn(self, sizes, words):
        """(i64[M,2] samples and tokens, i64[M,2] silence and a space); see seam.Layout.drawn."""
        if words is None:
            speed, gap = np.full(len(sizes), float(min(self.config.speeds))), 0
        else:
            speed, gap = self.speeds(words), self.gaps(words)
        exact = np.ceil((sizes[:, 0] + self.tolerance) / speed * self.sample_rate)
        found, adds = np.empty((2, len(sizes), 2), np.int64)
        found[:, 0] = exact.astype(np.int64) + np.where(speed == 1.0, 1, SPEED_SLACK)
        found[:, 1], adds[:, 0], adds[:, 1] = sizes[:, 1], gap, 1
        return found, adds

    def cost(self, sizes):
        """f64[...]: samples."""
        return np.asarray(sizes)[..., 0].astype(float)

    def label(self, bucket):
        """Rows, seconds and tokens of a bucket."""
        rows, samples, tokens = bucket
        return f"{rows} × {samples / self.sample_rate:.2f} s, {tokens} tokens"

    # ---- batches ----

    def empty(self, bucket):
        """A batch of padding rows of a bucket (B, S, L)."""
        rows, samples, tokens = bucket
        return {
            "audio": np.zeros((rows, samples), np.float32),
            "audio_len": np.zeros(rows, np.int32),
            "tokens": np.zeros((rows, tokens), np.int32),
            "token_len": np.zeros(rows, np.int32),
            "index": np.full(rows, -1, np.int64),
        }

    def fill(self, batch, row, items, words):
        """Writes utterances into an empty row; see seam.Layout.fill. An item's pieces follow each
        other at once. Items without a "text" give no tokens."""
        space, at = batch["audio"][row], 0
        gaps = self.gaps(words).tolist()
        for n, (item, speed) in enumerate(zip(items, self.speeds(words).tolist(), strict=True)):
            at += gaps[n] if n else 0
            try:
                pcm = self.pcm(item.pieces, speed)
            except audio.AudioError as e:
                raise ItemError(n, recording.reason_of(e)) from e
            if at + len(pcm) > len(space):
                raise ItemError(n, f"too long for its row: {at + len(pcm)} of {len(space)} samples")
            np.multiply(pcm, np.float32(2**-15), out=space[at : at + len(pcm)])
            at += len(pcm)
        tokens = self.tokens([i.fields.get("text", "") for i in items], batch["tokens"].shape[1])
        batch["audio_len"][row], batch["token_len"][row] = at, len(tokens)
        batch["tokens"][row, : len(tokens)] = tokens

    def tokens(self, texts, space):
        """Token ids of joined texts, at most `space`."""
        pieces = [encode_text(t, self.encode, 0, True) for t in texts]
        if len(pieces) > 1:
            joined = self.encode(" ".join(texts))
            # an encoder may cut joined texts differently and need more than the plan counted
            return joined if len(joined) <= space else sum(pieces, [])
        return pieces[0] if pieces else []

    def pcm(self, pieces, speed=1.0):
        """Samples i16[S] of pieces at a speed. Raises audio.AudioError.

        All audio passes through 16 bits (exact for 16-bit sources at the layout's rate), so that
        cached and fresh audio are the same.
        """
        # only pieces that name files can be told apart
        named = self.cache is not None and all(isinstance(p.source, str) for p in pieces)
        if named and (pieces, speed) in self.cache:
            return self.cache[pieces, speed]
        if speed != 1.0:
            pcm = quantise(audio.speed(self.pcm(pieces) * np.float32(2**-15), speed))
        else:
            read = [recording.read_checked(p, self.sample_rate, self.tolerance) for p in pieces]
            pcm = quantise(read[0] if len(read) == 1 else np.concatenate(read))
        if named:
            self.cache[pieces, speed] = pcm
        return pcm


def encode_text(text, encode, min_tokens, scored):
    """The tokens of a text; where it is `scored`, only those of the words that can be encoded.

    Raises DataError with the reason why it cannot be used.
    """
    if not text.strip():
        if min_tokens:
            raise DataError("empty text")
        return []
    try:
        return encode(text)
    except TextError as e:
        if not scored:
            raise DataError(f"text cannot be encoded: {e}") from e
    known = []
    for word in text.split():
        with contextlib.suppress(TextError):
            encode(word)
            known.append(word)
    return encode(" ".join(known)) if known else []


def quantise(x):
    """i16[S] of samples in [-1, 1], rounded; louder ones clip."""
    return np.clip(np.rint(x * np.float32(32768)), -32768, 32767).astype(np.int16)
