"""The plan is a pure function of (settings, seed, epoch) and gives every utterance its turn."""

import dataclasses

import numpy as np
import pytest

from jasr.data import DataConfig, DataError, buckets, index, plan
from tests.corpora import layout, make_corpus

CFG = DataConfig(batch_duration=6.0, num_buckets=3, token_multiple=4)
RICH = dataclasses.replace(CFG, speeds=(0.9, 1.0, 1.1), concat=3, concat_share=0.7)
BINS = dataclasses.replace(
    CFG, bucket_duration_bins=((0.8, 8), (1.5, 12)), bucket_batch_size=(4, 2), speeds=(0.8, 1.0)
)


def made(sources, cfg=CFG, seed=0, **options):
    found = index.build(sources, layout(cfg), cfg)
    return plan.Plan(found, layout(cfg).for_set(0.0, found.exact), cfg, seed, **options)


def utterances(p, number):
    """Index numbers of an epoch in the order of its batches."""
    epoch = p.epoch(number)
    parts = np.split(epoch.rows.item, epoch.rows.first[1:-1])
    return np.concatenate([parts[g] for g in epoch.members])


@pytest.mark.parametrize("cfg", [CFG, RICH, BINS], ids=["plain", "rich", "bins"])
def test_every_utterance_comes_once_an_epoch_and_fits_its_bucket(corpus, cfg):
    manifest, entries = corpus
    p = made(manifest, cfg)
    for number in range(4):
        assert sorted(utterances(p, number)) == list(range(len(entries)))
        epoch = p.epoch(number)
        sizes = np.asarray([p.shapes[b] for b in epoch.bucket])
        counts = np.diff(epoch.begin)
        assert (counts <= sizes[:, 0]).all() and (counts > 0).all()
        assert (counts < sizes[:, 0]).sum() <= 1  # at most one batch is not full
        for j in range(len(counts)):
            inside = epoch.members[epoch.begin[j] : epoch.begin[j + 1]]
            assert (epoch.rows.sizes[inside].max(axis=0) <= sizes[j, 1:]).all()


def test_epochs_and_seeds_differ_and_repeat(corpus):
    a, b, other = made(corpus[0], RICH), made(corpus[0], RICH), made(corpus[0], RICH, seed=1)
    assert a.fingerprint == b.fingerprint != other.fingerprint
    orders = [tuple(utterances(x, n)) for x in (a, other) for n in range(3)]
    assert len(set(orders)) == 6
    assert [tuple(utterances(b, n)) for n in (2, 0, 1)] == [orders[2], orders[0], orders[1]]


@pytest.mark.parametrize("cfg", [CFG, RICH], ids=["plain", "rich"])
def test_a_position_is_a_batch_of_an_epoch_from_wherever_it_is_asked(corpus, cfg):
    p = made(corpus[0], cfg)
    want = [(e, j) for e in range(6) for j in range(len(p.epoch(e).bucket))]
    assert [p.locate(i) for i in range(len(want))] == want
    fresh = made(corpus[0], cfg)
    far = len(want) - 1
    assert fresh.locate(far) == want[far] and fresh.batch(far) == p.batch(far)
    with pytest.raises(DataError, match="0 or more"):
        p.locate(-1)


def test_epochs_never_repeat_though_their_rows_do(corpus):
    p = made(corpus[0], RICH)
    near, far = p.epoch(3), p.epoch(3 + plan.PERIOD)
    np.testing.assert_array_equal(near.rows.item, far.rows.item)
    assert len(near.bucket) == len(far.bucket)
    assert near.members.tolist() != far.members.tolist()
    ends = np.cumsum([len(p.epoch(e).bucket) for e in range(2 * plan.PERIOD + 3)])
    for e in (1, plan.PERIOD - 1, plan.PERIOD, 2 * plan.PERIOD + 2):
        assert made(corpus[0], RICH).locate(int(ends[e - 1])) == (e, 0)
        assert made(corpus[0], RICH).locate(int(ends[e]) - 1) == (e, len(p.epoch(e).bucket) - 1)


def test_the_fingerprint_names_what_changes_batches_and_nothing_else(corpus, tmp_path):
    base = made(corpus[0]).fingerprint
    for change in ({"num_threads": 7}, {"cache_audio": False}, {"max_bad_share": 0.5}):
        assert made(corpus[0], dataclasses.replace(CFG, **change)).fingerprint == base
    for change in ({"speeds": (1.0, 1.1)}, {"batch_duration": 9.0}, {"concat": 2}):
        assert made(corpus[0], dataclasses.replace(CFG, **change)).fingerprint != base
    copy, _ = make_corpus(tmp_path)  # the same files in another place
    assert made(copy).fingerprint == base
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(open(copy).readlines()[1:]))
    assert made(str(fewer)).fingerprint != base


def test_weights_set_the_shares_and_every_utterance_gets_its_turn(tmp_path):
    big, _ = make_corpus(tmp_path, 30, seed=1)
    small, _ = make_corpus(tmp_path, 10, seed=2)
    p = made([[big, 0.25], [small, 0.75]])
    counts = np.zeros(40, int)
    for number in range(4):
        drawn = utterances(p, number)
        assert len(drawn) == 40
        assert (p.source[drawn] == 0).sum() == 10 and (p.source[drawn] == 1).sum() == 30
        np.add.at(counts, drawn, 1)
        assert np.ptp(counts[:30]) <= 1 and np.ptp(counts[30:]) <= 1
    assert counts[:30].sum() == 40 and set(counts[30:]) == {12}
    first = len(p.epoch(0).bucket)
    fresh = made([[big, 0.25], [small, 0.75]])
    assert [fresh.locate(i) for i in (0, first - 1, first)] == [(0, 0), (0, first - 1), (1, 0)]
    assert fresh.batch(first) == p.batch(first)


def test_shares_sum_to_the_total():
    assert plan.shares((1, 1, 1), 10) == [4, 3, 3]
    assert plan.shares((0.2, 0.8), 5) == [1, 4]


def test_joined_rows_stay_within_their_limits(corpus):
    cfg = dataclasses.replace(CFG, concat=3, concat_duration=2.5, concat_gap=(0.1, 0.2))
    p = made(corpus[0], cfg)
    rows = p.epoch(0).rows
    sizes = np.diff(rows.first)
    assert sizes.max() > 1 and sizes.max() <= 3
    assert rows.sizes[:, 0].max() <= 2.5 * 16000
    gaps = p.layout.gaps(rows.words)
    assert gaps.min() >= 1600 and gaps.max() <= 3200 and len(set(gaps)) > 3
    alone, _ = p.layout.drawn(p.sizes[rows.item], rows.words)
    inner = np.add.reduceat(
        np.where(np.isin(np.arange(len(gaps)), rows.first), 0, gaps), rows.first[:-1]
    )
    np.testing.assert_array_equal(
        rows.sizes[:, 0], np.add.reduceat(alone[:, 0], rows.first[:-1]) + inner
    )
    alone = made(corpus[0], dataclasses.replace(cfg, concat_share=0.0)).epoch(0).rows
    assert np.diff(alone.first).max() == 1


def test_joining_fills_rows(corpus):
    one, two = (
        made(corpus[0]),
        made(corpus[0], dataclasses.replace(CFG, concat=2, concat_duration=3.0)),
    )
    assert len(two.epoch(0).rows.sizes) < 0.7 * len(one.epoch(0).rows.sizes)


def test_join_pairs_the_longest_with_the_longest_that_fits():
    sizes = np.stack([[30, 10, 65, 60, 20], np.ones(5, int)], axis=1)
    adds, may = np.tile([5, 1], (5, 1)), np.ones(5, bool)

    def labels(most, *limits):
        return plan.join(sizes, adds, may, most, np.array(limits)).tolist()

    assert labels(2, 100, 99) == [0, 1, 0, 3, 3]  # 65 + 30, 60 + 20, 10
    assert labels(4, 210, 99) == [0, 1, 0, 0, 0]
    assert labels(5, 210, 99) == [0, 0, 0, 0, 0]
    assert labels(2, 100, 2) == [0, 1, 2, 3, 4]


def test_best_edges_have_the_least_padding_of_all():
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.integers(1, 9, 50), rng.integers(20, 30, 30)])
    found = buckets.best_edges(samples, 3, 1, 30)

    def padded(edges):
        return sum(edges[np.searchsorted(edges, s)] for s in samples)

    best = min(padded([a, b, 30]) for a in range(1, 29) for b in range(a + 1, 30))
    assert found[-1] == 30 and len(found) == 3 and padded(found) == best
    assert buckets.best_edges(samples, 1, 1, 30) == [30]
    assert buckets.best_edges(np.array([7, 7]), 4, 2, 7) == [7]


def test_rows_with_much_text_move_to_a_longer_bucket(corpus):
    p = made(corpus[0], BINS)
    assert [s[::2] for s in p.shapes] == [(4, 8), (2, 12)]
    rows = p.epoch(0).rows
    crowded = (rows.sizes[:, 0] <= 0.8 * 16000) & (rows.sizes[:, 1] > 8)
    bucket = np.empty(len(rows.sizes), int)
    epoch = p.epoch(0)
    bucket[epoch.members] = np.repeat(epoch.bucket, np.diff(epoch.begin))
    assert crowded.any() and (bucket[crowded] == 1).all()


def test_explicit_bins_bound_what_is_used_also_when_stretched(corpus):
    cfg = dataclasses.replace(
        CFG, bucket_duration_bins=(0.7, 1.0), bucket_batch_size=(4,), speeds=(0.5,)
    )
    p = made(corpus[0], cfg)
    seconds = p.sizes[:, 0]
    assert seconds.max() <= 1.0 and len(seconds) < len(corpus[1])
    rows = p.epoch(0).rows
    speeds = p.layout.speeds(rows.words)
    assert set(speeds) == {0.5, 1.0}
    assert (speeds[seconds[rows.item] < 0.49] == 0.5).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_buckets": 0}, "num_buckets must be at least 1"),
        ({"speeds": ()}, "speeds must be factors above 0"),
        ({"speeds": (0.0, 1.0)}, "speeds must be factors above 0"),
        ({"concat_gap": (0.4, 0.1)}, "concat_gap"),
        ({"bucket_duration_bins": (2.0, 1.5)}, "must ascend"),
        ({"bucket_duration_bins": (1.0, 2.0), "bucket_batch_size": (4, 2, 1)}, "3 numbers"),
        ({"bucket_batch_size": (6,), "batch_multiple": 4}, "not multiples"),
        ({"bucket_duration_bins": ((1.0, 2), (2.0, 3))}, "max_tokens=3"),
        ({"check": "all"}, "data.check must be one of"),
        ({"batch_duration": 0.0}, "batch_duration must be above 0"),
    ],
)
def test_impossible_settings_say_what_is_wrong(corpus, change, said):
    with pytest.raises(DataError, match=said):
        made(corpus[0], dataclasses.replace(CFG, **change))


def test_batch_sizes_are_multiples(corpus):
    p = made(corpus[0], dataclasses.replace(CFG, batch_multiple=4, batch_duration=9.0))
    assert all(b % 4 == 0 and b for b, _, _ in p.shapes)
    small = made(corpus[0], dataclasses.replace(CFG, batch_multiple=4, batch_duration=1.0))
    assert [b for b, _, _ in small.shapes] == [4] * len(small.shapes)


def test_streams_of_random_numbers_do_not_change():
    assert plan.random_words(2, 1, 2).tolist() == [5527141919257688469, 1364028082176693913]
    assert plan.permutation(5, 0, 3).tolist() == [1, 3, 2, 4, 0]
