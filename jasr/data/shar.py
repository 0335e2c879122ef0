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


def cut_lists(folder):
    """The sorted cut files of a Shar directory."""
    found = glob.glob(os.path.join(glob.escape(folder), "cuts.*.jsonl*"))
    return sorted(f for f in found if f.endswith((".jsonl", ".jsonl.gz")))


def shar_lines(folder):
    """Yields a Line or Bad for each cut of a Shar directory."""
    lists = cut_lists(folder)
    if not lists:
        raise DataError(f"{folder} is a directory without Shar files (cuts.000000.jsonl.gz ...)")
    for path in lists:
        shard = os.path.basename(path).split(".")[1]
        tar = f"recording.{shard}.tar"
        members = tar_members(os.path.join(folder, tar))
        yield from cut_lines(path, tar, members)


def cutset_lines(path):
    """Yields a Line or Bad for each cut of a CutSet manifest."""
    return cut_lines(path, "", {})


def cut_lines(path, tar, members):
    """Yields a Line or Bad for each line of cuts, whose audio may lie in a tar with `members`."""
    for number, cut, reason in json_lines(path):
        if cut is None:
            yield Bad(path, number, "", "", reason)
        else:
            yield cut_line(path, number, cut, tar, members)


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


def cut_line(path, line, cut, tar, members):
    """The Line of a lhotse cut, or Bad with the reason.

    Its fields are the text, the first supervision's `custom` and its speaker and language under the
    names of manifests, so that `write` gives the same cut again.
    """
    ident, recording = str(cut.get("id", "")), cut.get("recording")
    where = (path, line, ident, tar)
    if cut.get("type", "MonoCut") not in ("MonoCut", "MultiCut"):
        return Bad(*where, f"cut type not supported: {cut.get('type')}")
    if not ident or not isinstance(recording, dict):
        return Bad(*where, f"missing key: {'recording' if ident else 'id'}")
    text = cut_text(cut)
    if text is None:
        return Bad(*where, "missing key: supervisions with text")
    if not isinstance(text, str):
        return Bad(*where, f"text is not a string: {text!r:.80}")
    start, duration, whole = cut.get("start", 0), cut.get("duration"), recording.get("duration")
    if not is_number(start) or not is_number(duration):
        return Bad(*where, f"start or duration is not a number: {start!r}, {duration!r}")
    part = not is_number(whole) or start > 0 or duration < whole - 1e-3
    times = (float(start) if part else -1.0, float(duration))
    sources = [s for s in recording.get("sources") or [] if isinstance(s, dict)]
    kinds = {s.get("type") for s in sources}
    channel = cut.get("channel") if len(recording.get("channel_ids") or [0]) > 1 else None
    channel = channel if isinstance(channel, int) else -1
    if kinds == {"shar"}:
        name = tar_name(ident, recording, members)
        if name is None:
            return Bad(*where, "missing file: no such member in the tar")
        piece = Piece(tar, *members[name], *times, channel)
        return Line(path, line, {"id": ident, "audio_filepath": piece} | cut_fields(cut, text))
    if kinds != {"file"} or len(sources) != 1:
        kind = ", ".join(map(str, kinds)) or "none"
        return Bad(*where, f"recording source not supported: {kind}")
    audio = file_of(sources[0].get("source", ""), os.path.dirname(os.path.abspath(path)))
    piece = Piece(audio, -1, -1, *times, channel)
    return Line(path, line, {"id": ident, "audio_filepath": piece} | cut_fields(cut, text))


def cut_fields(cut, text):
    """{"text", "speaker", "lang", what is custom} of a cut, as a manifest has them."""
    first = next((s for s in cut.get("supervisions") or [] if isinstance(s, dict)), {})
    custom = first.get("custom") if isinstance(first.get("custom"), dict) else {}
    fields = {k: v for k, v in custom.items() if k not in ("id", "audio_filepath")}
    named = {"speaker": first.get("speaker"), "lang": first.get("language")}
    return fields | {k: v for k, v in named.items() if v is not None} | {"text": text}


def tar_name(ident, recording, members):
    """The name of the cut's member, which carries the cut's id (or the recording's)."""
    return next((n for n in (ident, str(recording.get("id"))) if n in members), None)


def cut_text(cut):
    """The text of a cut: its supervisions' texts in order of time, joined by spaces."""
    spoken = [s for s in cut.get("supervisions") or [] if isinstance(s, dict)]
    if len(spoken) > 1:
        spoken.sort(key=lambda s: s.get("start") if is_number(s.get("start")) else 0)
    texts = [s["text"] for s in spoken if s.get("text") is not None]
    strange = [t for t in texts if not isinstance(t, str)]
    if strange or not texts:
        return strange[0] if strange else None
    return " ".join(texts) if len(texts) > 1 else texts[0]


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
    out_dir = os.path.abspath(out_dir)
    half = out_dir + ".half"
    if os.path.isdir(out_dir) and [f for f in os.listdir(out_dir) if not is_shar_file(f)]:
        raise DataError(f"{out_dir} holds other files than Shar shards; choose another folder")
    shutil.rmtree(half, ignore_errors=True)
    os.makedirs(half)
    seen, count = set(), 0
    for shard, block in enumerate(blocks(items, shard_size)):
        cuts = []
        with tarfile.open(os.path.join(half, f"recording.{shard:06d}.tar"), "w") as tar:
            for entry, data in block:
                cut, ext = make_cut(entry, data)
                if cut["id"] in seen:
                    raise DataError(f"two utterances with the identifier {cut['id']!r}")
                seen.add(cut["id"])
                cuts.append(cut)
                manifest = json.dumps(cut["recording"], ensure_ascii=False).encode() + b"\n"
                for name, content in ((ext, data), ("json", manifest)):
                    member = tarfile.TarInfo(f"{cut['id']}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        write_gzip(os.path.join(half, f"cuts.{shard:06d}.jsonl.gz"), cuts)
        count += len(cuts)
    if not count:
        raise DataError(f"nothing to write to {out_dir}")
    shutil.rmtree(out_dir, ignore_errors=True)
    os.replace(half, out_dir)
    return count


def write_gzip(path, records):
    """Writes records as JSON lines, compressed, without name and time, so that bytes repeat."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def is_shar_file(name):
    """Whether a file name is that of a Shar shard (any field)."""
    parts = name.split(".")
    return len(parts) > 2 and parts[1].isdigit() and parts[2] in ("jsonl", "tar")


def blocks(items, size):
    """Yields lists of `size` items, the last one shorter."""
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


def make_cut(entry, data):
    """(lhotse cut as a dict, file extension) of a manifest entry and its encoded audio."""
    from jasr import audio

    seconds, rate, channels = audio.info(data)
    ident = str(entry.get("id") or identifier(entry["audio_filepath"]))
    if not is_member_name(ident):
        raise DataError(f"the identifier {ident!r} cannot name a file in a tar")
    ext = os.path.splitext(entry["audio_filepath"])[1][1:].lower() or "flac"
    samples = round(seconds * rate)
    source = {"type": "shar", "channels": list(range(channels)), "source": ""}
    recording = {
        "id": ident,
        "sources": [source],
        "sampling_rate": rate,
        "num_samples": samples,
        "duration": samples / rate,
        "channel_ids": list(range(channels)),
    }
    channel = 0 if channels == 1 else list(range(channels))
    spoken = {"id": ident, "recording_id": ident, "start": 0.0, "duration": samples / rate}
    spoken |= {"channel": channel, "text": entry["text"]}
    known = {"audio_filepath", "duration", "text", "offset", "id", "speaker", "lang", "language"}
    if entry.get("speaker") is not None:
        spoken["speaker"] = str(entry["speaker"])
    if language := entry.get("lang") or entry.get("language"):
        spoken["language"] = str(language)
    if custom := {k: v for k, v in entry.items() if k not in known}:
        spoken["custom"] = custom
    cut = {"id": ident, "start": 0, "duration": samples / rate, "channel": channel}
    cut |= {"supervisions": [spoken], "recording": recording}
    return cut | {"type": "MonoCut" if channels == 1 else "MultiCut"}, ext


def identifier(path):
    """The identifier that stands for an audio file: its path without extension, never absolute."""
    parts = os.path.splitext(path)[0].replace(os.sep, "/").split("/")
    return "/".join(p for p in parts if p not in ("", ".", ".."))


def is_member_name(ident):
    """Whether lhotse reads an identifier back from the name of a tar member."""
    name = pathlib.PurePosixPath(f"{ident}.flac")
    plain = not name.is_absolute() and ".." not in name.parts and "\0" not in ident
    return plain and str(name.parent / name.stem) == ident
