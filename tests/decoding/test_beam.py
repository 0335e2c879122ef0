"""Beam search: exact sums when wide, greedy when narrow, never below greedy, rows on their own."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.decoding.beam import beam_search
from jasr.decoding.transducer import greedy
from tests.decoding.transducers import (
    BLANK,
    DURATIONS,
    jit,
    lstm_steps,
    random_encoder,
    random_steps,
    rows_of,
)

TDT = (0, 1, 2)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()


def exhaustive(enc, n_frames, steps, blank, durations, max_symbols):
    """{label sequence: log-probability} of all sequences of one row, summed over their paths."""

    @functools.cache
    def prediction(prefix):
        if not prefix:
            return steps.predict(jnp.array([blank]), steps.initial_state(1))
        return steps.predict(jnp.array([prefix[-1]]), prediction(prefix[:-1])[1])

    def arcs(t, prefix):
        z = np.asarray(steps.output(jnp.asarray(enc[None, t]), prediction(prefix)[0])[0])
        symbols = log_softmax(z[: blank + 1])
        for k in range(blank + 1):
            if durations is None:
                yield k, int(k == blank), symbols[k]
            else:
                for d, p in zip(durations, log_softmax(z[blank + 1 :]), strict=True):
                    if k != blank or d > 0:
                        yield k, d, symbols[k] + p

    at = collections.defaultdict(lambda: -np.inf)  # (frame, labels at it, prefix): log-probability
    done = collections.defaultdict(lambda: -np.inf)
    at[0, 0, ()] = 0.0
    while at:
        t, here, prefix = min(at)
        score = at.pop((t, here, prefix))
        if t >= n_frames:
            done[prefix] = np.logaddexp(done[prefix], score)
            continue
        for k, d, log_prob in arcs(t, prefix):
            longer = prefix if k == blank else (*prefix, k)
            if k == blank or here < max_symbols:
                key = min(t + d, n_frames), here + 1 if d == 0 else 0, longer
                at[key] = np.logaddexp(at[key], score + log_prob)
    return dict(done)


def sequences(out, row):
    """[(labels, score)] of a row's hypotheses."""
    scores, lens = np.asarray(out["score"])[row], np.asarray(out["token_len"])[row]
    return [
        (tuple(np.asarray(out["tokens"])[row, k, :n].tolist()), float(s))
        for k, (n, s) in enumerate(zip(lens, scores, strict=True))
        if np.isfinite(s)
    ]


@pytest.mark.parametrize("durations", [None, TDT])
def test_a_wide_beam_is_the_exhaustive_search(durations):
    E, lens = 0 if durations is None else 3, np.array([3, 2, 0], np.int32)
    steps = random_steps(1, 2, E)
    enc = random_encoder(2, 3, 3)
    decode = jit(
        lambda enc, n: beam_search(
            enc,
            n,
            steps,
            blank=2,
            durations=durations,
            beam=300,
            max_symbols=2,
            expansion_gamma=np.inf,
            length_normalised=False,
        )
    )
    out = decode(enc, lens)
    for row, n in enumerate(lens):
        want = exhaustive(enc[row], n, steps, 2, durations, 2)
        got = dict(sequences(out, row))
        assert len(got) == len(sequences(out, row)) == len(want)
        assert got.keys() == want.keys()
        for labels, score in want.items():
            assert abs(got[labels] - score) < 1e-4
        assert sequences(out, row)[0][0] == max(want, key=want.get)
        scores = [s for _, s in sequences(out, row)]
        assert scores == sorted(scores, reverse=True)


LENS = np.array([12, 7, 0, 11, 1, 12], np.int32)
NAMES = ("tokens", "token_len", "start_frame", "end_frame", "durations", "full")


@functools.cache
def decoder(seed, durations, beam, max_symbols=10, **options):
    """A jitted beam search of four labels and random weights."""
    steps = random_steps(seed, 4, 0 if durations is None else len(durations))
    options = {"beam": beam, "max_symbols": max_symbols, "length_normalised": False, **options}
    return steps, jit(
        lambda enc, n: beam_search(enc, n, steps, blank=4, durations=durations, **options)
    )


def first(out):
    """The best sequences alone, as greedy's dict."""
    return {name: x[:, 0] for name, x in out.items()}


def assert_same(got, want):
    for name in NAMES:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize(("durations", "max_symbols"), [(None, 1), (TDT, 2)])
def test_a_beam_of_one_is_greedy(durations, max_symbols):
    steps, decode = decoder(max_symbols, durations, 1, max_symbols)
    enc = random_encoder(max_symbols, len(LENS), 12)
    want = jit(
        lambda enc, n: greedy(enc, n, steps, blank=4, durations=durations, max_symbols=max_symbols)
    )(enc, LENS)
    assert_same(first(decode(enc, LENS)), want)


@pytest.mark.parametrize("name", ["tiny_rnnt", "tiny_hybrid_tdt"])
def test_a_beam_of_one_is_greedy_in_nemos_models(goldens, name):
    g = dict(np.load(goldens / f"nemo/decoding/{name}.npz"))
    steps, options = lstm_steps(g), {"blank": BLANK, "durations": DURATIONS[name]}
    enc, lens = g["fuzz/enc_proj"], g["fuzz/enc_len"]
    narrow = jit(lambda enc, n: beam_search(enc, n, steps, beam=1, **options))(enc, lens)
    assert_same(first(narrow), jit(lambda enc, n: greedy(enc, n, steps, **options))(enc, lens))


def test_a_beam_of_four_finds_what_nemos_tdt_model_has_learnt(goldens):
    g = dict(np.load(goldens / "nemo/decoding/tiny_hybrid_tdt.npz"))
    options = {"blank": BLANK, "durations": DURATIONS["tiny_hybrid_tdt"]}
    out = jit(lambda enc, n: beam_search(enc, n, lstm_steps(g), **options))(
        g["real/enc_proj"], g["real/enc_len"]
    )
    ids = [[int(v) for v in row if v >= 0] for row in g["real/greedy/ids"]]
    assert [[r[0] for r in row] for row in rows_of(first(out))] == ids


@pytest.mark.parametrize("durations", [None, TDT])
def test_never_below_greedy_and_better_on_average(durations):
    narrow, wide = (decoder(3, durations, beam)[1] for beam in (1, 4))
    gains = []
    for seed in range(10):
        enc = random_encoder(seed, len(LENS), 12)
        score, greedy_score = (np.asarray(f(enc, LENS)["score"])[:, 0] for f in (wide, narrow))
        assert np.all(score >= greedy_score - 1e-4)
        gains.append(np.mean(score - greedy_score))
    assert np.mean(gains) > 0.3


def test_a_row_does_not_depend_on_its_batch_mates():
    _, decode = decoder(3, TDT, 4)
    enc = random_encoder(3, len(LENS), 12)
    together = decode(enc, LENS)
    for b, n in enumerate(LENS):
        wide = np.full((1, 17, 6), 9.0, np.float32)
        wide[0, :n] = enc[b, :n]
        alone = decode(wide, LENS[b : b + 1])
        np.testing.assert_allclose(alone["score"][0], together["score"][b], rtol=1e-4, atol=1e-4)
        for k in range(4):
            rows = [rows_of(jax.tree.map(lambda x, k=k: x[:, k], o)) for o in (alone, together)]
            assert rows[0][0] == rows[1][b]


@pytest.mark.parametrize("durations", [None, TDT])
def test_sequences_differ_and_their_frames_are_monotone_and_inside(durations):
    _, decode = decoder(3, durations, 4)
    out = decode(random_encoder(3, len(LENS), 12), LENS)
    for b in range(len(LENS)):
        found = [labels for labels, _ in sequences(out, b)]
        assert len(set(found)) == len(found) >= 1
    for k in range(4):
        for row, n in zip(rows_of(jax.tree.map(lambda x, k=k: x[:, k], out)), LENS, strict=True):
            starts = [r[1] for r in row]
            assert starts == sorted(starts)
            assert all(0 <= s <= e <= n and s < n for _, s, e, _ in row)


def test_normalised_by_length_longer_sequences_come_first():
    enc = random_encoder(3, len(LENS), 12)
    plain = decoder(3, None, 4)[1](enc, LENS)
    normal = decoder(3, None, 4, length_normalised=True)[1](enc, LENS)
    for b in range(len(LENS)):
        assert sorted(sequences(plain, b)) == sorted(sequences(normal, b))
        keys = [score / max(len(labels), 1) for labels, score in sequences(normal, b)]
        assert keys == sorted(keys, reverse=True)


def test_rows_without_frames_and_of_blanks_alone_are_empty():
    enc = random_encoder(5, len(LENS), 12)
    steps = random_steps(3, 4, bias=(0, 0, 0, 0, 50))
    silent = jit(lambda enc, n: beam_search(enc, n, steps, blank=4))
    for out in (silent(enc, LENS), decoder(3, None, 4)[1](enc, 0 * LENS)):
        assert not np.any(out["token_len"][:, 0])
        np.testing.assert_allclose(out["score"][:, 0], 0.0, atol=1e-4)
    nothing = np.zeros((2, 0, 6), np.float32), np.zeros(2, np.int32)
    assert jax.eval_shape(silent, *nothing)["tokens"].shape == (2, 4, 0)


def test_a_sequence_longer_than_the_capacity_says_so():
    steps, _ = decoder(3, None, 1)
    enc = random_encoder(3, len(LENS), 12)
    whole = jit(lambda enc, n: greedy(enc, n, steps, blank=4))(enc, LENS)
    L = int(np.sort(whole["token_len"])[-2])
    out = decoder(3, None, 1, capacity=L)[1](enc, LENS)
    assert np.array_equal(out["full"][:, 0], whole["token_len"] > L) and np.any(out["full"])
    for short, long in zip(rows_of(first(out)), rows_of(whole), strict=True):
        assert short == long[: len(short)]


def test_not_a_number_comes_to_an_end():
    _, decode = decoder(3, TDT, 4)
    out = decode(np.full((6, 12, 6), np.nan, np.float32), LENS)
    assert not np.any(np.asarray(out["token_len"])[LENS > 0])


def test_options_are_checked():
    enc, n, steps = random_encoder(1, 1, 2), jnp.array([2]), random_steps(0, 4)
    with pytest.raises(ValueError, match="at least 1"):
        beam_search(enc, n, steps, blank=4, beam=0)
    with pytest.raises(ValueError, match="above zero"):
        beam_search(enc, n, steps, blank=4, durations=(0,))
