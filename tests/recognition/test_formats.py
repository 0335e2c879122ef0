"""Transcripts as text, JSON, subtitles and CTM."""

import json
import re

import pytest

from jasr.recognition.formats import FORMATS, clock, cues, render

RESULT = {
    "audio_filepath": "a b.wav",
    "duration": 12.5,
    "text": "hello <old> world नमस्ते",
    "words": [
        {"word": "hello", "start": 0.04, "end": 0.4},
        {"word": "<old>", "start": 0.5, "end": 0.9},
        {"word": "world", "start": 3.0, "end": 3.4},
        {"word": "नमस्ते", "start": 3600.0, "end": 3600.5},
    ],
    "warnings": ["something"],
    "updates": 3,
}
EMPTY = {"audio_filepath": "x", "duration": 1.0, "text": "", "words": [], "warnings": []}


def test_json_is_one_object_in_one_line_with_the_promised_fields():
    line = render(RESULT, "json")
    assert line.count("\n") == 1 and line.endswith("\n")
    row = json.loads(line)
    assert list(row) == ["audio_filepath", "duration", "text", "words", "warnings"]
    assert row["words"][0] == {"word": "hello", "start": 0.04, "end": 0.4}


def test_json_of_a_file_name_that_is_not_utf8_is_still_json():
    name = b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    line = render({**EMPTY, "audio_filepath": name}, "json")
    assert json.loads(line.encode("utf-8"))["audio_filepath"] == name


def test_srt_numbers_cues_and_breaks_at_pauses():
    blocks = render(RESULT, "srt").strip().split("\n\n")
    assert blocks[0] == "1\n00:00:00,040 --> 00:00:00,900\nhello <old>"
    assert blocks[1] == "2\n00:00:03,000 --> 00:00:03,400\nworld"
    assert blocks[2].startswith("3\n01:00:00,000 --> 01:00:00,500")


def test_vtt_has_a_header_and_escapes_markup():
    text = render(RESULT, "vtt")
    assert text.startswith("WEBVTT\n\n00:00:00.040 --> 00:00:00.900\nhello &lt;old&gt;\n\n")


def test_ctm_has_five_fields_a_line():
    lines = render(RESULT, "ctm", "a b").splitlines()
    assert lines[0] == "a_b 1 0.040 0.360 hello"
    assert all(re.fullmatch(r"\S+ 1 \d+\.\d{3} \d+\.\d{3} \S+", line) for line in lines)


def test_txt_stands_alone_or_after_a_name():
    assert render(RESULT, "txt") == RESULT["text"] + "\n"
    assert render(RESULT, "txt", "a.wav") == f"a.wav\t{RESULT['text']}\n"


def test_recordings_without_words_are_well_formed():
    assert [render(EMPTY, kind) for kind in ("txt", "srt", "vtt", "ctm")] == [
        "\n",
        "",
        "WEBVTT\n\n",
        "",
    ]
    assert json.loads(render(EMPTY, "json"))["text"] == ""
    assert set(FORMATS) == {"txt", "json", "srt", "vtt", "ctm"}


def test_cues_stay_short_and_hold_every_word():
    words = [{"word": "word" * 3, "start": 0.4 * i, "end": 0.4 * i + 0.3} for i in range(100)]
    found = cues(words)
    assert " ".join(text for _, _, text in found) == " ".join(w["word"] for w in words)
    assert all(end - start <= 7.0 and len(text) <= 84 for start, end, text in found)
    assert all(a[1] <= b[0] for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize(
    "seconds, want", [(0, "00:00:00,000"), (59.9996, "00:01:00,000"), (360001.5, "100:00:01,500")]
)
def test_clock_carries(seconds, want):
    assert clock(seconds, ",") == want
