"""NeMo's timestamps of one decoded row: tokens, words and segments with offsets in frames.

For comparisons with NeMo and for programs that read its dicts: the same numbers, its peculiarities
included. `decoding.ctc.words` is this project's own clock.
"""

import functools
import re
import unicodedata

KINDS = ("ctc", "rnnt", "tdt")
SEPARATORS = (".", "?", "!")
# Pieces whose characters are no punctuation marks of the language: special ones, those that begin
# a word (SentencePiece's mark or the space that stands for it here), continuations, spaces.
_SPECIAL = re.compile(r"\[.*\]$|<.*>$|##|[\u2581 ]|\s*$")


def timestamps(
    kind,
    tokens,
    start_frame,
    end_frame,
    tokenizer,
    *,
    durations=None,
    window_stride=0.01,
    subsampling=8,
    separators=SEPARATORS,
    segment_gap=None,
):
    """The dict that NeMo's `transcribe(timestamps=True)` puts into a hypothesis.

    Args:
      kind: "ctc", "rnnt" or "tdt".
      tokens, start_frame, end_frame, durations: one row of `ctc_greedy` or of a transducer's
        decoder, sequences of equal length without padding; durations for "tdt" only.
      tokenizer: with `.piece(id)` -> str, a leading space or U+2581 beginning a word,
        `.decode(ids)` -> text, and `.vocab_size`.
      window_stride: seconds between frames of features; subsampling: of the encoder. With
        window_stride None there are offsets alone, as from NeMo's decoders.
      separators: a word that is or ends with one of them ends a segment.
      segment_gap: frames of silence that end a segment instead; as in NeMo, separators then count
        only in a segment's first word.

    Returns:
      {"timestep": [frame], "char": [...], "word": [...], "segment": [...]}; the items are
      {"char" | "word" | "segment", "start_offset", "end_offset", "start", "end"}, where a char's
      text is in a list of one but for CTC. `timestep` are the frames of the tokens, for CTC all
      frames that are not blank.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")
    if kind == "tdt" and durations is None:
        raise ValueError("a TDT's timestamps need its durations")
    tokens, starts, ends = ([int(x) for x in xs] for xs in (tokens, start_frame, end_frame))
    marks = punctuation(tokenizer)
    texts = [tokenizer.decode([token]) for token in tokens]
    if kind == "ctc":
        spans = _ctc_spans(texts, starts, marks)
        steps = [t for s, e in zip(starts, ends, strict=True) for t in range(s, e)]
    elif kind == "rnnt":
        spans, steps = [(t, t + 1) for t in starts], starts
    else:
        spans, steps = _tdt_spans(texts, starts, durations, marks), starts
    chars = [_item("char", text, *span) for text, span in zip(texts, spans, strict=True)]
    words = word_offsets(tokens, chars, tokenizer, marks)
    segments = segment_offsets(words, separators, segment_gap)
    if kind != "ctc":
        chars = [{**item, "char": [item["char"]]} for item in chars]
    found = {"timestep": steps, "char": chars, "word": words, "segment": segments}
    if window_stride is not None:
        for item in (*chars, *words, *segments):
            # NeMo's order of products, which decides the last bit
            item["start"] = item["start_offset"] * window_stride * subsampling
            item["end"] = item["end_offset"] * window_stride * subsampling
    return found


def text(tokens, tokenizer):
    """The text of the tokens as NeMo writes it: no space before the vocabulary's punctuation."""
    decoded = tokenizer.decode([int(token) for token in tokens])
    marks = punctuation(tokenizer)
    if not marks:
        return decoded
    return re.sub(rf"\s([{re.escape(''.join(sorted(marks)))}])", r"\1", decoded)


@functools.cache
def punctuation(tokenizer):
    """The set of punctuation marks (Unicode P) in pieces that are neither special nor initial."""
    pieces = (tokenizer.piece(token) for token in range(tokenizer.vocab_size))
    return frozenset(
        c
        for piece in pieces
        if not _SPECIAL.match(piece)
        for c in piece
        if unicodedata.category(c).startswith("P")
    )


def _item(name, what, start, end):
    return {name: what, "start_offset": start, "end_offset": end}


def _ctc_spans(texts, starts, marks):
    """From the token before to the token's own first frame; what begins with a mark is empty."""
    before = [max(0, starts[0] - 1), *starts[:-1]] if starts else []
    return [
        (start, start if i > 0 and text[:1] in marks else end)
        for i, (text, start, end) in enumerate(zip(texts, before, starts, strict=True))
    ]


def _tdt_spans(texts, starts, durations, marks):
    """As long as predicted, marks empty at the end of the token before, which may be far off."""
    spans = []
    for text, start, duration in zip(texts, starts, durations, strict=True):
        end = start + int(duration)
        if spans and text in marks:
            start = end = spans[-1][1]
        spans.append((start, end))
    return spans


def word_offsets(tokens, chars, tokenizer, marks):
    """[{"word", "start_offset", "end_offset"}] of tokens and their char items.

    A token whose piece is not its text (the mark of a word's beginning is gone) begins a word,
    unless its text is a punctuation mark, which always belongs to the word before it.
    """
    words, open_ids, first = [], [], 0

    def close(last):
        if open_ids:
            span = chars[first]["start_offset"], chars[last]["end_offset"]
            words.append(_item("word", tokenizer.decode(open_ids), *span))

    for i, (token, item) in enumerate(zip(tokens, chars, strict=True)):
        text, mark = item["char"], item["char"] in marks
        if tokenizer.piece(token) != text and not mark:
            close(i - 1)
            open_ids, first = ([token], i) if text != " " else ([], first)
        elif mark and not open_ids and words:
            words[-1]["end_offset"] = item["end_offset"]
            words[-1]["word"] = words[-1]["word"].removesuffix(" ") + text
        elif mark and open_ids:
            if tokenizer.piece(open_ids[-1]) in ("\u2581", " ", "_"):
                open_ids = open_ids[:-1]
            open_ids = [*open_ids, token]
        else:
            first = first if open_ids else i
            open_ids = [*open_ids, token]
    if words:
        words[0]["start_offset"] = chars[0]["start_offset"]
    elif open_ids:
        first = 0
    close(len(chars) - 1)
    return words


def segment_offsets(words, separators=SEPARATORS, gap=None):
    """[{"segment", "start_offset", "end_offset"}] of word items; words joined by spaces."""
    groups = [[]]
    for i, item in enumerate(words):
        word, within = item["word"], bool(gap and groups[-1])
        if within and item["start_offset"] - words[i - 1]["end_offset"] >= gap:
            groups.append([])
        groups[-1].append(item)
        if not within and word and (word[-1] in separators or word in separators):
            groups.append([])
    return [
        _item("segment", " ".join(w["word"] for w in g), g[0]["start_offset"], g[-1]["end_offset"])
        for g in groups
        if g
    ]
