"""Manifests from any folder or table of recordings and texts, and lhotse Shar from manifests."""

import csv
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jasr.data import shar
from jasr.data.config import DataConfig, DataError
from jasr.data.entries import Bad, named, say, write_quarantine

AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".sph", ".aiff", ".au")
TRANSCRIPTS = (".txt", ".trn", ".lab")
PATH_COLUMNS = ("audio_filepath", "path", "file", "filename", "file_name", "wav", "audio", "id")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "normalized_text")


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


def finish(path, entries, bad=()):
    """The path of a manifest that is written; says what it holds and what was left out.

    Raises:
      DataError: it holds nothing.
    """
    write_manifest(path, entries)
    minutes = sum(e["duration"] for e in entries) / 60
    say(f"{path}: {len(entries)} utterances, {minutes:.1f} minutes")
    left_out(path, bad)
    if not entries:
        raise DataError(f"no usable utterance for {path}")
    return path


def left_out(path, bad):
    """Names what was left out of a manifest or Shar directory, and lists it beside."""
    if bad:
        listed = f"{os.fspath(path).rstrip('/')}.quarantine.jsonl"
        write_quarantine(listed, bad)
        for b in bad[:5]:
            say(f"  left out {named(b)}")
        say(f"  {len(bad)} left out in all, see {listed}")


def within(folder, path):
    """The path relative to a folder where it lies inside, else absolute."""
    path, folder = Path(path).resolve(), Path(folder).resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


# ---- any folder or table -----------------------------------------------------------------------


def make(source, out, audio_dir="", path_column="", text_column="", lower=False):
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
    entries = [e | {"audio_filepath": within(out.parent, e["audio_filepath"])} for e in entries]
    return finish(out, entries, bad + broken)


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
    from jasr.data import AudioText
    from jasr.data import index as index_lib

    cfg = DataConfig(
        check="header", min_duration=0.0, max_duration=0.0, max_bad_share=max_bad_share
    )
    index = index_lib.build(os.fspath(source), AudioText(cfg, 16000, list), cfg)
    count = shar.write(out_dir, (shar_item(index, row) for row in range(len(index))), shard_size)
    say(f"{out_dir}: {count} utterances")
    left_out(out_dir, index.bad)
    return count


def shar_item(index, row):
    """(manifest entry, encoded audio) of an index row, as `shar.write` takes them."""
    import soundfile

    from jasr.data import recording

    item = index.item(row)
    piece = item.pieces[0]
    entry = {**item.fields, "duration": piece.seconds}
    path = index.files[index.pieces["file"][index.first_piece[row]]]
    if piece.start < 0 and piece.channel < 0:
        data = recording.audio_file(piece)
        data = data if isinstance(data, bytes) else Path(data).read_bytes()
        ident = index.ids[row] or shar.identifier(path)
        return entry | {"id": ident, "audio_filepath": path}, data
    encoded = io.BytesIO()
    soundfile.write(encoded, recording.read(piece, 16000), 16000, "PCM_16", format="FLAC")
    part = f"{shar.identifier(path)}-{max(piece.start, 0) * 1000:08.0f}"
    return entry | {"id": index.ids[row] or part, "audio_filepath": "x.flac"}, encoded.getvalue()
