"""lhotse Shar directories and CutSet manifests, read and written without lhotse or torch.

A Shar directory holds shards: `cuts.NNNNNN.jsonl[.gz]` with one cut a line, and for each field a
`recording.NNNNNN.tar` with the members `<id>.<ext>` (the audio, in the order of the cuts) and
`<id>.json` (its manifest). A cut's audio is found by its byte offset in the tar.
"""

import glob
import os
import tarfile

from jasr.data.index import Bad, DataError, Entry, is_number, json_lines


def is_cutset(path):
    """Whether a JSON-lines file holds lhotse cuts (its first readable line tells)."""
    for _, _, d, _ in json_lines(path):
        if d is not None:
            return "audio_filepath" not in d and ("supervisions" in d or "recording" in d)
    return False


def cut_lists(folder):
    """The sorted cut files of a Shar directory."""
    found = glob.glob(os.path.join(glob.escape(folder), "cuts.*.jsonl*"))
    return sorted(f for f in found if f.endswith((".jsonl", ".jsonl.gz")))


def shar_entries(folder):
    """Yields an Entry or Bad for each cut of a Shar directory."""
    lists = cut_lists(folder)
    if not lists:
        raise DataError(f"{folder} is a directory without Shar files (cuts.000000.jsonl.gz ...)")
    for path in lists:
        shard = os.path.basename(path).split(".")[1]
        tar = os.path.join(folder, f"recording.{shard}.tar")
        members = tar_members(tar) if os.path.exists(tar) else {}
        for number, at, cut, reason in json_lines(path):
            if cut is None:
                yield Bad(path, number, "", "", reason)
            else:
                yield cut_entry(path, number, at, cut, tar, members)


def cutset_entries(path):
    """Yields an Entry or Bad for each cut of a CutSet manifest."""
    for number, at, cut, reason in json_lines(path):
        if cut is None:
            yield Bad(path, number, "", "", reason)
        else:
            yield cut_entry(path, number, at, cut, "", {})


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


def cut_entry(path, line, at, cut, tar, members):
    """The Entry of a lhotse cut, or Bad with the reason."""
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
        return Entry(line, at, ident, tar, *members[name], *times, channel, text, path)
    if kinds != {"file"} or len(sources) != 1:
        return Bad(
            *where, f"recording source not supported: {', '.join(map(str, kinds)) or 'none'}"
        )
    audio = file_of(sources[0].get("source", ""), os.path.dirname(os.path.abspath(path)))
    return Entry(line, at, ident, audio, -1, -1, *times, channel, text, path)


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
    """The path of a file source: relative ones lie beside the CutSet or in the working directory."""
    path = os.path.normpath(os.path.join(folder, source))
    if not os.path.isabs(source) and not os.path.exists(path) and os.path.exists(source):
        return os.path.abspath(source)
    return path
