"""Corpora as they are distributed -> NeMo-style manifests and lhotse Shar."""

import csv
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jasr.data.config import DataError
from jasr.data.entries import Bad, reason_class, say, write_quarantine

AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".sph", ".aiff", ".au", ".raw")
TRANSCRIPTS = (".txt", ".trn", ".lab")
PATH_COLUMNS = ("audio_filepath", "path", "file", "filename", "file_name", "wav", "audio", "id")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "normalized_text")

AN4_URL = "http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz"
AN4_RATE = 16000  # of the headerless .raw files
# Eight speakers of the official training part, three women and five men, kept for validation.
AN4_VALID = "fejs fjmd fkdo mcfl mdcs2 mjjs2 mmap msmn".split()


def write_manifest(path, entries):
    """The path of a manifest with the entries, written whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    with open(half, "w", encoding="utf-8") as f:
        for entry in entries:
            f.write(json.dumps(entry, ensure_ascii=False) + "\n")
    os.replace(half, path)
    return path


def with_durations(entries, folder):
    """(entries with `duration` read from the headers, [Bad]); paths are relative to `folder`."""
    from jasr import audio

    def look(entry):
        try:
            return round(audio.info(os.path.join(folder, entry["audio_filepath"]))[0], 4)
        except audio.AudioError as e:
            return e.reason

    good, bad = [], []
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        for entry, found in zip(entries, pool.map(look, entries), strict=True):
            if isinstance(found, str):
                bad.append(Bad(str(folder), 0, "", entry["audio_filepath"], found))
            else:
                name = {"audio_filepath": entry["audio_filepath"], "duration": found}
                good.append(name | {k: v for k, v in entry.items() if k not in name})
    return good, bad


def report(path, entries, bad):
    """Says what a manifest holds; names what was left out and lists it beside the manifest."""
    minutes = sum(e["duration"] for e in entries) / 60
    say(f"{path}: {len(entries)} utterances, {minutes:.1f} minutes")
    if bad:
        listed = f"{path}.quarantine.jsonl"
        write_quarantine(listed, bad)
        for b in bad[:5]:
            say(f"  left out {b.audio}: {b.reason}")
        say(f"  {len(bad)} left out in all, see {listed}")
    if not entries:
        raise DataError(f"no usable utterance for {path}")


# ---- AN4 ---------------------------------------------------------------------------------------


def an4(source, out_dir, valid_speakers=tuple(AN4_VALID), download=False):
    """{"train": manifest, "valid": ..., "test": ...} of CMU's AN4, audio as 16 kHz FLAC beside.

    source: the official `an4` folder (etc/an4_train.transcription, etc/*.fileids, wav/**.sph or
    .raw), the folder around it, or the archive. The official training part is split by speakers;
    the test part stays whole. Texts are lower case, without <s>, </s> and silence marks.
    """
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
    path = write_manifest(out_dir / f"{name}.jsonl", entries)
    report(path, entries, bad)
    return path


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
    from jasr.data import shar

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
        here = [e | {"audio_filepath": _from(out_dir, e["audio_filepath"])} for e in entries]
        manifests[part] = write_manifest(out_dir / f"{part}.jsonl", here)
        report(manifests[part], entries, [])
        items = ((e, Path(e["audio_filepath"]).read_bytes()) for e in entries)
        shar.write(out_dir / "shar" / part, items, shard_size)
        say(f"{out_dir / 'shar' / part}: the same as lhotse Shar")
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


def _from(folder, path):
    """The path relative to a folder where it lies inside, else absolute."""
    path, folder = Path(path).resolve(), Path(folder).resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


# ---- any folder or table -----------------------------------------------------------------------


def manifest(source, out, audio_dir="", path_column="", text_column="", lower=False):
    """The path of a manifest made from a folder of audio with transcripts, or from a table.

    Folder: every `x.wav` (or .flac, .mp3 ...) with `x.txt`, `x.trn` or `x.lab` beside it. Table:
    CSV, TSV or `|`-separated, with a header that names the columns (PATH_COLUMNS, TEXT_COLUMNS or
    those given), or without one (first column the file, last the text); other columns are kept.
    """
    source, out = Path(source), Path(out)
    if source.is_dir():
        entries, bad = _folder_entries(source)
    elif source.is_file():
        entries, bad = _table_entries(source, audio_dir, path_column, text_column)
    else:
        raise DataError(f"{source} does not exist")
    if lower:
        entries = [e | {"text": e["text"].lower()} for e in entries]
    entries, broken = with_durations(entries, source if source.is_dir() else source.parent)
    entries = [e | {"audio_filepath": _from(out.parent, e["audio_filepath"])} for e in entries]
    write_manifest(out, entries)
    report(out, entries, bad + broken)
    return out


def _folder_entries(folder):
    entries, bad = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO):
        found = [t for e in TRANSCRIPTS if (t := path.with_suffix(e)).is_file()]
        if not found:
            bad.append(Bad(str(folder), 0, "", str(path), "missing transcript"))
            continue
        try:
            text = found[0].read_text("utf-8-sig")
        except UnicodeDecodeError:
            bad.append(Bad(str(folder), 0, "", str(path), f"{found[0].name} is not UTF-8"))
            continue
        if found[0].suffix == ".trn":  # Sphinx: the identifier in brackets at the end
            text = re.sub(r"\([^()\s]+\)\s*$", "", text)
        entries.append({"audio_filepath": str(path.absolute()), "text": " ".join(text.split())})
    return entries, bad


def _table_entries(table, audio_dir, path_column, text_column):
    with open(table, encoding="utf-8-sig", newline="") as f:
        sample = f.readline()
        f.seek(0)
        tab = "\t" if "\t" in sample else "|" if "|" in sample else ","
        quoting = csv.QUOTE_MINIMAL if tab == "," else csv.QUOTE_NONE
        rows = [row for row in csv.reader(f, delimiter=tab, quoting=quoting) if row]
    if not rows:
        raise DataError(f"{table} is empty")
    header = [c.strip() for c in rows[0]]
    path_at = _column(table, header, path_column, PATH_COLUMNS)
    text_at = _column(table, header, text_column, TEXT_COLUMNS)
    if path_at is None or text_at is None:
        path_at, text_at, names = 0, len(header) - 1, [""] * len(header)
    else:
        names, rows = header, rows[1:]
    folder = Path(audio_dir) if audio_dir else table.parent
    entries, bad = [], []
    for number, row in enumerate(rows, 1):
        if len(row) <= max(path_at, text_at):
            bad.append(Bad(str(table), number, "", "", f"{len(row)} columns of {len(names)}"))
            continue
        extra = {n: v for n, v in zip(names, row, strict=False) if n}
        for used in (path_at, text_at):
            extra.pop(names[used], None)
        path = _with_extension((folder / row[path_at]).absolute())
        entries.append({"audio_filepath": str(path), "text": row[text_at].strip()} | extra)
    return entries, bad


def _column(table, header, name, usual):
    """The number of a column by the name given or by a usual one; None if there is none."""
    if name:
        if name not in header:
            raise DataError(f"{table} has no column {name!r}; it has {', '.join(header)}")
        return header.index(name)
    return next((header.index(n) for n in usual if n in header), None)


def _with_extension(path):
    """The path, or the audio file beside that has it as its stem."""
    if path.exists():
        return path
    return next((p for e in AUDIO if (p := Path(f"{path}{e}")).exists()), path)


# ---- Shar --------------------------------------------------------------------------------------


def to_shar(source, out_dir, shard_size=1000, max_bad_share=0.05):
    """The number of utterances of a source (manifest, CutSet) written as lhotse Shar.

    Whole recordings are copied as they are encoded; segments and single channels are cut out and
    become 16 kHz FLAC. What cannot be used is listed in out_dir.quarantine.jsonl.
    """
    from jasr.data import index as index_lib
    from jasr.data import shar
    from jasr.data.config import DataConfig

    cfg = DataConfig(
        check="header", min_duration=0.0, max_duration=0.0, max_bad_share=max_bad_share
    )
    index = index_lib.build(os.fspath(source), list, cfg)
    count = shar.write(out_dir, (shar_item(index, row) for row in range(len(index))), shard_size)
    say(f"{out_dir}: {count} utterances")
    if index.bad:
        listed = f"{os.fspath(out_dir).rstrip('/')}.quarantine.jsonl"
        write_quarantine(listed, index.bad)
        reasons = sorted({reason_class(b.reason) for b in index.bad})
        say(f"  {len(index.bad)} left out ({', '.join(reasons)}), see {listed}")
    return count


def shar_item(index, row):
    """(manifest entry, encoded audio) of an index row, as `shar.write` takes them."""
    import io

    import soundfile

    from jasr.data import recording, shar

    entry = {k: v for k, v in index.entry(row).items() if k not in ("offset", "duration")}
    if "supervisions" in entry:  # a lhotse cut
        first = entry["supervisions"][0]
        entry = {"speaker": first.get("speaker"), "lang": first.get("language")}
    entry |= {"text": index.texts[row], "duration": float(index.duration[row])}
    path = index.files[index.file[row]]
    if index.start[row] < 0 and index.channel[row] < 0:
        data = recording.audio_file(index, row)
        data = data if isinstance(data, bytes) else Path(data).read_bytes()
        ident = index.ids[row] or shar.identifier(path)
        return entry | {"id": ident, "audio_filepath": path}, data
    encoded = io.BytesIO()
    soundfile.write(encoded, recording.read(index, row, 16000), 16000, "PCM_16", format="FLAC")
    part = f"{shar.identifier(path)}-{max(index.start[row], 0) * 1000:08.0f}"
    return entry | {"id": index.ids[row] or part, "audio_filepath": "x.flac"}, encoded.getvalue()
