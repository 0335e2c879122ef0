"""Expanded heads: NeMo's transfer, transcripts before and after, and random vocabularies."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jasr import tree
from jasr.text.vocab.expand import NewRows, VocabularyError, expand, moves, tensors

DURATIONS = (0, 1, 2, 3, 4)


PATHS = {
    "decoder.prediction.embed.weight": "decoder/prediction/embed/embedding",
    "joint.joint_net.2.weight": "joint/joint_net/kernel",
    "joint.joint_net.2.bias": "joint/joint_net/bias",
    "ctc_decoder.decoder_layers.0.weight": "ctc_decoder/decoder_layers_0/kernel",
    "ctc_decoder.decoder_layers.0.bias": "ctc_decoder/decoder_layers_0/bias",
}


def our_axes(name, array):
    """A NeMo tensor under our axes: linear [in, out], conv1d [width, in, out]."""
    if name.endswith("embed.weight") or array.ndim == 1 or "lstm" in name:
        return array
    return np.ascontiguousarray(array.T)


@pytest.fixture(scope="module")
def nemo(folder):
    """(arrays, old parameters, new parameters) of NeMo's tiny hybrid TDT model."""
    with np.load(folder / "expansion.npz") as f:
        arrays = dict(f)
    old, new = {}, {}
    for key, value in arrays.items():
        if key.startswith("new/"):
            name = key.removeprefix("new/")
            path = PATHS.get(name, name.replace(".weight", ".kernel").replace(".", "/"))
            new[path] = our_axes(name, value)
            old[path] = our_axes(name, arrays.get(f"old/{name}", value))
    old["encoder/layers_0/norm_out/scale"] = np.ones(64, np.float32)
    return arrays, tree.unflatten(old), tree.unflatten(new)


@pytest.fixture(scope="module")
def pieces(base, golden):
    return base.texts, golden["merged_pieces"]


def hybrid(params, pieces, rows="low", **kw):
    return expand(params, ("tdt", "ctc"), *pieces, durations=DURATIONS, rows=rows, **kw)


def test_transferred_rows_are_nemos_bit_for_bit(nemo, pieces):
    _, old, want = nemo
    got = tree.flatten(hybrid(old, pieces))
    want = tree.flatten(want)
    assert list(got) == list(tree.flatten(old))
    for path, value in tree.flatten(old).items():
        if path not in PATHS.values():
            assert got[path] is value  # encoder, LSTM and projections: the very same arrays
    for path in PATHS.values():
        assert got[path].shape == want[path].shape and got[path].dtype == np.float32
        rows = 0 if path.endswith("embedding") else -1
        old_rows = [*range(64), *range(121, want[path].shape[rows])]
        np.testing.assert_array_equal(
            np.take(got[path], old_rows, rows), np.take(want[path], old_rows, rows)
        )
    assert not got["decoder/prediction/embed/embedding"][121].any()


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def ctc_log_probs(params, encoded):
    layer = params["ctc_decoder"]["decoder_layers_0"]
    return log_softmax(encoded @ layer["kernel"][0] + layer["bias"])


def test_ctc_log_probs_after_the_transfer_are_nemos(nemo, pieces):
    arrays, old, want = nemo
    encoded = arrays["encoded"].transpose(0, 2, 1)
    golden = arrays["ctc_log_probs_after_transfer"]
    np.testing.assert_allclose(ctc_log_probs(want, encoded), golden, atol=1e-4)
    # Log probabilities of old tokens relative to each other do not depend on the new ones.
    got, old_rows = ctc_log_probs(hybrid(old, pieces), encoded), [*range(64), 121]
    np.testing.assert_allclose(
        log_softmax(got[..., old_rows]), log_softmax(golden[..., old_rows]), atol=1e-4
    )


def tdt_greedy(params, encoded, size, max_symbols=10):
    """[(id, frame, duration)] of encoded [T, D], in plain numpy."""
    flat = tree.flatten(params)
    lstm = {k.split("/")[-1]: v for k, v in flat.items() if "/lstm/" in k}
    joint = params["joint"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def step(token, h, c):
        x = params["decoder"]["prediction"]["embed"]["embedding"][token]
        gates = lstm["kernel_ih_l0"] @ x + lstm["bias_ih_l0"]
        gates = gates + lstm["kernel_hh_l0"] @ h + lstm["bias_hh_l0"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    out, t = [], 0
    state = step(size, *np.zeros((2, lstm["kernel_hh_l0"].shape[1]), np.float32))
    while t < len(encoded):
        symbols, d = 0, 0
        while d == 0 and symbols < max_symbols:
            hidden = encoded[t] @ joint["enc"]["kernel"] + joint["enc"]["bias"]
            hidden = hidden + state[0] @ joint["pred"]["kernel"] + joint["pred"]["bias"]
            z = np.maximum(hidden, 0) @ joint["joint_net"]["kernel"] + joint["joint_net"]["bias"]
            token, d = int(z[: size + 1].argmax()), DURATIONS[int(z[size + 1 :].argmax())]
            if token != size:
                out.append((token, t, d))
                state = step(token, *state)
            symbols += 1
            t += d
        t += symbols == max_symbols
    return out


def test_transcripts_do_not_change_before_the_first_step(nemo, pieces, golden):
    arrays, old, want = nemo
    key = jax.random.key(0)
    expanded = {
        "nemo": want,
        "low": hybrid(old, pieces),
        "noisy": hybrid(old, pieces, NewRows("low", noise=0.1), key=key),
        "mean": hybrid(old, pieces, "mean"),
    }
    for row, hypothesis in enumerate(golden["decode_after_transfer"]):
        encoded = arrays["encoded"][row].T[: arrays["encoded_len"][row]]
        before = tdt_greedy(old, encoded, 64)
        assert [token for token, _, _ in before] == hypothesis["ids"]
        assert [d for _, _, d in before] == list(arrays["greedy/durations"][row][: len(before)])
        best = ctc_log_probs(old, encoded).argmax(-1)
        for name, params in expanded.items():
            assert tdt_greedy(params, encoded, 121) == before, name
            if name != "nemo":
                got = ctc_log_probs(params, encoded).argmax(-1)
                np.testing.assert_array_equal(got, np.where(best == 64, 121, best), name)


def test_new_rows_drawn_as_nemo_draws_them(nemo, pieces):
    _, old, want = nemo
    want = tree.flatten(want)
    drawn = tree.flatten(hybrid(old, pieces, "normal", key=jax.random.key(1)))
    for path in PATHS.values():
        rows = 0 if path.endswith("embedding") else -1
        got, nemos = (np.take(p[path], range(64, 121), rows) for p in (drawn, want))
        assert abs(got.mean()) < 0.15 * got.std() + 0.02
        np.testing.assert_allclose(got.std(), nemos.std(), rtol=0.2)
        if rows:  # uniform, within the same bounds
            np.testing.assert_allclose(abs(got).max(), abs(nemos).max(), rtol=0.08)
    zero = tree.flatten(hybrid(old, pieces, "zero_bias", key=jax.random.key(1)))
    for path in PATHS.values():
        if path.endswith("bias"):
            assert not zero[path][64:121].any() and zero[path][:64].any()
        else:
            np.testing.assert_array_equal(zero[path], drawn[path])


def random_params(rng, heads, size, durations, dtype=np.float32, inputs=16):
    """Random parameters of random heads, of values that f32 sums exactly in any order."""
    params = {"encoder/layers_0/scale": rng.standard_normal(3).astype(dtype)}
    shapes = {"embed/embedding": (size + 1, 8)}
    for t in tensors(heads, durations):
        rows, start = size + t.tail, () if t.is_bias else (inputs,)
        if t.layer == "conv1d" and not t.is_bias:
            start = (1, inputs)
        shapes[t.path] = (rows, 8) if t.layer == "embedding" else (*start, rows)
        values = rng.integers(-8, 9, shapes[t.path]) / 8
        if t.layer == "embedding":
            values[-1] = 0
        params[t.path] = values.astype(dtype)
    params["decoder/prediction/dec_rnn/lstm/weight_hh_l0"] = np.ones((4, 4), dtype)
    return tree.unflatten(params)


HEADS = [
    (("ctc",), ()),
    (("rnnt",), ()),
    (("tdt",), (0, 1, 2)),
    (("rnnt", "ctc"), ()),
    (("tdt", "ctc"), (1, 2, 4)),
]


def random_vocabularies(rng):
    """(old, new) pieces: the new ones hold the old ones in another order."""
    old = [f"o{i}" for i in range(11)]
    new = old + [f"n{i}" for i in range(rng.choice([0, 6]))]
    return old, [str(p) for p in rng.permutation(new)]


@pytest.mark.parametrize("heads, durations", HEADS, ids=lambda x: "-".join(map(str, x)))
def test_random_expansions_keep_the_logits_of_old_tokens_bit_for_bit(heads, durations):
    """With exactly summable values, since products of another width may sum in another order."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        old, new = random_vocabularies(rng)
        params = random_params(rng, heads, len(old), durations)
        rule = ["low", "mean", "normal", "zero_bias"][seed % 4]
        got = expand(
            params, heads, old, new, durations=durations, rows=rule, key=jax.random.key(seed)
        )
        ids = moves(old, new)
        assert [new[i] for i in ids] == old
        before, after = tree.flatten(params), tree.flatten(got)
        hidden = jnp.asarray(rng.integers(-8, 9, (5, 16)) / 8, jnp.float32)
        for t in tensors(heads, durations):
            kept = [*ids, *range(len(new), len(new) + t.tail)]
            if t.layer == "embedding":
                np.testing.assert_array_equal(after[t.path][kept], before[t.path])
            elif not t.is_bias:
                bias = t.path.replace("kernel", "bias")
                was, now = (hidden @ p[t.path] + p[bias] for p in (before, after))
                was, now = (z.reshape(-1, z.shape[-1]) for z in (was, now))
                np.testing.assert_array_equal(now[:, np.array(kept)], was)


@pytest.mark.parametrize("heads, durations", HEADS, ids=lambda x: "-".join(map(str, x)))
def test_random_logits_of_old_tokens_are_those_of_before(heads, durations):
    """Any values: rows to the bit, XLA's products to 1e-6 of the largest logit."""
    rng = np.random.default_rng(7)
    old, new = random_vocabularies(rng)
    params = tree.unflatten(
        {
            path: v if path.endswith("embedding") else rng.standard_normal(v.shape).astype("f")
            for path, v in tree.flatten(random_params(rng, heads, len(old), durations)).items()
        }
    )
    after = tree.flatten(expand(params, heads, old, new, durations=durations))
    before, ids = tree.flatten(params), moves(old, new)
    hidden = jnp.asarray(rng.standard_normal((9, 16)), jnp.float32)
    for t in tensors(heads, durations):
        kept = np.array([*ids, *range(len(new), len(new) + t.tail)])
        rows = 0 if t.layer == "embedding" else -1
        np.testing.assert_array_equal(np.take(after[t.path], kept, rows), before[t.path])
        if t.layer != "embedding" and not t.is_bias:
            was, now = np.asarray(hidden @ before[t.path]), np.asarray(hidden @ after[t.path])
            assert abs(now[..., kept] - was).max() <= 1e-6 * abs(was).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_low_rows_never_win_whatever_the_input(dtype):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        old, new = random_vocabularies(rng)
        params = random_params(rng, ("tdt", "ctc"), len(old), (0, 1), dtype)
        after = hybrid_of(params, old, new)
        fresh = sorted(set(range(len(new))) - set(moves(old, new)))
        hidden = rng.standard_normal((50, 16)) * 10.0 ** rng.integers(-2, 3)
        for name in ("joint/joint_net", "ctc_decoder/decoder_layers_0"):
            kernel, bias = (after[f"{name}/{k}"].astype(np.float64) for k in ("kernel", "bias"))
            z = hidden @ kernel.reshape(16, -1) + bias
            slack = 0.01 * abs(hidden).sum(-1, keepdims=True) + 0.1  # the rows' rounding
            best = z[:, moves(old, new)].max(-1, keepdims=True)
            if dtype == np.float32:
                slack = 1e-4 + 1e-6 * abs(z).max()
            assert (z[:, fresh] <= best - 3 + slack).all()
            assert after[f"{name}/kernel"].dtype == dtype


def hybrid_of(params, old, new, **kw):
    heads = ("tdt", "ctc")
    return tree.flatten(expand(params, heads, old, new, durations=(0, 1), **kw))


def test_replacing_keeps_blank_durations_and_networks_only():
    rng = np.random.default_rng(0)
    old, new = ["a", "b", "c"], ["c", "x"]
    params = random_params(rng, ("tdt", "ctc"), 3, (0, 1))
    key = jax.random.key(3)
    after = hybrid_of(params, old, new, rows="normal", key=key, replace=True)
    before = tree.flatten(params)
    for t in tensors(("tdt", "ctc"), (0, 1)):
        rows = 0 if t.layer == "embedding" else -1
        was, now = np.moveaxis(before[t.path], rows, 0), np.moveaxis(after[t.path], rows, 0)
        assert len(now) == 2 + t.tail
        np.testing.assert_array_equal(now[2:], was[3:])
        assert not (now[0] == was[2]).all()  # "c" is another token now
    lstm = "decoder/prediction/dec_rnn/lstm/weight_hh_l0"
    assert after[lstm] is before[lstm]
    with pytest.raises(VocabularyError, match="'low'"):
        hybrid_of(params, old, new, replace=True)


def test_an_embedding_without_a_blank_keeps_none():
    params = random_params(np.random.default_rng(0), "rnnt", 3, ())
    embed = params["decoder"]["prediction"]["embed"]
    embed["embedding"] = embed["embedding"][:3] + 1
    got = expand(params, "rnnt", ["a", "b", "c"], ["a", "b", "c", "d"], rows="mean")
    got = got["decoder"]["prediction"]["embed"]["embedding"]
    np.testing.assert_array_equal(got[:3], embed["embedding"])
    np.testing.assert_allclose(got[3], embed["embedding"].mean(0))


def test_expansion_is_pure_and_deterministic():
    rng = np.random.default_rng(0)
    params = random_params(rng, ("tdt", "ctc"), 3, (0, 1))
    copy = {p: v.copy() for p, v in tree.flatten(params).items()}
    args = (["a", "b", "c"], ["a", "b", "c", "d"])
    one, two, other = (
        hybrid_of(params, *args, rows="normal", key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    for path, value in tree.flatten(params).items():
        np.testing.assert_array_equal(value, copy[path])
        np.testing.assert_array_equal(one[path], two[path])
    assert not (one["joint/joint_net/kernel"] == other["joint/joint_net/kernel"]).all()
    # What is drawn for a tensor does not depend on the other heads.
    del params["ctc_decoder"]
    alone = expand(params, "tdt", *args, durations=(0, 1), rows="normal", key=jax.random.key(0))
    np.testing.assert_array_equal(
        alone["joint"]["joint_net"]["kernel"], one["joint/joint_net/kernel"]
    )
    same = hybrid_of(random_params(rng, ("tdt", "ctc"), 3, (0, 1)), args[0], args[0])
    assert same["joint/joint_net/bias"].shape == (6,)


def test_noise_spreads_kernels_and_embedding_around_the_mean():
    rng = np.random.default_rng(0)
    params = random_params(rng, ("tdt", "ctc"), 50, (0, 1))
    old = [f"o{i}" for i in range(50)]
    new = old + [f"n{i}" for i in range(300)]
    exact = hybrid_of(params, old, new, rows="mean")
    noisy = hybrid_of(params, old, new, rows=NewRows("mean", noise=0.1), key=jax.random.key(0))
    kernel = "joint/joint_net/kernel"
    mean = tree.flatten(params)[kernel][:, :50].astype(np.float64).mean(1)
    np.testing.assert_allclose(exact[kernel][:, 50:350], mean[:, None] * np.ones(300), atol=1e-7)
    spread = (noisy[kernel] - exact[kernel])[:, 50:350].std(1)
    np.testing.assert_allclose(spread, 0.1 * tree.flatten(params)[kernel][:, :50].std(1), rtol=0.2)
    np.testing.assert_array_equal(noisy["joint/joint_net/bias"], exact["joint/joint_net/bias"])


def test_vocabularies_that_collapse_are_refused():
    with pytest.raises(VocabularyError) as error:
        moves(["a", "b", "a"], ["b", "c", "c"])
    said = str(error.value)
    assert "old vocabulary holds pieces more than once: 'a'" in said
    assert "new vocabulary holds pieces more than once: 'c'" in said
    assert "lacks 1 of the old pieces: 'a'" in said


def test_weights_that_do_not_fit_are_listed_in_one_error():
    rng = np.random.default_rng(0)
    params = random_params(rng, ("tdt", "ctc"), 4, (0, 1))
    del params["decoder"]["prediction"]["embed"]
    with pytest.raises(VocabularyError) as error:
        expand(params, "tdt", ["a", "b", "c"], ["a", "b"], durations=(0, 1), rows="mean")
    said = str(error.value)
    for part in (
        "lacks 1 of the old pieces: 'c'",
        "there is no decoder/prediction/embed/embedding",
        "joint/joint_net/kernel (16, 7) has 7 rows, wanted 3 pieces + blank + 2 durations = 6",
        "joint/joint_net/bias (7,) has 7 rows",
        "ctc_decoder/decoder_layers_0/kernel belongs to a head that was not named",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    "heads, durations",
    [((), ()), (("ctc", "ctc"), ()), ("aed", ()), (("rnnt", "tdt"), (0,)), ("tdt", ())]
    + [("rnnt", (0, 1)), ("tdt", (0, 0))],
)
def test_heads_that_no_model_has_are_refused(heads, durations):
    with pytest.raises(VocabularyError, match="head"):
        tensors(heads, durations)


def test_rules_are_checked():
    with pytest.raises(VocabularyError, match="'best'.*normal"):
        NewRows("best")
    with pytest.raises(VocabularyError, match="noise"):
        NewRows(noise=-1.0)
    params = random_params(np.random.default_rng(0), "ctc", 1, ())
    for rows in ("normal", NewRows(noise=0.1)):
        with pytest.raises(VocabularyError, match="needs a key"):
            expand(params, "ctc", ["a"], ["a", "b"], rows=rows)
