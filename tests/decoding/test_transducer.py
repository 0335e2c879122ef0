"""Greedy RNN-T and TDT: NeMo's results, a naive loop, independence of batch mates, and capacity."""

import functools
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.decoding.transducer import Steps, batch_axes, greedy
from jasr.interop import torch_file
from jasr.systems.fastconformer.transducer import Joint, JointConfig, Prediction, PredictionConfig
from tests.decoding.transducers import (
    BLANK,
    DURATIONS,
    jit,
    lstm_steps,
    naive_greedy,
    random_encoder,
    random_steps,
    rows_of,
)

# name in the goldens -> (which encoder output, strategy, max_symbols)
RUNS = {
    "real/greedy": ("real", "greedy", 10),
    "real/greedy_max_symbols1": ("real", "greedy", 1),
    "real/greedy_batch_max_symbols1": ("real", "greedy_batch", 1),
    "fuzz/greedy_ms10": ("fuzz", "greedy", 10),
    "fuzz/greedy_batch_ms10": ("fuzz", "greedy_batch", 10),
    "fuzz/greedy_ms2": ("fuzz", "greedy", 2),
    "fuzz/greedy_batch_ms2": ("fuzz", "greedy_batch", 2),
}


@functools.cache
def decoder(seed, V, durations, max_symbols=10, strategy="greedy_batch", window=None, bias=None):
    """A jitted greedy decoder of random weights."""
    steps = random_steps(seed, V, E=0 if durations is None else len(durations), bias=bias)
    options = {"max_symbols": max_symbols, "strategy": strategy, "window": window}
    return steps, jit(lambda enc, n: greedy(enc, n, steps, blank=V, durations=durations, **options))


@pytest.fixture(scope="module")
def nemo(goldens):
    """name -> a model's golden: its prediction and joint weights in torch's layout, encoder outputs
    through the joint's projection, and what NeMo decoded (from shared/goldens/nemo).
    """
    return functools.cache(lambda name: dict(np.load(goldens / f"nemo/decoding/{name}.npz")))


def unpad(x):
    return [[int(v) for v in row if v >= 0] for row in x]


@functools.cache
def nemo_run(nemo, name, strategy, max_symbols):
    """greedy's dict for both encoder outputs of a golden in one batch: two real rows, six fuzz."""
    g = nemo(name)
    real, fuzz = g["real/enc_proj"], g["fuzz/enc_proj"]
    enc = np.concatenate([real, np.pad(fuzz, ((0, 0), (0, len(real[0]) - len(fuzz[0])), (0, 0)))])
    options = {"strategy": strategy, "max_symbols": max_symbols, "normalise_over": "all"}
    return jit(
        lambda enc, n: greedy(
            enc, n, lstm_steps(g), blank=BLANK, durations=DURATIONS[name], **options
        )
    )(enc, np.concatenate([g["real/enc_len"], g["fuzz/enc_len"]]))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["tiny_rnnt", "tiny_hybrid_tdt"])
def test_equals_nemo(nemo, name, run):
    which, strategy, max_symbols = RUNS[run]
    part = slice(0, 2) if which == "real" else slice(2, 8)
    g, out = (
        nemo(name),
        jax.tree.map(lambda x: x[part], nemo_run(nemo, name, strategy, max_symbols)),
    )
    rows = rows_of(out)
    assert [[r[0] for r in row] for row in rows] == unpad(g[f"{run}/ids"])
    assert [[r[1] for r in row] for row in rows] == unpad(g[f"{run}/frames"])
    np.testing.assert_allclose(out["score"], g[f"{run}/scores"], rtol=1e-4, atol=1e-4)
    assert not np.any(out["full"])
    if f"{run}/durations" in g and strategy == "greedy":  # the other's are wrong in batches
        assert [[r[3] for r in row] for row in rows] == unpad(g[f"{run}/durations"])


def test_equals_nemo_with_the_weights_of_its_archive(shared_dir, tmp_path):
    folder = shared_dir / "goldens/nemo"
    with tarfile.open(folder / "tiny_tdt.nemo") as archive:
        name = next(n for n in archive.getnames() if n.endswith("model_weights.ckpt"))
        (tmp_path / "weights.ckpt").write_bytes(archive.extractfile(name).read())
    w = torch_file.read(tmp_path / "weights.ckpt")
    lstm, arrays = "decoder.prediction.dec_rnn.lstm.", np.load(folder / "tiny_tdt.npz")
    steps = lstm_steps(
        {
            "embed": w["decoder.prediction.embed.weight"],
            "weight_ih_l0": w[f"{lstm}weight_ih_l0"],
            "weight_hh_l0": w[f"{lstm}weight_hh_l0"],
            "bias": w[f"{lstm}bias_ih_l0"] + w[f"{lstm}bias_hh_l0"],
            "pred_weight": w["joint.pred.weight"],
            "pred_bias": w["joint.pred.bias"],
            "output_weight": w["joint.joint_net.2.weight"],
            "output_bias": w["joint.joint_net.2.bias"],
        }
    )
    enc = np.moveaxis(arrays["fuzz/encoder_out"], 1, 2) @ w["joint.enc.weight"].T
    enc += w["joint.enc.bias"]
    options = {"blank": BLANK, "durations": DURATIONS["tiny_tdt"], "strategy": "greedy"}
    out = jit(lambda enc, n: greedy(enc, n, steps, **options))(enc, arrays["fuzz/len"])
    rows = rows_of(out)
    assert [[r[0] for r in row] for row in rows] == unpad(arrays["fuzz/greedy_ms10/ids"])
    assert [[r[1] for r in row] for row in rows] == unpad(arrays["fuzz/greedy_ms10/frames"])
    assert [[r[3] for r in row] for row in rows] == unpad(arrays["fuzz/greedy_ms10/durations"])


def test_the_models_own_networks_decode_as_nemos_do(nemo):
    g = nemo("tiny_hybrid_tdt")
    V, P, J, E = 64, 48, 40, 5
    prediction = Prediction(PredictionConfig(vocab_size=V, pred_hidden=P))
    joint = Joint(
        JointConfig(V, encoder_hidden=64, pred_hidden=P, joint_hidden=J, num_extra_outputs=E)
    )
    lstm = {name: g[name] for name in ("weight_ih_l0", "weight_hh_l0")}
    lstm |= {"bias_ih_l0": g["bias"], "bias_hh_l0": 0 * g["bias"]}
    decoder = {"prediction": {"embed": {"embedding": g["embed"]}, "dec_rnn": {"lstm": lstm}}}
    linear = {
        ours: {"kernel": g[f"{theirs}_weight"].T, "bias": g[f"{theirs}_bias"]}
        for ours, theirs in {"pred": "pred", "joint_net": "output"}.items()
    }

    def predict(token, state):
        x, state = prediction.apply({"params": decoder}, token, state, method="step")
        return joint.apply({"params": linear}, x, method="prediction_part"), state

    def output(enc, pred):
        return joint.apply({"params": linear}, enc + pred, method="output")

    steps = Steps(predict, prediction.initial_state, output)
    out = jit(lambda enc, n: greedy(enc, n, steps, blank=V, durations=DURATIONS["tiny_tdt"]))(
        g["fuzz/enc_proj"], g["fuzz/enc_len"]
    )
    rows = rows_of(out)
    assert [[r[0] for r in row] for row in rows] == unpad(g["fuzz/greedy_ms10/ids"])
    assert [[r[3] for r in row] for row in rows] == unpad(g["fuzz/greedy_ms10/durations"])


TDT = (0, 1, 2, 4)
CASES = [
    (None, 10, "greedy_batch"),
    (None, 1, "greedy"),
    (TDT, 10, "greedy_batch"),
    (TDT, 1, "greedy_batch"),
    (TDT, 2, "greedy_batch"),
    (TDT, 1, "greedy"),
    (TDT, 2, "greedy"),
]
LENS = np.array([12, 7, 0, 11, 1, 12], np.int32)


@pytest.mark.parametrize(("durations", "max_symbols", "strategy"), CASES)
def test_equals_the_naive_loop(durations, max_symbols, strategy):
    seed = max_symbols + 20 * (strategy == "greedy")
    steps, decode = decoder(seed, 4, durations, max_symbols, strategy, bias=None)
    enc = random_encoder(seed, len(LENS), 12)
    out = decode(enc, LENS)
    for row, n, score, x in zip(rows_of(out), LENS, out["score"], enc, strict=True):
        want, log_prob = naive_greedy(x, n, steps, 4, durations, max_symbols, strategy)
        assert [(k, t) for k, t, _, _ in row] == [(k, t) for k, t, _ in want]
        assert [d for *_, d in row] == [d for *_, d in want]
        assert abs(score - log_prob) < 1e-4


@pytest.mark.parametrize("durations", [None, TDT])
def test_a_row_does_not_depend_on_its_batch_mates_nor_on_padding_nor_on_the_window(durations):
    E = 0 if durations is None else 4
    bias = [0, 0, 0, 0, 1.5] + [0] * E  # blanks in runs
    enc = random_encoder(3, len(LENS), 12)
    _, decode = decoder(3, 4, durations, bias=tuple(bias))
    together = decode(enc, LENS)
    for window in (1, 20):
        _, other = decoder(3, 4, durations, window=window, bias=tuple(bias))
        assert rows_of(other(enc, LENS)) == rows_of(together)
    wide = np.full((1, 19, 6), 9.0, np.float32)
    for b, n in enumerate(LENS):
        wide[0, :n], wide[0, n:] = enc[b, :n], 9.0
        alone = decode(wide, LENS[b : b + 1])
        assert rows_of(alone) == rows_of(together)[b : b + 1]
        np.testing.assert_allclose(alone["score"][0], together["score"][b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("durations", [None, TDT])
def test_frames_are_monotone_and_inside_the_audio_and_padding_is_zero(durations):
    _, decode = decoder(3, 4, durations)
    out = decode(random_encoder(5, len(LENS), 12), LENS)
    for row, n in zip(rows_of(out), LENS, strict=True):
        starts, ends = [r[1] for r in row], [r[2] for r in row]
        assert starts == sorted(starts) and all(0 <= s < n for s in starts)
        assert all(s <= e <= n for s, e in zip(starts, ends, strict=True))
        if durations is not None:
            assert all(e == min(s + d, n) for _, s, e, d in row)
    there = np.arange(out["tokens"].shape[1]) < np.asarray(out["token_len"])[:, None]
    for name in ("tokens", "start_frame", "end_frame", "durations"):
        assert not np.any(np.asarray(out[name])[~there])


@pytest.mark.parametrize("durations", [None, TDT])
def test_rows_of_blanks_alone_and_rows_without_frames_are_empty(durations):
    bias = (0, 0, 0, 0, 50) + (0,) * (0 if durations is None else 4)
    _, decode = decoder(3, 4, durations, bias=bias)
    out = decode(random_encoder(5, len(LENS), 12), LENS)
    assert not np.any(out["token_len"]) and not np.any(out["score"]) and not np.any(out["full"])
    out = decoder(3, 4, durations)[1](random_encoder(5, len(LENS), 12), 0 * LENS)
    assert not np.any(out["token_len"]) and not np.any(out["full"])
    nothing = np.zeros((2, 0, 6), np.float32), np.zeros(2, np.int32)
    assert jax.eval_shape(decode, *nothing)["tokens"].shape == (2, 0)


def test_a_row_longer_than_the_capacity_says_so_and_the_others_do_not():
    steps, decode = decoder(3, 4, None)
    enc = random_encoder(3, len(LENS), 12)
    whole = decode(enc, LENS)
    counts = np.asarray(whole["token_len"])
    L = int(np.sort(counts)[-2])  # one row is too long at least, one fills it to the last
    cut = jit(lambda enc, n: greedy(enc, n, steps, blank=4, capacity=L))(enc, LENS)
    assert np.array_equal(cut["full"], counts > L) and np.any(cut["full"])
    assert np.array_equal(cut["token_len"], np.minimum(counts, L))
    for short, long in zip(rows_of(cut), rows_of(whole), strict=True):
        assert short == long[: len(short)]
    assert not np.any(whole["full"])


def test_a_label_that_never_ends_stops_at_the_capacity():
    steps = random_steps(0, 4, E=4, bias=(50, 0, 0, 0, 0, 50, 0, 0, 0))
    decode = jit(
        lambda enc, n: greedy(enc, n, steps, blank=4, durations=TDT, max_symbols=None, capacity=9)
    )
    out = decode(random_encoder(0, 1, 3), np.array([3], np.int32))
    assert int(out["token_len"][0]) == 9 and bool(out["full"][0])


def test_not_a_number_comes_to_an_end():
    _, decode = decoder(3, 4, TDT)
    out = decode(np.full((6, 12, 6), np.nan, np.float32), LENS)
    assert np.all(np.asarray(out["token_len"]) <= 10 * LENS)


def test_axes_of_rows_are_found_from_the_shapes():
    def state(n):
        return {"h": jnp.zeros((2, n, 3)), "c": (jnp.zeros((n,)), jnp.zeros((4, 5, n)))}

    assert batch_axes(state) == {"h": 1, "c": (0, 2)}
    assert batch_axes(lambda n: ()) == ()
    with pytest.raises(ValueError, match="axis of rows"):
        batch_axes(lambda n: jnp.zeros((2, 3)))


def test_a_prediction_without_state_is_fine():
    steps = Steps(
        lambda token, state: (jnp.eye(6)[token], state),
        lambda n: (),
        lambda enc, pred: enc[:, :5] + pred[:, :5],
    )
    out = greedy(random_encoder(1, 2, 4), jnp.array([4, 2]), steps, blank=4, max_symbols=2)
    assert np.all(np.asarray(out["token_len"]) <= 8)


def test_options_are_checked():
    steps, _ = decoder(3, 4, None)
    enc, n = random_encoder(1, 1, 2), jnp.array([2])
    with pytest.raises(ValueError, match="strategy 'beam'"):
        greedy(enc, n, steps, blank=4, strategy="beam")
    with pytest.raises(ValueError, match="max_symbols"):
        greedy(enc, n, steps, blank=4, max_symbols=0)
    with pytest.raises(ValueError, match="normalise_over 'labels'"):
        greedy(enc, n, steps, blank=4, normalise_over="labels")
