"""Greedy CTC decoding: a naive loop, independence of padding, words and times."""

import itertools

import jax
import numpy as np
import pytest

from jasr.decoding.ctc import ctc_greedy, words
from jasr.text import CharTokenizer, SentencePieceTokenizer


def naive(best, blank):
    """(token, first frame, frame after the last) of every run of one symbol."""
    t, found = 0, []
    for symbol, run in itertools.groupby(best):
        n = len(list(run))
        if symbol != blank:
            found.append((int(symbol), t, t + n))
        t += n
    return found


def rows_of(outputs):
    tokens, token_len, start, end = (np.asarray(x) for x in outputs)
    return [
        list(zip(tokens[b, :n].tolist(), start[b, :n].tolist(), end[b, :n].tolist(), strict=True))
        for b, n in enumerate(token_len)
    ]


def one_hot(paths, V):
    return np.eye(V, dtype=np.float32)[np.array(paths)]


def test_equals_the_naive_loop_for_any_blank():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((9, 30, 4)).astype(np.float32)
    lens = rng.integers(0, 31, 9).astype(np.int32)
    for blank in range(4):
        got = rows_of(jax.jit(ctc_greedy, static_argnums=2)(logits, lens, blank))
        want = [naive(x[:n].argmax(-1), blank) for x, n in zip(logits, lens, strict=True)]
        assert got == want


def test_padding_and_batch_mates_change_nothing():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4, 20, 5)).astype(np.float32)
    lens = np.array([20, 7, 0, 13], np.int32)
    wide = np.full((2, 33, 5), 9.0, np.float32)
    wide[0, :13], wide[1, :7] = logits[3, :13], logits[1, :7]
    together = rows_of(ctc_greedy(logits, lens))
    assert rows_of(ctc_greedy(wide, lens[[3, 1]])) == [together[3], together[1]]


def test_a_token_at_the_last_valid_frame_ends_there():
    got = rows_of(ctc_greedy(one_hot([[0, 1, 1, 1, 1, 2]], 3), np.array([4])))
    assert got == [[(1, 1, 4)]]


def test_what_follows_the_last_token_is_zero():
    tokens, token_len, start, end = ctc_greedy(one_hot([[0, 1, 0, 1]], 3), np.array([4]))
    assert token_len[0] == 2
    for values in (tokens, start, end):
        assert not np.any(np.asarray(values)[0, 2:])


TOKENIZER = CharTokenizer(("<blank>", " ", "a", "b"))


def test_words_run_from_their_first_to_their_last_character():
    tokens, starts, ends = [2, 3, 1, 3], [1, 4, 6, 9], [2, 5, 8, 11]
    assert words(TOKENIZER, tokens, starts, ends, 0.04) == [
        {"word": "ab", "start": 0.04, "end": 0.2},
        {"word": "b", "start": 0.36, "end": 0.44},
    ]


def test_leading_trailing_and_double_spaces_make_no_words():
    got = words(TOKENIZER, [1, 2, 1, 1, 3, 1], range(6), range(1, 7), 1.0)
    assert [w["word"] for w in got] == ["a", "b"]
    assert words(TOKENIZER, [1, 1], [0, 2], [1, 3], 1.0) == []
    assert words(TOKENIZER, [], [], [], 1.0) == []


def test_words_joined_are_the_text_and_times_are_monotone():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((5, 60, 4)).astype(np.float32)
    outputs = ctc_greedy(logits, np.full(5, 60))
    for row in rows_of(outputs):
        tokens, starts, ends = zip(*row, strict=True)
        found = words(TOKENIZER, tokens, starts, ends, 0.08)
        assert " ".join(w["word"] for w in found) == TOKENIZER.decode(tokens)
        clock = [t for w in found for t in (w["start"], w["end"])]
        assert clock == sorted(clock) and clock[-1] <= 60 * 0.08


def test_equals_nemo(goldens):
    """Texts are NeMo's; its word ends are the frames at which our words' last tokens start."""
    pytest.importorskip("sentencepiece")
    g = np.load(goldens / "ctc" / "nemo_tiny_ctc.npz")
    tokenizer = SentencePieceTokenizer(g["tokenizer_model"].tobytes())
    assert tokenizer.vocab_size == g["log_probs"].shape[-1]
    rows = rows_of(ctc_greedy(g["log_probs"], g["logit_len"], tokenizer.blank_id))
    assert [tokenizer.decode([t for t, _, _ in row]) for row in rows] == list(g["texts"])
    tokens, starts, _ = zip(*rows[0], strict=True)
    found = words(tokenizer, tokens, starts, starts, 1.0)
    assert [w["word"] for w in found] == list(g["words"])
    assert [w["end"] for w in found] == list(g["word_ends"])
