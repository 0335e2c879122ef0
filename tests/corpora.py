"""Small corpora of noise, written where a test wants them."""

import json

import numpy as np
import soundfile

from jasr.data import AudioText
from jasr.text import TextError

ALPHABET = " abcdefghijklmnopqrstuvwxyz'"


def encode(text):
    """Token ids 1.. of the letters; TextError for others."""
    if unknown := set(text) - set(ALPHABET):
        raise TextError(f"unknown characters {sorted(unknown)}")
    return [ALPHABET.index(c) + 1 for c in text]


def layout(cfg, encode=encode, frames_needed=None, seconds_per_frame=0.0):
    """The AudioText of a DataConfig."""
    return AudioText(cfg, cfg.sample_rate, encode, frames_needed, seconds_per_frame)


def noise(seconds, seed, rate=16000, channels=1):
    """f64[S] or f64[S, C] of quiet noise, exact in 16 bits."""
    shape = (round(seconds * rate), channels) if channels > 1 else round(seconds * rate)
    pcm = np.random.default_rng(seed).integers(-3000, 3000, shape)
    return pcm / 32768


def words(n, seed):
    """n short words."""
    letters = np.random.default_rng(seed).integers(1, 27, (n, 3))
    return " ".join("".join(ALPHABET[i] for i in w) for w in letters)


def write_lines(path, entries, mode="w"):
    """The path of a manifest with the entries: dicts, or strings as they are."""
    lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
    with open(path, mode, encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)
    return str(path)


def make_corpus(folder, count=24, seed=0, shortest=0.3, longest=1.5):
    """(path of the manifest, its entries) of `count` noise files of different durations."""
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    rng, entries = np.random.default_rng(seed), []
    for i in range(count):
        seconds = round(float(rng.uniform(shortest, longest)), 2)
        name = f"wav/{seed}-{i:03d}.wav"
        soundfile.write(folder / name, noise(seconds, [seed, i]), 16000)
        entry = {"audio_filepath": name, "duration": seconds, "text": words(1 + i % 3, i)}
        entries.append(entry | {"speaker": f"s{i % 4}"})
    return write_lines(folder / f"set{seed}.jsonl", entries), entries


def texts(data):
    """The texts of an opened evaluation set, by index number."""
    return [data.item(n).fields["text"] for n in range(len(data.ids))]
