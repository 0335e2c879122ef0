"""Recordings of any length: overlapping windows of samples, and one token sequence from them.

Windows start at multiples of an output frame, so that frame numbers of all windows count on one
clock. Two windows' tokens are joined at a token on which both agree, near the middle of their
overlap; where they agree on none, at a frame between words of both, as far from any token and from
the windows' ends as can be. Tokens without times are joined at the longest text that the end of one
window and the beginning of the next have in common.
"""

import bisect
import dataclasses
import difflib
import functools
import math
import operator

import numpy as np

AGREE = 4  # frames by which two windows may differ about the start of the same token
SEAM_JITTER = 2  # frames that a seam between tokens keeps clear of them, where there is room
SEAM_CLEAR = 12  # frames: more silence than this around a seam makes it no better
SHARED_LETTERS = 4  # fewer letters in common, without times, are chance


@dataclasses.dataclass(frozen=True)
class Windows:
    """How recordings are cut; all in samples. `frame` divides `length` and `overlap`."""

    length: int
    overlap: int
    frame: int

    @classmethod
    def of(cls, seconds, overlap_seconds, sample_rate, frame):
        """Windows of at least so many seconds; the overlap is at most a quarter of them."""
        length = max(8, math.ceil(seconds * sample_rate / frame - 1e-6))
        overlap = min(max(2, round(overlap_seconds * sample_rate / frame)), length // 4)
        return cls(length * frame, overlap * frame, frame)

    @property
    def hop(self):
        return self.length - self.overlap

    def cut(self, blocks):
        """Yields (first sample, window f32[<= length]) of a recording given in blocks f32[*].

        A recording no longer than a window stays whole. Holds little more than one window. At
        least one window comes, empty if the recording is.
        """
        kept, start = np.zeros(0, np.float32), 0
        for block in blocks:
            kept = np.concatenate([kept, block])
            while len(kept) > self.length:
                yield start, kept[: self.length]
                kept, start = kept[self.hop :], start + self.hop
        yield start, kept


def join(pieces, windows, tokenizer):
    """Tokens of the whole recording from the tokens of its windows.

    Args:
      pieces: [(first sample, tokens, start_frame, end_frame, ...)] in order, frames counted from
        each window's own start, without padding; a further column holds durations in frames.
      windows: the Windows that made them.
      tokenizer: with `.piece(id)`; a leading space begins a word.

    Returns:
      (tokens, start_frame, end_frame, ...) as lists, frames counted from the recording's start. No
      token of a window reaches beyond the seam at which the next one takes over.
    """
    whole, width, by_start = [], len(pieces[0]) - 1, operator.itemgetter(1)
    for first, *columns in pieces:
        shift = first // windows.frame
        items = [
            (int(token), int(start) + shift, int(end) + shift, *map(int, rest))
            for token, start, end, *rest in zip(*columns, strict=True)
        ]
        if first > 0:
            high = shift + windows.overlap // windows.frame
            near = bisect.bisect_left(whole, shift - SEAM_CLEAR, key=by_start)
            shared = find_shared(whole[near:], items, shift, high, tokenizer)
            if shared:
                left, right = near + shared[0], shared[1]
                seam, word_ends = items[right][1], False
            else:
                seam, word_ends = find_seam(whole[near:], items, shift, high, tokenizer)
                left, right = (bisect.bisect_left(x, seam, key=by_start) for x in (whole, items))
            del whole[left:]
            items = items[right:]
            for n in range(len(whole) - 1, -1, -1):
                token, start, end, *rest = whole[n]
                if end <= seam and start < seam - SEAM_CLEAR:
                    break
                start = min(start, seam)
                rest = [min(duration, seam - start) for duration in rest]
                whole[n] = (token, start, min(end, seam), *rest)
            if word_ends and _runs_on(whole, items, tokenizer):
                whole.append((space_token(tokenizer), seam, seam, *[0] * (width - 3)))
        whole += items
    return tuple(map(list, zip(*whole, strict=True))) or tuple([] for _ in range(width))


def timed(pieces):
    """Whether every token of `join`'s pieces has a time: a model without them gives frames of
    -1."""
    return all(min(starts, default=0) >= 0 for _, _, starts, *_ in pieces)


def join_texts(pieces, windows, tokenizer):
    """Tokens of the whole recording from those of windows that tell no times.

    About as many tokens lie in an overlap as its share of a window; among twice as many, and a
    few, the longest run that both windows have is looked for, and its middle is the seam. Without
    one of SHARED_LETTERS the windows follow each other whole, with a space between them.

    Args:
      pieces: [(first sample, tokens, ...)] in order; columns after the tokens are not read.
      windows, tokenizer: as in `join`.

    Returns:
      [(first sample, tokens that come from this window)], one for each piece.
    """
    found, share = [], windows.overlap / windows.length
    for first, tokens, *_ in pieces:
        new = [int(token) for token in tokens]
        if found:
            left = found[-1][1]
            near = max(0, len(left) - round(2 * share * len(left)) - 8)
            head = new[: round(2 * share * len(new)) + 8]
            cut = _shared_text(left[near:], head, tokenizer)
            if cut:
                del left[near + cut[0] :]
                new = new[cut[1] :]
            elif _runs_on([(t,) for t in left[-1:]], [(t,) for t in new[:1]], tokenizer):
                left.append(space_token(tokenizer))
        found.append((first, new))
    return found


def _shared_text(left, right, tokenizer):
    """(index in left, index in right) of the middle of the longest run that both have, or None.

    Of runs of as many letters, the one nearest to the end of left and the beginning of right.
    """
    best = None
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for a, b, size in matcher.get_matching_blocks():
        letters = sum(len(tokenizer.piece(token).strip()) for token in right[b : b + size])
        key = letters, -(len(left) - a - size) - b
        if letters >= SHARED_LETTERS and (best is None or key > best[0]):
            best = key, a + size // 2, b + size // 2
    return best and best[1:]


def _runs_on(left, right, tokenizer):
    """Whether words would run together between items, and there is a token to part them."""
    if not left or not right or space_token(tokenizer) is None:
        return False
    before, after = tokenizer.piece(left[-1][0]), tokenizer.piece(right[0][0])
    return not before[-1:].isspace() and not after[:1].isspace()


def find_shared(left, right, low, high, tokenizer):
    """(index in left, index in right) of a token that both windows have, or None.

    Items are (token, start frame, end frame, ...) in order; the windows overlap between the frames
    low and high. The token lies in a run that difflib finds in both, and its starts differ by at
    most AGREE frames; of those it is the one nearest the middle of (low, high), but one that begins
    a word may be an eighth of that span further off. A seam in time tells less: where tokens touch
    and the windows differ by a frame or two, it loses or doubles one.
    """
    first = bisect.bisect_left(left, low - AGREE, key=lambda item: item[1])
    last = bisect.bisect_right(right, high + AGREE, key=lambda item: item[1])
    ids = [item[0] for item in left[first:]], [item[0] for item in right[:last]]
    margin, middle = (high - low) // 8, (low + high) // 2
    best = None
    for run in difflib.SequenceMatcher(None, *ids, autojunk=False).get_matching_blocks():
        for a, b in zip(range(first + run.a, first + run.a + run.size), range(run.b, last)):
            off = abs(right[b][1] - middle)
            if abs(left[a][1] - right[b][1]) > AGREE or off > (high - low) // 2 - margin:
                continue
            piece = tokenizer.piece(right[b][0])
            if not piece.strip():  # where a space stands is nobody's guess
                continue
            spaced = not b or not tokenizer.piece(right[b - 1][0]).strip()
            cost = off if spaced or piece[0].isspace() else off + margin
            if best is None or cost < best[0]:
                best = cost, a, b
    return best and best[1:]


def find_seam(left, right, low, high, tokenizer):
    """(frame, between words): where in (low, high) to go from `left`'s tokens to `right`'s.

    Clear of tokens by SEAM_JITTER frames, since the windows may disagree by as much; then between
    words of both; then with the most silence around it, up to SEAM_CLEAR frames; then nearest to
    the middle, where both windows see the most context. Arguments as `find_shared`'s.
    """
    margin = (high - low) // 8
    seams = np.arange(low + margin, max(high - margin, low + margin) + 1)
    rooms, gaps = zip(*(_around(items, seams, tokenizer) for items in (left, right)), strict=True)
    room, between = np.minimum(*rooms), np.logical_and(*gaps)
    off_centre = np.abs(seams - (low + high) // 2)
    clear, silence = np.minimum(room, SEAM_JITTER), np.minimum(room, SEAM_CLEAR)
    best = np.lexsort((off_centre, -silence, ~between, -clear))[0]
    return int(seams[best]), bool(between[best])


def _around(items, seams, tokenizer):
    """Frames from each seam to the nearest token (negative inside one); whether a word ends there.

    Spaces are no tokens here. Before the first and after the last token words have ended.
    """
    starts, ends, gaps, spaced = [], [], [], True
    for token, start, end, *_ in items:
        piece = tokenizer.piece(token)
        if not piece.strip():
            spaced = spaced or bool(piece)
            continue
        starts.append(start)
        ends.append(end)
        gaps.append(spaced or piece[0].isspace())
        spaced = False
    after = np.searchsorted(np.array(starts, np.int64), seams, side="left")
    far = 1 << 30
    to_next = np.array([*starts, far])[after] - seams
    from_last = seams - np.array([-far, *ends])[after]
    return np.minimum(to_next, from_last), np.array([*gaps, True])[after]


@functools.cache
def space_token(tokenizer):
    """The id of the token that is a space alone; None if there is none."""
    pieces = (tokenizer.piece(token) for token in range(tokenizer.vocab_size))
    return next((token for token, piece in enumerate(pieces) if piece == " "), None)
