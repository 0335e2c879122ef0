"""lhotse Shar directories and CutSet manifests, read and written without lhotse or torch.

A Shar directory holds shards: `cuts.NNNNNN.jsonl[.gz]` with one cut a line, and for each field a
`recording.NNNNNN.tar` with the members `<id>.<ext>` (the audio, in the order of the cuts) and
`<id>.json` (its manifest). A cut's audio is found by its byte offset in the tar.
"""

import glob
import gzip
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import tarfile

from jasr.data.config import DataError
from jasr.data.entries import Bad, Line, is_number, json_lines
from jasr.seam import Piece


def is_cutset(path):
    """Whether a JSON-lines file holds lhotse cuts (its first readable line tells)."""
    for _, d, _ in json_lines(path):
        if d is not None:
            return "audio_filepath" not in d and ("supervisions" in d or "recording" in d)
    return False


def shar_lines(folder):
    """Yields a Line or Bad for each cut of a Shar directory."""
    found = glob.glob(os.path.join(glob.escape(folder), "cuts.*.jsonl*"))
    lists = sorted(f for f in found if f.endswith((".jsonl", ".jsonl.gz")))
    if not lists:
        raise DataError(f"{folder} is a directory without Shar files (cuts.000000.jsonl.gz ...)")
    for path in lists:
        tar = f"recording.{os.path.basename(path).split('.')[1]}.tar"
        yield from cut_lines(path, tar, tar_members(os.path.join(folder, tar)))


def cut_lines(path, tar="", members=None):
    """Yields a Line or Bad for each line of cuts, whose audio may lie in a tar with `members`."""
    for number, cut, reason in json_lines(path):
        if cut is None:
            yield Bad(path, number, "", "", reason)
            continue
        try:
            yield Line(path, number, cut_values(cut, path, tar, members or {}))
        except DataError as e:
            yield Bad(path, number, str(cut.get("id", "")), tar, str(e))


def tar_members(path):
    """{cut id: (byte offset, size)} of the audio members of a recording tar.

    A tar that ends early gives the members before the damage.
    """
    members = {}
    try:
        with tarfile.open(path) as tar:
            for m in tar:
                ident, ext = os.path.splitext(m.name)
                if m.isfile() and ext not in (".json", ".nodata", ".nometa"):
                    members[ident] = (m.offset_data, m.size)
    except (tarfile.TarError, OSError, EOFError):
        pass
    return members


def cut_values(cut, path, tar, members):
    """What a manifest would say of a lhotse cut. Raises DataError with the reason against it.

    Its fields are the text, the first supervision's `custom` and its speaker and language under the
    names of manifests, so that `write` gives the same cut again.
    """
    ident, recording = str(cut.get("id", "")), cut.get("recording")
    if cut.get("type", "MonoCut") not in ("MonoCut", "MultiCut"):
        raise DataError(f"cut type not supported: {cut.get('type')}")
    if not ident or not isinstance(recording, dict):
        raise DataError(f"missing key: {'recording' if ident else 'id'}")
    spoken = [s for s in cut.get("supervisions") or [] if isinstance(s, dict)]
    text = cut_text(spoken)
    start, duration, whole = cut.get("start", 0), cut.get("duration"), recording.get("duration")
    if not is_number(start) or not is_number(duration):
        raise DataError(f"start or duration is not a number: {start!r}, {duration!r}")
    part = not is_number(whole) or start > 0 or duration < whole - 1e-3
    channel = cut.get("channel") if len(recording.get("channel_ids") or [0]) > 1 else None
    times = float(start) if part else -1.0, float(duration)
    times = *times, channel if isinstance(channel, int) else -1
    sources = [s for s in recording.get("sources") or [] if isinstance(s, dict)]
    kinds = {s.get("type") for s in sources}
    if kinds == {"shar"}:  # the member carries the cut's id (or the recording's)
        name = next((n for n in (ident, str(recording.get("id"))) if n in members), None)
        if name is None:
            raise DataError("missing file: no such member in the tar")
        piece = Piece(tar, *members[name], *times)
    elif kinds == {"file"} and len(sources) == 1:
        audio = file_of(sources[0].get("source", ""), os.path.dirname(os.path.abspath(path)))
        piece = Piece(audio, -1, -1, *times)
    else:
        kind = ", ".join(map(str, kinds)) or "none"
        raise DataError(f"recording source not supported: {kind}")
    first = spoken[0]
    custom = first.get("custom") if isinstance(first.get("custom"), dict) else {}
    said = {"speaker": first.get("speaker"), "lang": first.get("language")}
    said = {k: v for k, v in said.items() if v is not None}
    return custom | said | {"text": text, "id": ident, "audio_filepath": piece}


def cut_text(spoken):
    """The texts of supervisions in order of time, joined by spaces. Raises DataError: none."""
    in_time = spoken
    if len(spoken) > 1:
        in_time = sorted(spoken, key=lambda s: s["start"] if is_number(s.get("start")) else 0)
    texts = [s["text"] for s in in_time if s.get("text") is not None]
    if strange := [t for t in texts if not isinstance(t, str)]:
        raise DataError(f"text is not a string: {strange[0]!r:.80}")
    if not texts:
        raise DataError("missing key: supervisions with text")
    return " ".join(texts)


def file_of(source, folder):
    """The path of a file source: a relative one lies in `folder` or in the working directory."""
    beside = os.path.exists(os.path.join(folder, source))
    return os.path.abspath(source) if not beside and os.path.exists(source) else source


# ---- writing -----------------------------------------------------------------------------------


def write(out_dir, items, shard_size=1000):
    """The number of utterances written as a Shar directory, which replaces an older one.

    items: pairs of a NeMo-style manifest entry (dict) and the encoded audio (bytes of a FLAC, WAV,
    OGG, MP3 ... file), which goes into the tar as it is. `text`, `speaker` and `lang` become the
    supervision, other fields its `custom`. Equal items give equal files.

    Raises DataError: an identifier twice, or an out_dir that holds something else;
    audio.AudioError: a recording without a readable header.
    """
    out_dir, items = os.path.abspath(out_dir), iter(items)
    half = out_dir + ".half"
    shard_file = re.compile(r"[^.]*\.\d+\.(jsonl|tar)(\..*)?")
    if os.path.isdir(out_dir) and not all(map(shard_file.fullmatch, os.listdir(out_dir))):
        raise DataError(f"{out_dir} holds other files than Shar shards; choose another folder")
    shutil.rmtree(half, ignore_errors=True)
    os.makedirs(half)
    seen, shard = set(), 0
    while block := list(itertools.islice(items, shard_size)):
        cuts = []
        with tarfile.open(os.path.join(half, f"recording.{shard:06d}.tar"), "w") as tar:
            for entry, data in block:
                cut, ext = make_cut(entry, data)
                if cut["id"] in seen:
                    raise DataError(f"two utterances with the identifier {cut['id']!r}")
                seen.add(cut["id"])
                cuts.append(json_line(cut))
                for name, content in ((ext, data), ("json", json_line(cut["recording"]))):
                    member = tarfile.TarInfo(f"{cut['id']}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        # without name and time, so that bytes repeat
        with open(os.path.join(half, f"cuts.{shard:06d}.jsonl.gz"), "wb") as raw:
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as f:
                f.writelines(cuts)
        shard += 1
    if not seen:
        raise DataError(f"nothing to write to {out_dir}")
    shutil.rmtree(out_dir, ignore_errors=True)
    os.replace(half, out_dir)
    return len(seen)


def json_line(record):
    """A record as JSON and a newline, bytes."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def make_cut(entry, data):
    """(lhotse cut as a dict, file extension) of a manifest entry and its encoded audio."""
    from jasr import audio

    seconds, rate, channels = audio.info(data)
    ident = str(entry.get("id") or identifier(entry["audio_filepath"]))
    name = pathlib.PurePosixPath(f"{ident}.flac")  # as lhotse reads it from the tar
    plain = not name.is_absolute() and ".." not in name.parts and "\0" not in ident
    if not plain or str(name.parent / name.stem) != ident:
        raise DataError(f"the identifier {ident!r} cannot name a file in a tar")
    ext = os.path.splitext(entry["audio_filepath"])[1][1:].lower() or "flac"
    samples, numbers = round(seconds * rate), list(range(channels))
    channel, duration = 0 if channels == 1 else numbers, samples / rate
    recording = {
        "id": ident,
        "sources": [{"type": "shar", "channels": numbers, "source": ""}],
        "sampling_rate": rate,
        "num_samples": samples,
        "duration": duration,
        "channel_ids": numbers,
    }
    spoken = {"id": ident, "recording_id": ident, "start": 0.0, "duration": duration}
    spoken |= {"channel": channel, "text": entry["text"]}
    if entry.get("speaker") is not None:
        spoken["speaker"] = str(entry["speaker"])
    if language := entry.get("lang") or entry.get("language"):
        spoken["language"] = str(language)
    known = {"audio_filepath", "duration", "text", "offset", "id", "speaker", "lang", "language"}
    if custom := {k: v for k, v in entry.items() if k not in known}:
        spoken["custom"] = custom
    cut = {"id": ident, "start": 0, "duration": duration, "channel": channel}
    cut |= {"supervisions": [spoken], "recording": recording}
    return cut | {"type": "MonoCut" if channels == 1 else "MultiCut"}, ext


def identifier(path):
    """The identifier that stands for an audio file: its path without extension, never absolute."""
    parts = os.path.splitext(path)[0].replace(os.sep, "/").split("/")
    return "/".join(p for p in parts if p not in ("", ".", ".."))
