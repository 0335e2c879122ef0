"""Transcripts as text, JSON lines, subtitles (SRT, WebVTT) and CTM.

A transcript is what `Recognizer.transcribe` returns: a dict with `text`, `words`
[{"word", "start", "end"}] in seconds, `audio_filepath`, `duration`, `warnings` ...
"""

import json

FORMATS = ("txt", "json", "srt", "vtt", "ctm")
FIELDS = (
    *("audio_filepath", "duration", "text", "words", "segments"),
    *("timestamp", "coverage", "warnings", "error"),
)

CUE_SECONDS, CUE_CHARACTERS, CUE_PAUSE = 7.0, 84, 1.0  # two lines of 42 characters, as broadcast
CUE_LEAST, CUE_FLASH = 1.5, 0.1  # s: a shorter sentence shares its cue; the shortest cue
SENTENCE_ENDS = tuple(".?!\u2026\u0964\u3002\uff1f\uff01")  # and those of Hindi, Chinese, Japanese


def render(result, kind, name=""):
    """A transcript in one of the FORMATS, with its last newline (subtitles without words: "").

    Args:
      result: transcript dict.
      name: what stands for the recording: before the text of "txt" if given, in "ctm" always.
    """
    if kind == "txt":
        return f"{name}\t{result['text']}\n" if name else f"{result['text']}\n"
    if kind == "json":
        return json_line(result)
    return ctm(result, name) if kind == "ctm" else subtitles(result, kind)


def json_line(result):
    """One JSON object in one line, readable where the text is Unicode."""
    row = {key: result[key] for key in FIELDS if key in result}
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8
        line = json.dumps(row)
    return line + "\n"


def subtitles(result, kind):
    """SubRip ("srt") or WebVTT ("vtt"), whose header stands even without words; of a model without
    times a segment each."""
    header, point = {"srt": ("", ","), "vtt": ("WEBVTT\n\n", ".")}[kind]
    timed = cues(result["words"])
    if not timed and result["text"]:
        timed = [(s["start"], s["end"], s["segment"]) for s in result["segments"]]
    lines = [header]
    for number, (start, end, text) in enumerate(timed, 1):
        if kind == "srt":
            lines.append(f"{number}\n")
        else:  # no markup
            text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        lines.append(f"{clock(start, point)} --> {clock(end, point)}\n{text}\n\n")
    return "".join(lines)


def ctm(result, name):
    """NIST CTM: name, channel, start, duration, word; spaces in the name become underscores."""
    name = "_".join(name.split()) or "-"
    return "".join(
        f"{name} 1 {w['start']:.3f} {max(0.0, w['end'] - w['start']):.3f} {w['word']}\n"
        for w in result["words"]
    )


def segments(words):
    """[{"segment", "start", "end"}]: words up to a sentence's end or a pause of CUE_PAUSE."""
    return [
        {"segment": " ".join(w["word"] for w in s), "start": s[0]["start"], "end": s[-1]["end"]}
        for s in _sentences(words)
    ]


def _sentences(words):
    """Lists of the words of each segment."""
    found = []
    for before, word in zip([None, *words], words, strict=False):
        pause = before and word["start"] - before["end"] >= CUE_PAUSE
        if not before or pause or before["word"].endswith(SENTENCE_ENDS):
            found.append([])
        found[-1].append(word)
    return found


def cues(words):
    """[(start, end, text)] of subtitles: sentences, cut where they are longer than 7 seconds or
    two lines of text; a sentence shorter than CUE_LEAST is followed by the next in its cue, unless
    a pause parts them."""
    found = []
    for sentence in _sentences(words):
        for number, w in enumerate(sentence):
            start, end, text = found[-1] if found else (0.0, 0.0, "")
            joined = f"{text} {w['word']}"
            apart = w["start"] - end >= CUE_PAUSE or (number == 0 and end - start >= CUE_LEAST)
            long = w["end"] - start > CUE_SECONDS or len(joined) > CUE_CHARACTERS
            if not found or apart or long:
                found.append((w["start"], w["end"], w["word"]))
            else:
                found[-1] = (start, w["end"], joined)
    return [(start, max(end, start + CUE_FLASH), text) for start, end, text in found]


def clock(seconds, point):
    """HH:MM:SS and milliseconds after `point`; hours may pass 99."""
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, rest = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{rest:03d}"
