"""Windows of long recordings, and one sequence of tokens from those of the windows."""

import numpy as np
import pytest

from jasr.recognition.longform import Windows, find_seam, join, join_texts, timed
from jasr.text import CharTokenizer

TOKENIZER = CharTokenizer(("<blank>", " ", "a", "b", "c", "d"))
FRAME = 10


def sentence(rng, frames, pause=4, space=True):
    """Tokens of random words with pauses over so many frames: [(token, start, end)]."""
    items, t = [], int(rng.integers(0, 5))
    while True:
        for _ in range(int(rng.integers(1, 6))):
            items.append((int(rng.integers(2, 6)), t, t + 1))
            t += int(rng.integers(2, 4))
        if t > frames:
            return [i for i in items if i[2] <= frames]
        if space:
            items.append((1, t, t + 1))
        t += int(rng.integers(1, pause + 1)) + 1


def seen(items, first, last):
    """What a perfect model makes of the frames from `first` up to `last`, in columns."""
    inside = [(t, s - first, e - first) for t, s, e in items if s >= first and e <= last]
    return [list(c) for c in zip(*inside, strict=True)] or [[], [], []]


def pieces_of(items, frames, windows):
    blocks = [np.zeros(frames * FRAME, np.float32)]
    return [
        (first, *seen(items, first // FRAME, (first + len(samples)) // FRAME))
        for first, samples in windows.cut(blocks)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_joined_windows_are_the_whole(seed):
    rng = np.random.default_rng(seed)
    items = sentence(rng, 900)
    windows = Windows(160 * FRAME, int(rng.integers(20, 40)) * FRAME, FRAME)
    pieces = pieces_of(items, 900, windows)
    assert len(pieces) > 5
    tokens, starts, ends = join(pieces, windows, TOKENIZER)
    assert TOKENIZER.decode(tokens) == TOKENIZER.decode([t for t, _, _ in items])
    letters = [i for i in zip(tokens, starts, ends, strict=True) if i[0] != 1]
    assert letters == [i for i in items if i[0] != 1]


def test_texts_without_spaces_are_joined_between_tokens():
    items = sentence(np.random.default_rng(0), 600, space=False)
    windows = Windows(100 * FRAME, 20 * FRAME, FRAME)
    tokens, _, _ = join(pieces_of(items, 600, windows), windows, TOKENIZER)
    assert tokens == [t for t, _, _ in items]


def test_words_on_both_sides_of_a_seam_stay_apart_whoever_hears_the_space():
    windows = Windows(40 * FRAME, 20 * FRAME, FRAME)
    left = [[2, 1], [5, 33], [6, 34]]  # "a" and a late space
    right = [[1, 3], [0, 18], [1, 19]]  # an early space and "b"
    tokens, _, _ = join([(0, *left), (200, *right)], windows, TOKENIZER)
    assert TOKENIZER.decode(tokens) == "a b"


def test_a_token_heard_a_little_earlier_by_the_next_window_comes_once():
    windows = Windows(40 * FRAME, 20 * FRAME, FRAME)
    left = [[2, 1, 3, 1, 4], [22, 25, 30, 33, 38], [23, 26, 31, 34, 39]]
    right = [[2, 1, 3, 1, 4], [1, 4, 8, 14, 19], [2, 5, 9, 15, 20]]
    tokens, _, _ = join([(0, *left), (200, *right)], windows, TOKENIZER)
    assert TOKENIZER.decode(tokens) == "a b c"


@pytest.mark.parametrize("zero", [False, True])
def test_tokens_that_touch_are_neither_lost_nor_doubled_though_windows_differ_by_a_frame(zero):
    class Syllables:  # nine of ten pieces begin a word
        vocab_size = 50
        piece = staticmethod(lambda n: f" {n}" if n % 10 else f"{n}")

    windows = Windows(100 * FRAME, 25 * FRAME, FRAME)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        steps = rng.integers(1, 5, 300)
        starts = np.cumsum(steps) - steps
        tokens = rng.integers(0, 50, 300)
        pieces = []
        for first, samples in windows.cut([np.zeros(int(starts[-1] + 5) * FRAME, np.float32)]):
            low, high = first // FRAME, (first + len(samples)) // FRAME
            inside = (starts >= low) & (starts + steps <= high)
            here = np.maximum.accumulate(starts[inside] + rng.integers(-1, 2, inside.sum()))
            here = np.clip(here - low, 0, None)
            ends = here if zero else np.append(here[1:], here[-1] + 1)
            pieces.append((first, tokens[inside], here, ends, ends - here))
        got, begin, end, durations = join(pieces, windows, Syllables())
        assert len(pieces) > 5 and got == tokens.tolist()
        assert np.all(np.diff(begin) >= -2) and np.all(np.array(durations) >= 0)
        assert np.all(np.array(begin) + durations <= np.array(end))


def test_the_last_token_before_a_seam_ends_there_by_every_column():
    windows = Windows(40 * FRAME, 20 * FRAME, FRAME)
    left = [[2, 3], [20, 26], [24, 34], [4, 8]]
    right = [[4], [10], [12], [2]]  # they agree on nothing
    tokens, starts, ends, durations = join([(0, *left), (200, *right)], windows, TOKENIZER)
    for start, end, duration in zip(starts, ends, durations, strict=True):
        assert start + duration <= end
    assert max(ends[:-1]) <= starts[-1]


def test_times_do_not_run_backwards_where_windows_differ_by_frames():
    windows = Windows(40 * FRAME, 20 * FRAME, FRAME)
    left = [[2, 3, 4, 5, 2], [20, 30, 31, 32, 33], [21, 31, 32, 33, 34]]
    right = [[2, 3, 4, 5, 2, 3], [0, 7, 8, 9, 10, 14], [1, 8, 9, 10, 11, 15]]  # 3 frames earlier
    tokens, starts, ends = join([(0, *left), (200, *right)], windows, TOKENIZER)
    assert tokens == [2, 3, 4, 5, 2, 3]
    assert starts == sorted(starts) and ends == sorted(ends)
    assert all(start <= end for start, end in zip(starts, ends, strict=True))


def test_seam_lies_in_the_silence_nearest_the_middle():
    left = [(2, 42, 43), (3, 58, 60)]
    seam, between_words = find_seam(left, [(4, 44, 45)], 40, 60, TOKENIZER)
    assert 45 <= seam <= 58 and not between_words
    seam, between_words = find_seam([(2, 10, 12)], [(3, 90, 91)], 40, 60, TOKENIZER)
    assert (seam, between_words) == (50, True)


def test_empty_windows_join():
    windows = Windows(40 * FRAME, 10 * FRAME, FRAME)
    nothing = [[], [], []]
    assert join([(0, *nothing), (300, *nothing)], windows, TOKENIZER)[0] in ([], [1])
    assert join([(0, *nothing)], windows, TOKENIZER) == ([], [], [])


def test_windows_without_times_are_joined_at_the_text_they_share():
    ids = np.random.default_rng(0).integers(2, 6, 600).tolist()
    windows = Windows(100 * FRAME, 20 * FRAME, FRAME)
    pieces = []
    for first, samples in windows.cut([np.zeros(600 * FRAME, np.float32)]):
        here = ids[first // FRAME : (first + len(samples)) // FRAME]
        here[:2] = here[-2:] = [2, 3]  # what is cut off at an edge is misheard
        pieces.append((first, here, [-1] * len(here), [-1] * len(here)))
    assert not timed(pieces)
    parts = join_texts(pieces, windows, TOKENIZER)
    assert [first for first, _ in parts] == [first for first, *_ in pieces]
    assert [token for _, tokens in parts for token in tokens][2:-2] == ids[2:-2]


def test_windows_without_times_that_share_nothing_follow_each_other():
    windows, none = Windows(40 * FRAME, 10 * FRAME, FRAME), []
    pieces = [(0, [2, 3]), (300, none), (600, [4]), (900, [5])]
    parts = join_texts([(first, ids, [-1] * len(ids)) for first, ids in pieces], windows, TOKENIZER)
    assert [ids for _, ids in parts] == [[2, 3], [], [4, 1], [5]]
    assert timed([(0, [], [], [])])


def test_windows_are_whole_frames_and_the_overlap_at_most_a_quarter():
    windows = Windows.of(2.0, 4.0, 16000, 640)
    assert windows.length % 640 == windows.overlap % 640 == 0
    assert windows.length >= 32000 and windows.overlap <= windows.length // 4


def test_a_recording_no_longer_than_a_window_stays_whole():
    windows = Windows(80, 20, 10)
    for length in (0, 1, 79, 80):
        cut = list(windows.cut([np.ones(length, np.float32)]))
        assert [(first, len(x)) for first, x in cut] == [(0, length)]
    assert len(list(windows.cut([np.ones(81, np.float32)]))) == 2


def test_windows_cover_every_sample_whatever_the_blocks():
    windows = Windows(80, 20, 10)
    x = np.arange(1000, dtype=np.float32)
    whole = list(windows.cut([x]))
    in_blocks = list(windows.cut(np.split(x, [1, 2, 300, 301, 999])))
    assert [f for f, _ in whole] == [f for f, _ in in_blocks] == list(range(0, 60 * len(whole), 60))
    for (first, a), (_, b) in zip(whole, in_blocks, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, x[first : first + 80])
    assert whole[-1][1][-1] == 999


def test_cutting_holds_little_more_than_a_window():
    windows, held = Windows(80, 20, 10), []

    def blocks():
        for _ in range(100):
            held.append(1)
            yield np.zeros(50, np.float32)

    for number, _ in enumerate(windows.cut(blocks())):
        assert len(held) * 50 - number * 60 <= 80 + 50
