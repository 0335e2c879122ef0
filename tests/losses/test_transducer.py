"""RNN-T and TDT losses against enumeration of all paths, NeMo and transformers, and their rules on
bad rows; the joint network inside of the loss against logits that exist."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jasr.losses import joint
from jasr.losses.joint import joint_cells
from jasr.losses.lattice import log_likelihood
from jasr.losses.transducer import has_path, loss_of_logits, rnnt_loss, sampled_omega, tdt_loss

DURATIONS = (0, 1, 2, 3, 4)


def arcs_of(logits, row, t, u, blank, durations, sigma):
    """(frames, labels, log-probability) of the arcs that leave a node; float64."""

    def log_softmax(x):
        x = x.astype(np.float64)
        return x - np.log(np.sum(np.exp(x)))

    if durations is None:
        token, steps = log_softmax(logits[t, u]), {0: 0.0, 1: 0.0}
    else:
        token = log_softmax(logits[t, u, : -len(durations)]) - sigma
        steps = dict(zip(durations, log_softmax(logits[t, u, -len(durations) :])))
    for frames, score in steps.items():
        if frames and (durations or frames == 1):
            yield frames, 0, token[blank] + score
        if u < len(row) and (durations or frames == 0):
            yield frames, 1, token[row[u]] + score


def enumerate_paths(logits, row, T, blank, durations=None, sigma=0.0):
    """-log of the summed probability of every path, one by one; inf without any."""

    def walk(t, u, score):
        for frames, labels, arc in arcs_of(logits, row, t, u, blank, durations, sigma):
            if t + frames < T:
                yield from walk(t + frames, u + labels, score + arc)
            elif t + frames == T and not labels and u == len(row):
                yield score + arc

    total = sum(np.exp(score) for score in walk(0, 0, 0.0)) if T else 0.0
    return -np.log(total) if total else np.inf


def ragged(seed=0, B=6, T=14, U=5, J=8, outputs=12, blank=3, scale=1.0):
    """Arguments of a loss: full, short, token-less, padding and infeasible rows."""
    rng = np.random.default_rng(seed)
    enc, pred = (scale * rng.standard_normal((B, n, J)) for n in (T, U + 1))
    kernel, bias = rng.standard_normal((J, outputs)), rng.standard_normal(outputs)
    parts = [x.astype(np.float32) for x in (enc, pred, kernel, bias)]
    enc_len = np.array([T, T - 5, 3, 6, 0, 0], np.int32)
    token_len = np.array([U, 2, 4, 0, 0, 2], np.int32)
    tokens = rng.integers(0, outputs - 6, (B, U)).astype(np.int32)
    tokens += tokens >= blank
    return parts, (enc_len, tokens, token_len)


INFEASIBLE = 5


def dense_logits(enc, pred, kernel, bias, activation="relu"):
    return joint.ACTIVATIONS[activation](enc[:, :, None] + pred[:, None]) @ kernel + bias


def close(got, want, limit):
    """The largest difference as a share of the largest value is within the limit."""
    want = np.asarray(want)
    assert np.max(np.abs(np.asarray(got) - want)) <= limit * max(np.max(np.abs(want)), 1e-30)


# Compiled with little optimisation: these graphs run once, and compiling is what a test waits for.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnames=("loss", "blank", "durations", "options"))
def loss_of(loss, arrays, rows, blank=3, durations=None, options=()):
    """(loss f32[B], feasible)."""
    settings = dict(options) | ({} if durations is None else {"durations": durations})
    return loss(*arrays, *rows, blank=blank, **settings)


@functools.partial(jit, static_argnames=("loss", "blank", "durations", "options"))
def loss_and_grad(loss, arrays, rows, blank=3, durations=None, options=()):
    """(loss f32[B], feasible), and the gradients of the sum by the arrays."""

    def total(*arrays):
        out = loss_of.__wrapped__(loss, arrays, rows, blank, durations, options)
        return out[0].sum(), out

    (_, out), grad = jax.value_and_grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)
    return out, grad


@pytest.mark.parametrize("durations", [None, (0, 1, 2), (2, 0), (1, 3), (3, 2, 0, 1)])
def test_equals_the_sum_over_all_paths(durations):
    rng = np.random.default_rng(0)
    T, U, blank = 4, 3, 1
    cases = [(t, u) for t in range(T + 1) for u in range(U + 1)]
    extra = len(durations or ())
    logits = rng.standard_normal((len(cases), T, U + 1, 4 + extra)).astype(np.float32)
    tokens = rng.choice([0, 2, 3], (len(cases), U)).astype(np.int32)
    enc_len, token_len = np.array(cases, np.int32).T
    rows = (enc_len, tokens, token_len)
    if durations is None:
        got = loss_of(loss_of_logits, (logits,), rows, blank)
    else:
        got = loss_of(loss_of_logits, (logits,), rows, blank, durations, (("sigma", 0.05),))
    want = np.array(
        [
            enumerate_paths(x, row[:u], t, blank, durations, 0.05) if t + u else 0.0
            for x, row, (t, u) in zip(logits, tokens, cases)
        ]
    )
    np.testing.assert_array_equal(got[1], np.isfinite(want))
    np.testing.assert_allclose(got[0], np.where(np.isfinite(want), want, 0.0), rtol=1e-5, atol=2e-6)


def test_gradient_equals_finite_differences():
    parts, rows = ragged(1)
    options = (("activation", "tanh"), ("chunk", 7))  # without a kink
    rng = np.random.default_rng(1)
    _, grad = loss_and_grad(tdt_loss, tuple(parts), rows, durations=DURATIONS, options=options)
    for i, part in enumerate(parts):
        direction = rng.standard_normal(part.shape).astype(np.float32)
        ends = []
        for step in (1e-2, -1e-2):
            moved = tuple(x + step * direction if i == k else x for k, x in enumerate(parts))
            out, _ = loss_and_grad(tdt_loss, moved, rows, durations=DURATIONS, options=options)
            ends.append(np.sum(np.asarray(out[0], np.float64)))
        want = np.sum(np.asarray(grad[i]) * direction)
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "tanh", "chunk": 7},
        {"activation": "sigmoid", "groups": 3, "omega": 0.25, "sigma": 0.1, "fastemit_lambda": 0.3},
    ],
)
def test_joint_inside_of_the_loss_equals_logits_that_exist(options):
    parts, rows = ragged(1)
    in_cells = {"activation", "chunk", "groups"}

    def dense(*args, blank, durations, **settings):
        logits = dense_logits(*args[:4], settings.get("activation", "relu"))
        settings = {k: v for k, v in settings.items() if k not in in_cells}
        return loss_of_logits(logits, *args[4:], blank=blank, durations=durations, **settings)

    options = tuple(options.items())
    got, grad = loss_and_grad(tdt_loss, tuple(parts), rows, durations=DURATIONS, options=options)
    want, want_grad = loss_and_grad(dense, tuple(parts), rows, durations=DURATIONS, options=options)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(grad, want_grad):
        close(a, b, 1e-5)


def test_nodes_without_weight_may_be_left_out(monkeypatch):
    parts, rows = ragged(2, T=30, U=12, scale=4.0)
    parts, rows = (parts[0][:2], parts[1][:2], *parts[2:]), tuple(x[:2] for x in rows)
    (enc_len, _, token_len), options = rows, (("chunk", 64),)
    _, grad = loss_and_grad(rnnt_loss, parts, rows, options=options)

    @jit
    def passes(parts):
        cells = joint_cells(*parts, *rows, blank=3)
        return jax.grad(lambda x: log_likelihood(x, enc_len, token_len).sum())(cells).sum(-1)

    assert np.mean(passes(parts)[0] > 1e-8) < 0.5  # there is something to leave out
    monkeypatch.setattr(joint, "NEGLIGIBLE", 0.0)
    _, want = loss_and_grad(rnnt_loss, parts, rows, options=(("chunk", 80),))  # compiled anew
    for a, b in zip(grad, want):
        close(a, b, 1e-6)


def golden_rows(z):
    rows = (z["encoded_len"], z["targets"], z["target_len"])
    return tuple(np.asarray(x, np.int32) for x in rows)


def load(path):
    with np.load(path) as f:
        return dict(f)


@pytest.mark.parametrize("name", ["tiny_tdt", "tiny_rnnt"])
def test_losses_equal_nemo(goldens, name):
    z = load(goldens / "nemo" / "transducer" / f"{name}.npz")
    weights = (z["params/joint/joint_net/kernel"], z["params/joint/joint_net/bias"])
    parts, rows = (z["enc_proj"], z["pred_proj"], *weights), golden_rows(z)
    if name == "tiny_rnnt":
        loss, _ = loss_of(rnnt_loss, parts, rows, blank=64)
        np.testing.assert_allclose(loss, z["loss_per_utt"], rtol=1e-5)
        return

    def tdt(sigma, omega=0.0):
        settings = (("sigma", sigma), ("omega", omega))
        return loss_of(tdt_loss, parts, rows, 64, DURATIONS, settings)[0]

    # The smallest is 1.3e-3: PyTorch's float32 has rounded there.
    np.testing.assert_allclose(tdt(0.0), z["loss_per_utt_sigma0"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tdt(0.02), z["loss_per_utt_sigma"], rtol=1e-5)
    np.testing.assert_allclose(tdt(0.02, 1.0), z["rnnt_branch_loss_per_utt"], rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny_tdt", "tiny_hybrid_tdt", "tiny_rnnt"])
def test_gradients_of_logits_equal_nemo(shared_dir, name):
    z = load(shared_dir / "goldens" / "nemo" / f"{name}.npz")

    options, durations, loss = (), None, loss_of_logits
    if name != "tiny_rnnt":
        options, durations, loss = (("sigma", 0.02),), DURATIONS, loss_of_logits
    logits = (z["joint/raw"],)
    _, (grad,) = loss_and_grad(loss, logits, golden_rows(z), 64, durations, options)
    want = z["rnnt/dloss_draw" if name == "tiny_rnnt" else "tdt/dloss_draw_sigma"]
    # Differences of probabilities near 1: PyTorch's in float32 are 8e-8 from those in float64.
    limit = 1e-4 * np.max(np.abs(want)) + 1e-7
    np.testing.assert_allclose(grad / len(grad), want, rtol=0, atol=limit)


@pytest.fixture
def transformers_tdt(monkeypatch):
    """transformers' loss in float64: (logits, rows, sigma) -> losses f64[B]."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.loss.loss_tdt")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def loss(logits, rows, blank, durations, sigma):
        enc_len, tokens, token_len = (torch.tensor(x, dtype=torch.long) for x in rows)
        token, duration = logits.split([logits.shape[-1] - len(durations), len(durations)], -1)
        lengths = (tokens, enc_len, token_len)
        return module.tdt_loss(
            token, duration, *lengths, blank, list(durations), sigma=sigma, reduction="none"
        )

    yield loss
    torch.set_default_dtype(before)


def test_agrees_with_transformers(transformers_tdt):
    import torch

    parts, rows = ragged(3, T=40, U=12, outputs=70, scale=0.5)
    rows = tuple(x[:4] for x in rows)
    parts = (parts[0][:4], parts[1][:4], *parts[2:])
    options = (("sigma", 0.02),)
    (loss, feasible), grad = loss_and_grad(
        tdt_loss, parts, rows, durations=DURATIONS, options=options
    )
    exact = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in parts]
    enc, pred, kernel, bias = exact
    logits = torch.relu(enc[:, :, None] + pred[:, None]) @ kernel + bias
    want = transformers_tdt(logits, rows, 3, DURATIONS, 0.02)
    want.sum().backward()
    assert np.all(feasible)
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-5)
    for a, b in zip(grad, exact):
        close(a, b.grad.numpy(), 1e-4)


def test_rnnt_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchaudio", reason="transformers' loss_rnnt is torchaudio's")
    theirs = pytest.importorskip("transformers.loss.loss_rnnt").rnnt_loss
    parts, rows = ragged(3, T=40, U=12, outputs=70, scale=0.5)
    rows = tuple(x[:4] for x in rows)
    parts = (parts[0][:4], parts[1][:4], *parts[2:])
    (loss, _), grad = loss_and_grad(rnnt_loss, parts, rows)
    given = [torch.tensor(x, requires_grad=True) for x in parts]
    enc, pred, kernel, bias = given
    logits = torch.relu(enc[:, :, None] + pred[:, None]) @ kernel + bias
    enc_len, tokens, token_len = (torch.tensor(x) for x in rows)
    want = theirs(logits, tokens, enc_len, token_len, 3, reduction="none")
    want.sum().backward()
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-5)
    for a, b in zip(grad, given):
        close(a, b.grad.numpy(), 3e-4)  # torchaudio computes in float32


def test_gradients_of_a_model_that_is_sure_are_more_than_rounding(goldens, transformers_tdt):
    import torch

    z = load(goldens / "nemo" / "transducer" / "tiny_tdt.npz")
    weights = (z["params/joint/joint_net/kernel"], z["params/joint/joint_net/bias"])
    parts, rows = (z["enc_proj"], z["pred_proj"], *weights), golden_rows(z)
    (loss, _), grad = loss_and_grad(tdt_loss, parts, rows, blank=64, durations=DURATIONS)
    exact = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in parts]
    enc, pred, kernel, bias = exact
    logits = torch.relu(enc[:, :, None] + pred[:, None]) @ kernel + bias
    want = transformers_tdt(logits, rows, 64, DURATIONS, 0.0)
    want.sum().backward()
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-5)
    for a, b in zip(grad, [x.grad.numpy() for x in exact]):
        # Probabilities near 1 are known to one eps; the largest gradient of `enc` is 2.7e-4.
        # PyTorch in float32 is off by 9e-4 of the largest.
        limit = np.finfo(np.float32).eps + 2e-4 * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=limit)


@pytest.mark.parametrize("durations", [None, DURATIONS, (2,), (0, 2), (1, 3), (3, 5)])
def test_whether_a_row_has_a_path_follows_from_its_lengths(durations):
    """As the loss itself finds it, for every length that six frames and three tokens can have."""
    frames, count = (x.ravel() for x in np.mgrid[0:7, 0:4])
    outputs = 4 if durations is None else 4 + len(durations)
    logits = np.zeros((28, 6, 4, outputs), np.float32)
    rows = (frames.astype(np.int32), np.zeros((28, 3), np.int32), count.astype(np.int32))
    if durations is None:
        _, want = loss_of_logits(logits, *rows, blank=3)
    else:
        _, want = loss_of_logits(logits, *rows, blank=3, durations=durations)
    got = has_path(rows[0], rows[2], durations, frames=6, tokens=3)
    np.testing.assert_array_equal(got, want)


def test_omega_mixes_in_the_rnnt_loss_of_the_token_logits():
    parts, rows = ragged()

    @jit
    def run(omega):
        def total(*parts):
            options = dict(blank=3, durations=DURATIONS, sigma=0.1, omega=omega)
            loss, _ = tdt_loss(*parts, *rows, **options)
            return loss.sum(), loss

        return jax.value_and_grad(total, (0, 2), has_aux=True)(*parts)

    (_, tdt), tdt_grad = run(0.0)
    (_, rnnt), rnnt_grad = run(1.0)
    (_, mixed), mixed_grad = run(0.3)
    tokens = (*parts[:2], *(x[..., :-5] for x in parts[2:]))
    (want, _), grad = loss_and_grad(rnnt_loss, tokens, rows)
    np.testing.assert_allclose(rnnt, want, rtol=1e-6)
    close(rnnt_grad[1][:, :-5], grad[2], 1e-5)
    assert not np.any(rnnt_grad[1][:, -5:])
    np.testing.assert_allclose(mixed, 0.7 * tdt + 0.3 * rnnt, rtol=1e-6)
    for a, b, c in zip(mixed_grad, tdt_grad, rnnt_grad):
        close(a, 0.7 * b + 0.3 * c, 1e-5)


def test_omega_is_drawn_for_the_whole_batch_as_in_nemo():
    draws = jax.vmap(sampled_omega, (0, None))(jax.random.split(jax.random.key(0), 2000), 0.1)
    assert set(np.unique(draws)) == {0.0, 1.0} and abs(float(draws.mean()) - 0.1) < 0.03


def test_fastemit_is_nemos():
    """NeMo's numba kernel, from alphas and betas, in float64."""
    rng = np.random.default_rng(0)
    T, U, V, weight, blank = 6, 3, 5, 0.4, 4
    logits = rng.standard_normal((T, U + 1, V))
    row = [0, 2, 1]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    alpha, beta = np.full((T + 1, U + 2), -np.inf), np.full((T + 1, U + 2), -np.inf)
    alpha[0, 0], beta[T, U] = 0.0, 0.0
    for t in range(T):
        for u in range(U + 1):
            if t:
                alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t - 1, u] + log[t - 1, u, blank])
            if u:
                alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t, u - 1] + log[t, u - 1, row[u - 1]])
    for t in reversed(range(T)):
        for u in reversed(range(U + 1)):
            last = t == T - 1 and u < U  # a path may leave the last frame at U only
            stay = -np.inf if last else beta[t + 1, u] + log[t, u, blank]
            emit = beta[t, u + 1] + log[t, u, row[u]] if u < U else -np.inf
            beta[t, u] = np.logaddexp(stay, emit)
    total = beta[0, 0]
    want = np.zeros_like(logits)
    for t in range(T):
        for u in range(U + 1):
            stay = np.exp(alpha[t, u] + log[t, u, blank] + beta[t + 1, u] - total)
            emit = 0.0
            if u < U:
                emit = np.exp(alpha[t, u] + log[t, u, row[u]] + beta[t, u + 1] - total)
                want[t, u, row[u]] -= (1 + weight) * emit
            want[t, u, blank] -= stay
            want[t, u] += (stay + (1 + weight) * emit) * np.exp(log[t, u])

    def loss(logits):
        rows = np.array([T]), np.array([row]), np.array([U])
        return loss_of_logits(logits, *rows, blank=blank, fastemit_lambda=weight)[0].sum()

    value, grad = jit(jax.value_and_grad(loss))(logits[None].astype(np.float32))
    np.testing.assert_allclose(value, -total, rtol=1e-6)
    np.testing.assert_allclose(grad[0], want, atol=1e-6)


@pytest.mark.parametrize("durations", [None, DURATIONS])
def test_clamp_limits_the_gradient_of_each_rows_token_logits(durations):
    """As NeMo's kernels: before reduction, the durations' gradients as they are."""
    parts, rows = ragged(4)
    weight, clamp = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 1.0], np.float32), 0.1
    loss, of_logits, settings = rnnt_loss, loss_of_logits, dict(blank=3, fastemit_lambda=0.2)
    if durations is not None:
        loss, of_logits = tdt_loss, loss_of_logits
        settings |= dict(durations=durations, sigma=0.1, omega=0.25)

    @jit
    def run(parts):
        def total(*parts):
            return jnp.sum(weight * loss(*parts, *rows, clamp=clamp, **settings)[0])

        return jax.grad(total, (0, 1, 2, 3))(*parts)

    @jit
    def naive(parts):
        logits, back = jax.vjp(dense_logits, *parts)
        grad = jax.grad(lambda x: of_logits(x, *rows, **settings)[0].sum())(logits)
        token = grad[..., : grad.shape[-1] - len(durations or ())]
        clamped = jnp.clip(token, -clamp, clamp)
        beyond = jnp.mean(jnp.abs(token) > clamp)
        grad = jnp.concatenate([clamped, grad[..., token.shape[-1] :]], axis=-1)
        return back(weight[:, None, None, None] * grad), beyond

    want, beyond = naive(parts)
    assert beyond > 0.02
    for a, b in zip(run(parts), want):
        close(a, b, 1e-5)


@pytest.mark.parametrize("durations", [None, DURATIONS])
def test_bad_rows(durations):
    parts, rows = ragged()
    enc_len, _, token_len = rows
    loss = rnnt_loss if durations is None else tdt_loss
    outside = [np.arange(x.shape[1]) >= n[:, None] for x, n in zip(parts, (enc_len, token_len + 1))]
    dirty = [np.where(o[..., None], np.nan, x) for o, x in zip(outside, parts)]
    (got, feasible), grad = loss_and_grad(loss, (*dirty, *parts[2:]), rows, durations=durations)
    want, want_grad = loss_and_grad(loss, tuple(parts), rows, durations=durations)
    np.testing.assert_array_equal(got, want[0])
    for a, b in zip(grad, want_grad):
        np.testing.assert_array_equal(a, b)
        assert np.all(np.isfinite(a))
    assert list(np.flatnonzero(~np.asarray(feasible))) == [INFEASIBLE]
    assert got[4] == 0 and got[INFEASIBLE] == 0 and np.all(got[:4] > 0)
    assert not np.any(grad[0][4:]) and not np.any(grad[1][4:])


def test_frames_that_no_durations_make_up_are_infeasible():
    parts, (enc_len, tokens, token_len) = ragged(outputs=8)
    rows = (np.array([8, 7, 2, 1, 0, 4], np.int32), tokens, np.array([0, 0, 1, 0, 0, 2], np.int32))
    (loss, feasible), grad = loss_and_grad(tdt_loss, tuple(parts), rows, durations=(0, 2))
    assert list(feasible) == [True, False, True, False, True, True]
    assert not np.any(loss[np.array([1, 3, 4])]) and not np.any(grad[0][np.array([1, 3, 4])])


def test_what_is_not_a_number_is_not_hidden():
    parts, rows = ragged()
    parts[0][0, 2] = np.nan
    (loss, feasible), grad = loss_and_grad(rnnt_loss, tuple(parts), rows)
    assert np.isnan(loss[0]) and feasible[0] and np.all(np.isfinite(loss[1:]))
    assert np.any(np.isnan(grad[0][0])) and np.all(np.isfinite(grad[0][1:]))


def test_rows_do_not_depend_on_padding_or_batch_mates():
    parts, rows = ragged()
    (loss, _), grad = loss_and_grad(tdt_loss, tuple(parts), rows, durations=DURATIONS)
    row, frames, labels = 1, 9, 2
    alone = (parts[0][[row], :frames], parts[1][[row], : labels + 1], *parts[2:])
    alone_rows = (rows[0][[row]], rows[1][[row], :labels], rows[2][[row]])
    (one, _), one_grad = loss_and_grad(tdt_loss, alone, alone_rows, durations=DURATIONS)
    np.testing.assert_allclose(one[0], loss[row], rtol=1e-6)
    close(one_grad[0][0], grad[0][row, :frames], 1e-5)
    close(one_grad[1][0], grad[1][row, : labels + 1], 1e-5)
    assert not np.any(grad[0][row, frames:])


def test_dropout_is_the_same_in_both_passes_whatever_the_chunks():
    parts, rows = ragged(scale=0.5)
    settings = dict(blank=3, dropout=0.3, activation="tanh")

    @functools.partial(jit, static_argnames="chunk")
    def run(parts, key, chunk=256):
        def total(*parts):
            loss = rnnt_loss(*parts, *rows, key=key, chunk=chunk, **settings)[0]
            return loss.sum(), loss

        return jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*parts)

    keys = jax.random.split(jax.random.key(1), 6)
    (_, loss), grad = run(parts, keys)
    (_, other), other_grad = run(parts, keys, chunk=5)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    close(grad[2], other_grad[2], 1e-5)
    direction = np.random.default_rng(0).standard_normal(parts[2].shape).astype(np.float32)
    up, down = (
        run([*parts[:2], parts[2] + s * 1e-2 * direction, parts[3]], keys)[0][0] for s in (1, -1)
    )
    np.testing.assert_allclose((up - down) / 2e-2, np.sum(grad[2] * direction), rtol=5e-3)
    drawn = [run(parts, jax.random.split(jax.random.key(i), 6))[0][1] for i in (1, 2)]
    np.testing.assert_array_equal(drawn[0], loss)
    assert np.all(drawn[1][:4] != loss[:4])


def test_bfloat16_is_accepted_and_computed_in_float32():
    parts, rows = ragged()
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in parts)
    full = tuple(x.astype(jnp.float32) for x in half)
    (got, _), grad = loss_and_grad(rnnt_loss, half, rows)
    (want, _), want_grad = loss_and_grad(rnnt_loss, full, rows)
    np.testing.assert_array_equal(got, want)
    for a, b in zip(grad, want_grad):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_logits_of_all_nodes_never_exist():
    B, T, U, J, V = 4, 100, 30, 64, 512
    shapes = [(B, T, J), (B, U + 1, J), (J, V + 5), (V + 5,)]
    parts = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    rows = [jax.ShapeDtypeStruct(s, jnp.int32) for s in [(B,), (B, U), (B,)]]

    def total(parts, rows):
        return tdt_loss(*parts, *rows, blank=V - 1, durations=DURATIONS)[0].sum()

    compiled = jit(jax.grad(total)).lower(parts, rows).compile()
    dense = 4 * B * T * (U + 1) * (V + 5)
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 4


def test_groups_keep_devices_apart():
    """Rows sharded over devices are worked on where they are."""
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    spread = NamedSharding(mesh, PartitionSpec("data"))
    parts, rows = ragged()
    placed = (*(jax.device_put(x, spread) for x in parts[:2]), *parts[2:])
    rows_placed = tuple(jax.device_put(x, spread) for x in rows)
    options = (("groups", 2), ("chunk", 32))
    program = loss_and_grad.lower(
        tdt_loss, placed, rows_placed, durations=DURATIONS, options=options
    ).compile()
    assert "all-gather" not in program.as_text()
    (got, _), grad = program(placed, rows_placed)
    (want, _), want_grad = loss_and_grad(tdt_loss, tuple(parts), rows, durations=DURATIONS)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(grad, want_grad):
        close(a, b, 1e-6)


def test_settings_that_do_not_fit_are_refused():
    parts, rows = ragged()
    for settings, message in [
        ({"blank": 12}, "blank 12 is not among the 12"),
        ({"activation": "gelu"}, "relu, tanh, sigmoid"),
        ({"groups": 4}, "6 rows cannot be worked on in 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            rnnt_loss(*parts, *rows, **({"blank": 3} | settings))
    with pytest.raises(ValueError, match=r"must be \[B, T, J\]"):
        rnnt_loss(parts[0], parts[1][:, 1:], *parts[2:], *rows, blank=3)
    for durations in [(), (0,), (1, 1), (-1, 2)]:
        with pytest.raises(ValueError, match="durations .*: must"):
            tdt_loss(*parts, *rows, blank=3, durations=durations)
