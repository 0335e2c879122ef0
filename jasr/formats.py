"""Transcripts as text, JSON lines, subtitles (SRT, WebVTT) and CTM.

A transcript is what `Recognizer.transcribe` returns: a dict with `text`, `words`
[{"word", "start", "end"}] in seconds, `audio_filepath`, `duration` and `warnings`.
"""

import json

FORMATS = ("txt", "json", "srt", "vtt", "ctm")
FIELDS = ("audio_filepath", "duration", "text", "words", "warnings", "error")

CUE_SECONDS, CUE_CHARACTERS, CUE_PAUSE = 7.0, 84, 1.0  # two lines of 42 characters, as broadcast


def render(result, kind, name=""):
    """A transcript in one of the FORMATS, with its last newline (subtitles without words: "").

    Args:
      result: transcript dict.
      name: what stands for the recording: before the text of "txt" if given, in "ctm" always.
    """
    return {"txt": txt, "json": json_line, "srt": srt, "vtt": vtt, "ctm": ctm}[kind](result, name)


def txt(result, name=""):
    """The text in one line, after `name` and a tab if a name is given."""
    return f"{name}\t{result['text']}\n" if name else f"{result['text']}\n"


def json_line(result, name=""):
    """One JSON object in one line, readable where the text is Unicode."""
    row = {key: result[key] for key in FIELDS if key in result}
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8
        line = json.dumps(row)
    return line + "\n"


def srt(result, name=""):
    """SubRip subtitles."""
    return "".join(
        f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(cues(result["words"]), 1)
    )


def vtt(result, name=""):
    """WebVTT subtitles; the header stands even without words."""
    return "WEBVTT\n\n" + "".join(
        f"{clock(start, '.')} --> {clock(end, '.')}\n{escaped(text)}\n\n"
        for start, end, text in cues(result["words"])
    )


def ctm(result, name=""):
    """NIST CTM: name, channel, start, duration, word; spaces in the name become underscores."""
    name = "_".join(name.split()) or "-"
    return "".join(
        f"{name} 1 {w['start']:.3f} {max(0.0, w['end'] - w['start']):.3f} {w['word']}\n"
        for w in result["words"]
    )


def cues(words):
    """[(start, end, text)] of subtitles: words up to a pause, 7 seconds or two lines of text."""
    found = []
    for w in words:
        start, end, text = found[-1] if found else (0.0, 0.0, "")
        joined = f"{text} {w['word']}"
        pause = w["start"] - end >= CUE_PAUSE
        if not found or pause or w["end"] - start > CUE_SECONDS or len(joined) > CUE_CHARACTERS:
            found.append((w["start"], w["end"], w["word"]))
        else:
            found[-1] = (start, w["end"], joined)
    return found


def clock(seconds, point):
    """HH:MM:SS and milliseconds after `point`; hours may pass 99."""
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, rest = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{rest:03d}"


def escaped(text):
    """Text whose `<`, `>` and `&` are not taken for WebVTT's markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
