"""Corpora as they are distributed -> NeMo-style manifests and lhotse Shar."""

import os
import re
import tarfile
from pathlib import Path

import numpy as np

from experiments.prepare.manifest import finish, to_shar, with_durations, within
from jasr.data.config import DataError
from jasr.data.entries import Bad, say

AN4_URL = "http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz"
AN4_RATE = 16000  # of the headerless .raw files
# Eight speakers of the official training part, three women and five men, kept for validation.
AN4_VALID = "fejs fjmd fkdo mcfl mdcs2 mjjs2 mmap msmn".split()


# ---- AN4 ---------------------------------------------------------------------------------------


def an4(source, out_dir, valid_speakers=None, download=False):
    """{"train": manifest, "valid": ..., "test": ...} of CMU's AN4, audio as 16 kHz FLAC beside.

    source: the official `an4` folder (etc/an4_train.transcription, etc/*.fileids, wav/**.sph or
    .raw), the folder around it, or the archive. The official training part is split by speakers;
    the test part stays whole. Texts are lower case, without <s>, </s> and silence marks.
    """
    valid_speakers = AN4_VALID if valid_speakers is None else valid_speakers
    root = _an4_root(Path(source), Path(out_dir), download)
    parts = {name: _an4_part(root, name) for name in ("train", "test")}
    speakers = {speaker for _, speaker, _, _ in parts["train"]}
    if unknown := set(valid_speakers) - speakers:
        raise DataError(f"no training speaker {', '.join(sorted(unknown))} in {root}")
    sets = {"train": [], "valid": [], "test": parts["test"]}
    for item in parts["train"]:
        sets["valid" if item[1] in valid_speakers else "train"].append(item)
    return {name: _an4_set(Path(out_dir), name, items) for name, items in sets.items() if items}


def _an4_root(source, out_dir, download):
    """The folder with etc/ and wav/; unpacks an archive into out_dir/official."""
    if download:
        source = fetch(AN4_URL, source)
    if source.is_file():
        say(f"unpacking {source}")
        with tarfile.open(source) as tar:
            tar.extractall(out_dir / "official", filter="data")
        source = out_dir / "official"
    for root in (source, source / "an4"):
        if (root / "etc" / "an4_train.transcription").is_file():
            return root
    raise DataError(
        f"{source} is not AN4: etc/an4_train.transcription is missing (it is in {AN4_URL}, which "
        "--download fetches)"
    )


def fetch(url, path):
    """The path of a downloaded file; an existing one is kept."""
    import urllib.request

    path = Path(path)
    if path.is_dir():
        path = path / url.rsplit("/", 1)[1]
    if not path.exists():
        say(f"downloading {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + ".half")
        try:
            urllib.request.urlretrieve(url, half)
        except OSError as e:
            raise DataError(f"cannot download {url}: {e}") from e
        os.replace(half, path)
    return path


def _an4_part(root, name):
    """[(id, speaker, text, audio path)] of an official part; the files may be missing."""
    lines = (root / "etc" / f"an4_{name}.transcription").read_text("utf-8").splitlines()
    ids = (root / "etc" / f"an4_{name}.fileids").read_text("utf-8").split()
    files = {os.path.basename(i): i for i in ids}
    items = []
    for line in filter(str.strip, lines):
        if not (m := re.fullmatch(r"(.*)\(([^()\s]+)\)\s*", line)):
            raise DataError(f"an4_{name}.transcription: no (identifier) at the end of {line!r}")
        text, ident = m.groups()
        if ident not in files:
            raise DataError(f"an4_{name}.fileids: {ident} of the transcription is missing")
        stem = root / "wav" / files[ident]
        found = [p for e in (".sph", ".raw", ".wav") if (p := Path(f"{stem}{e}")).exists()]
        speaker = stem.parent.name
        items.append((ident, speaker, an4_text(text), found[0] if found else f"{stem}.sph"))
    return items


def an4_text(text):
    """A transcript in lower case without <...>, ++...++ and pronunciation numbers (`A(2)`)."""
    words = [re.sub(r"\(\d+\)$", "", w) for w in text.split()]
    return " ".join(w for w in words if not re.fullmatch(r"<.*>|\+\+.*\+\+", w)).lower()


def _an4_set(out_dir, name, items):
    """The manifest of a set, its audio written first."""
    import soundfile

    from jasr import audio

    entries, bad = [], []
    for ident, speaker, text, path in items:
        try:
            samples = read_raw(path) if str(path).endswith(".raw") else audio.read(path, AN4_RATE)
        except (audio.AudioError, OSError) as e:
            bad.append(Bad(f"an4_{name}", 0, ident, str(path), getattr(e, "reason", str(e))))
            continue
        relative = f"{name}/{speaker}/{ident}.flac"
        (out_dir / relative).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(out_dir / relative, samples, AN4_RATE, subtype="PCM_16")
        entry = {"audio_filepath": relative, "duration": len(samples) / AN4_RATE, "text": text}
        entries.append(entry | {"speaker": speaker, "lang": "en"})
    return finish(out_dir / f"{name}.jsonl", entries, bad)


def read_raw(path):
    """Samples f32[S] of a headerless 16-bit file, in the byte order of the smoother wave."""
    from jasr import audio

    data = Path(path).read_bytes()
    if not data or len(data) % 2:
        raise audio.AudioError(path, f"not 16-bit samples: {len(data)} bytes")
    orders = [np.frombuffer(data, t).astype(np.float32) / 32768 for t in (">i2", "<i2")]
    return min(orders, key=lambda x: float(np.abs(np.diff(x)).sum()))


# ---- LibriSpeech -------------------------------------------------------------------------------


def librispeech(corpus_dir, out_dir, parts=(), download=False, lower=True, shard_size=1000):
    """{part: manifest} of LibriSpeech by lhotse's recipe, and Shar in out_dir/shar/{part}.

    corpus_dir: the official LibriSpeech folder (or the one around it), or where it is put with
    `download`. The FLAC files are taken as they are. Needs the extra `[data]`.
    """
    try:
        from lhotse.recipes import librispeech as recipe
    except ImportError as e:
        raise DataError(f"LibriSpeech needs lhotse ({e}): pip install 'jasr[data]'") from e
    corpus_dir, out_dir = Path(corpus_dir), Path(out_dir)
    if download:
        corpus_dir.mkdir(parents=True, exist_ok=True)
        try:
            recipe.download_librispeech(corpus_dir, dataset_parts=list(parts) or "librispeech")
        except OSError as e:
            raise DataError(f"cannot download LibriSpeech: {e}") from e
    if (corpus_dir / "LibriSpeech").is_dir():
        corpus_dir = corpus_dir / "LibriSpeech"
    for part in parts:
        if not (corpus_dir / part).is_dir():
            raise DataError(f"{corpus_dir} has no part {part}; choose from {_parts(corpus_dir)}")
    try:
        prepared = recipe.prepare_librispeech(
            corpus_dir, dataset_parts=list(parts) or "auto", normalize_text="none"
        )
    except Exception as e:
        raise DataError(_damaged(corpus_dir, parts, e)) from e
    manifests = {}
    for part, sets in sorted(prepared.items()):
        entries = sorted(_librispeech_entries(sets, lower), key=lambda e: e["id"])
        here = [e | {"audio_filepath": within(out_dir, e["audio_filepath"])} for e in entries]
        manifests[part] = finish(out_dir / f"{part}.jsonl", here)
        to_shar(manifests[part], out_dir / "shar" / part, shard_size)
    return manifests


def _librispeech_entries(sets, lower):
    recordings = {r.id: r for r in sets["recordings"]}
    for s in sets["supervisions"]:
        recording = recordings[s.recording_id]
        yield {
            "audio_filepath": recording.sources[0].source,
            "duration": recording.duration,
            "text": s.text.lower() if lower else s.text,
            "speaker": s.speaker,
            "lang": "en",
            "id": s.id,
        }


def _parts(corpus_dir):
    return ", ".join(sorted(p.name for p in corpus_dir.glob("*") if p.is_dir())) or "nothing"


def _damaged(corpus_dir, parts, error):
    """What to say when the recipe fails: the files that cannot be opened, if that is why."""
    files = [p for part in parts or [""] for p in sorted((corpus_dir / part).rglob("*.flac"))]
    _, bad = with_durations([{"audio_filepath": str(p)} for p in files], corpus_dir)
    if not bad:
        return f"lhotse cannot prepare {corpus_dir}: {error}"
    names = "; ".join(f"{b.audio}: {b.reason}" for b in bad[:5])
    return f"{len(bad)} damaged files in {corpus_dir}, fetch them again or delete them: {names}"
