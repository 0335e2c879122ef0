"""A spoken corpus made on the spot: connected digits in many synthetic voices.

Three sets, with strings that no other set has:

    train    24 voice variants x 4 accents of English
    valid    8 other variants, the same accents: unseen voices
    accents  the training variants, 3 other accents: unseen accents

A set is a pure function of its name, its size and the seed. espeak-ng speaks it (`espeak.py`); it
is resampled to 16 kHz and written as FLAC, a NeMo-style manifest and lhotse Shar.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from experiments.prepare import espeak
from experiments.prepare.manifest import finish, to_shar
from jasr.audio.resample import resample

SAMPLE_RATE = 16000

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_WORDS = (2, 7)  # in one string, both ends included
WORD_RATE = (100, 175)  # words a minute; faster strings outrun 25 CTC frames a second
PITCH = (25, 75)  # 50 is the voice's own

TRAIN_ACCENTS = ("en", "en-us", "en-us-nyc", "en-gb-x-gbcwmd")  # en: British
OTHER_ACCENTS = ("en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")
# Variants that keep the word rate: "Andrea", "anika" and the robots speak a third faster.
TRAIN_VARIANTS = (
    "f1", "f2", "f3", "f5", "m1", "m3", "m4", "m5", "m7", "m8", "Annie", "Alicia", "Andy", "Gene",
    "Jacky", "Mike", "Reed", "belinda", "david", "edward", "linda", "max", "quincy", "steph",
)  # fmt: skip
OTHER_VARIANTS = ("f4", "m2", "m6", "Alex", "Denis", "Michael", "aunty", "paul")

VOICES = {
    "train": (TRAIN_ACCENTS, TRAIN_VARIANTS),
    "valid": (TRAIN_ACCENTS, OTHER_VARIANTS),
    "accents": (OTHER_ACCENTS, TRAIN_VARIANTS),
}

_HELD_OUT = 4  # one string in four is for evaluation only
_PEAK = 0.5  # of full scale, in every file
_FLOOR = 2e-4  # standard deviation of the white noise under it: digital silence is no recording
_MARGIN = 1600  # samples of it before and after the speech, 0.1 s
_PROCESS_UTTERANCES = 48  # spoken by one process; part of the corpus' identity


def plan(name: str, count: int, seed: int) -> list[espeak.Say]:
    """The utterances of set `name` in order, every voice about equally often.

    Whether a string may occur in `train` is decided by a hash of it, so training and evaluation
    share none whatever their sizes and seeds.
    """
    accents, variants = VOICES[name]
    rng = np.random.default_rng([seed, list(VOICES).index(name)])
    voices = [f"{accent}+{variant}" for accent in accents for variant in variants]
    order = np.concatenate([rng.permutation(len(voices)) for _ in range(-(-count // len(voices)))])
    says = []
    for i in range(count):
        text = _string(rng)
        while _held_out(text) != (name != "train"):
            text = _string(rng)
        rate = int(rng.integers(WORD_RATE[0], WORD_RATE[1] + 1))
        pitch = int(rng.integers(PITCH[0], PITCH[1] + 1))
        says.append(espeak.Say(text, voices[order[i]], rate, pitch))
    return says


def _string(rng: np.random.Generator) -> str:
    """A string of digits: its length uniform, then each word."""
    count = rng.integers(NUM_WORDS[0], NUM_WORDS[1] + 1)
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))


def _held_out(text: str) -> bool:
    """Whether `text` belongs to the sets for evaluation."""
    return hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT == 0


def waveform(pcm: bytes, rng: np.random.Generator) -> np.ndarray:
    """espeak-ng's int16 at 22,050 Hz as f32[S] at 16 kHz: peak 0.5, faint noise, margins."""
    speech = np.frombuffer(pcm, np.int16).astype(np.float32)
    speech = resample(speech, espeak.SAMPLE_RATE, SAMPLE_RATE)
    audio = rng.normal(0, _FLOOR, len(speech) + 2 * _MARGIN).astype(np.float32)
    audio[_MARGIN : _MARGIN + len(speech)] += speech * (_PEAK / max(np.abs(speech).max(), 1.0))
    return audio


def write_corpus(
    out_dir: str | Path,
    *,
    num_train: int = 960,
    num_valid: int = 192,
    num_accents: int = 192,
    seed: int = 0,
    shar: bool = True,
) -> dict[str, Path]:
    """The manifest of each set, {"train": out_dir/train.jsonl, "valid": ..., "accents": ...}.

    Writes out_dir/{set}/{set}-00000.flac ..., then the manifest, and with `shar` the same
    utterances as lhotse Shar in out_dir/shar/{set}/. A manifest appears when its set is complete.
    A set of size 0 is left out. Equal arguments give equal files (with the same versions of
    espeak-ng and libsndfile). Raises EspeakError where the extra `[tts]` is missing.
    """
    out_dir = Path(out_dir)
    sizes = {"train": num_train, "valid": num_valid, "accents": num_accents}
    return {
        name: _write_set(out_dir, name, plan(name, count, seed), seed, shar)
        for name, count in sizes.items()
        if count > 0
    }


def _write_set(out_dir: Path, name: str, says: list[espeak.Say], seed: int, shar: bool) -> Path:
    """The manifest of one set, its audio written first."""
    import soundfile

    (out_dir / name).mkdir(parents=True, exist_ok=True)

    def write_block(start: int) -> list[dict]:
        block, entries = says[start : start + _PROCESS_UTTERANCES], []
        for number, (say, pcm) in enumerate(zip(block, espeak.speak(block), strict=True), start):
            audio = waveform(pcm, np.random.default_rng([seed, list(VOICES).index(name), number]))
            path = f"{name}/{name}-{number:05d}.flac"
            soundfile.write(out_dir / path, audio, SAMPLE_RATE, subtype="PCM_16")
            entry = {"audio_filepath": path, "duration": len(audio) / SAMPLE_RATE}
            entries.append(entry | {"text": say.text, "speaker": say.voice, "lang": "en"})
        return entries

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        blocks = pool.map(write_block, range(0, len(says), _PROCESS_UTTERANCES))
        entries = [entry for block in blocks for entry in block]
    path = finish(out_dir / f"{name}.jsonl", entries)
    if shar:
        to_shar(path, out_dir / "shar" / name)
    return path
