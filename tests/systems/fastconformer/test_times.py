"""NeMo's timestamps: its own dicts, and the rules for marks, words and segments one by one."""

import json

import numpy as np
import pytest

from jasr.decoding.ctc import ctc_greedy
from jasr.decoding.transducer import greedy
from jasr.systems.fastconformer.times import punctuation, segment_offsets, text, timestamps
from jasr.text import SentencePieceTokenizer
from tests.decoding.transducers import BLANK, DURATIONS, jit, lstm_steps


class Pieces:
    """A tokenizer of given pieces, "_" for the mark of a word's beginning."""

    def __init__(self, *pieces):
        self.pieces = [piece.replace("_", "\u2581") for piece in pieces]
        self.vocab_size = len(pieces)

    def piece(self, token):
        return self.pieces[token]

    def decode(self, tokens):
        return "".join(self.pieces[t] for t in tokens).replace("\u2581", " ").strip()


@pytest.fixture(scope="module")
def nemo(goldens):
    """{model: [{"text", "ids", "frames", "durations", "timestamp"}]} of NeMo's transcribe."""
    return json.loads((goldens / "nemo/decoding/timestamps.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(goldens):
    """The tokenizer of all the goldens' models."""
    pytest.importorskip("sentencepiece")
    g = np.load(goldens / "ctc" / "nemo_tiny_ctc.npz")
    return SentencePieceTokenizer(g["tokenizer_model"].tobytes())


def rows(outputs, names):
    """Per row the columns `names` of a decoder's dict, cut to their length."""
    out = {name: np.asarray(x) for name, x in outputs.items()}
    return [[out[name][b, :n] for name in names] for b, n in enumerate(out["token_len"])]


@pytest.mark.parametrize("name", ["tiny_rnnt", "tiny_hybrid_tdt"])
def test_a_transducers_timestamps_are_nemos(goldens, nemo, tokenizer, name):
    g = dict(np.load(goldens / f"nemo/decoding/{name}.npz"))
    steps, durations = lstm_steps(g), DURATIONS[name]
    out = jit(lambda enc, n: greedy(enc, n, steps, blank=BLANK, durations=durations))(
        g["real/enc_proj"], g["real/enc_len"]
    )
    columns = rows(out, ("tokens", "start_frame", "end_frame", "durations"))
    for want, (tokens, starts, ends, lasting) in zip(nemo[name], columns, strict=True):
        kind = "rnnt" if durations is None else "tdt"
        got = timestamps(kind, tokens, starts, ends, tokenizer, durations=lasting)
        assert got == want["timestamp"]
        assert text(tokens, tokenizer) == want["text"]


def test_a_tdts_timestamps_are_nemos(nemo, tokenizer):
    for want in nemo["tiny_tdt"]:
        lasting, frames = want["durations"], want["frames"]
        got = timestamps("tdt", want["ids"], frames, frames, tokenizer, durations=lasting)
        assert got == want["timestamp"]


def test_a_ctc_models_timestamps_are_nemos(goldens, nemo, tokenizer):
    g = np.load(goldens / "ctc" / "nemo_tiny_ctc.npz")
    names = ("tokens", "token_len", "start_frame", "end_frame")
    out = dict(zip(names, ctc_greedy(g["log_probs"], g["logit_len"], BLANK), strict=True))
    columns = rows(out, ("tokens", "start_frame", "end_frame"))
    for want, (tokens, starts, ends) in zip(nemo["tiny_ctc"], columns, strict=True):
        assert timestamps("ctc", tokens, starts, ends, tokenizer) == want["timestamp"]
        assert text(tokens, tokenizer) == want["text"]


def test_punctuation_is_that_of_pieces_that_are_not_special(tokenizer):
    pieces = Pieces("<un.k>", "[a,b]", "##!", "_?", "a'b", ".", "; ", "$", "")
    assert punctuation(pieces) == set("'.;")
    assert punctuation(tokenizer) == set("'.,\"!:;?")


MARKED = Pieces("_yes", "_n", "o", ".", "_", "?", ".'")
YES, N, O, STOP, MARK, ASK, BOTH = range(7)


def tdt(tokens, frames, durations, **options):
    return timestamps(
        "tdt", tokens, frames, frames, MARKED, durations=durations, window_stride=None, **options
    )


def test_a_mark_ends_with_the_token_before_and_the_word_and_the_segment_with_it():
    got = tdt([YES, STOP, N, O, ASK], [0, 9, 12, 14, 20], [2, 3, 1, 2, 4])
    spans = [(item["start_offset"], item["end_offset"]) for item in got["char"]]
    assert spans == [(0, 2), (2, 2), (12, 13), (14, 16), (16, 16)]
    assert got["word"] == [
        {"word": "yes.", "start_offset": 0, "end_offset": 2},
        {"word": "no?", "start_offset": 12, "end_offset": 16},
    ]
    assert [item["segment"] for item in got["segment"]] == ["yes.", "no?"]
    assert got["segment"][1]["start_offset"] == 12 and got["timestep"] == [0, 9, 12, 14, 20]


def test_a_mark_after_a_space_loses_it_and_a_leading_mark_is_a_words_beginning():
    assert [w["word"] for w in tdt([YES, MARK, STOP], [0, 1, 2], [1, 1, 1])["word"]] == ["yes", "."]
    assert [w["word"] for w in tdt([STOP, N, O], [0, 1, 2], [1, 1, 1])["word"]] == [".", "no"]
    assert tdt([STOP, N], [5, 7], [1, 1])["char"][0]["start_offset"] == 5


def test_a_lone_space_begins_the_next_word_at_its_own_frame():
    got = tdt([YES, MARK, N, O], [0, 3, 6, 8], [1, 1, 1, 1])["word"]
    assert [(w["word"], w["start_offset"]) for w in got] == [("yes", 0), ("", 3), ("no", 6)]


def test_ctc_marks_are_empty_by_their_first_character_and_tdts_by_the_whole_token():
    got = timestamps("ctc", [YES, BOTH], [2, 6], [4, 8], MARKED, window_stride=None)
    spans = [(item["start_offset"], item["end_offset"]) for item in got["char"]]
    assert spans == [(1, 2), (2, 2)] and got["timestep"] == [2, 3, 6, 7]
    spans = [item["end_offset"] for item in tdt([YES, BOTH], [2, 6], [1, 2])["char"]]
    assert spans == [3, 8]


def test_segments_end_at_separators_or_where_the_silence_is_long():
    words = [
        {"word": word, "start_offset": start, "end_offset": start + 2}
        for word, start in [("a.", 0), ("b", 2), ("?", 4), ("c", 20), ("d.", 23)]
    ]
    assert [s["segment"] for s in segment_offsets(words)] == ["a.", "b ?", "c d."]
    found = segment_offsets(words, gap=5)
    assert [s["segment"] for s in found] == ["a.", "b ?", "c d."]
    assert [(s["start_offset"], s["end_offset"]) for s in found] == [(0, 2), (2, 6), (20, 25)]
    assert [s["segment"] for s in segment_offsets(words[1:], gap=100)] == ["b ? c d."]
    assert segment_offsets([]) == []


def test_text_has_no_space_before_marks():
    assert text([YES, MARK, ASK, N, O], MARKED) == "yes? no"


def test_nothing_decoded_has_no_timestamps():
    for kind in ("ctc", "rnnt", "tdt"):
        got = timestamps(kind, [], [], [], MARKED, durations=[])
        assert got == {"timestep": [], "char": [], "word": [], "segment": []}


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="durations"):
        timestamps("tdt", [YES], [0], [1], MARKED)
    with pytest.raises(ValueError, match="kind 'aed'"):
        timestamps("aed", [YES], [0], [1], MARKED)
