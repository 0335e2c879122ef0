"""Drawing tokens, against loops over the rows."""

import jax
import numpy as np

from jasr.decoding.sampling import sample, top_k, top_p

LOGITS = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)


def kept(logits):
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits)]


def test_the_k_largest_stay():
    for k in (1, 3, 9, 12):
        assert kept(top_k(LOGITS, k)) == [set(np.argsort(-row)[:k].tolist()) for row in LOGITS]
    assert kept(top_k(LOGITS, 0)) == [set(range(9))] * 5
    tied = np.array([[1.0, 2.0, 1.0, 0.0]], np.float32)
    assert kept(top_k(tied, 2)) == [{0, 1, 2}]


def test_the_fewest_whose_probabilities_reach_p_stay():
    def naive(row, p):
        odds = np.exp(row - row.max())
        chosen, total = set(), 0.0
        for token in np.argsort(-row):
            chosen.add(int(token))
            total += odds[token] / odds.sum()
            if total >= p:
                return chosen
        return chosen

    p = np.array([0.0, 0.3, 0.6, 0.9, 1.0], np.float32)
    assert kept(top_p(LOGITS, p)) == [naive(row, x) for row, x in zip(LOGITS, p, strict=True)]


def test_without_temperature_the_most_likely_comes_and_with_it_tokens_by_their_share():
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = np.tile(np.log(np.array([[0.1, 0.6, 0.05, 0.25]], np.float32)), (4000, 1))
    hot = np.arange(4000) % 2
    draw = jax.jit(lambda p, k: sample(keys, logits, hot, k=k, p=p), static_argnums=1)
    found = np.asarray(draw(1.0, 0))
    assert np.all(found[::2] == 1)
    share = np.bincount(found[1::2], minlength=4) / 2000
    np.testing.assert_allclose(share, [0.1, 0.6, 0.05, 0.25], atol=0.04)
    assert set(np.asarray(draw(0.8, 0)).tolist()) == {1, 3}
    assert set(np.asarray(draw(1.0, 3)).tolist()) == {0, 1, 3}
    one = sample(keys[7:8], logits[7:8], 1.0)
    assert one[0] == found[7]  # a row's token depends on its own key and logits
