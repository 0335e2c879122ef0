"""The CTC loss against enumeration of all paths, optax and PyTorch, and its rules on bad rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.decoding.ctc import ctc_greedy
from jasr.losses.ctc import ctc_loss


def enumerate_paths(logits, tokens, blank):
    """-log of the summed probability of every frame labelling that collapses to `tokens`."""
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        merged = [symbol for symbol, _ in itertools.groupby(path)]
        if [s for s in merged if s != blank] == list(tokens):
            total += np.exp(sum(log_probs[t, s] for t, s in enumerate(path)))
    return -np.log(total) if total else np.inf


def ragged(seed=0, B=7, T=20, V=7, L=6, blank=0):
    """A batch with repeats, an empty row, a padding row and an infeasible one."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((B, T, V)).astype(np.float32)
    logit_len = np.array([20, 15, 9, 3, 0, 7, 20], np.int32)
    token_len = np.array([6, 3, 4, 5, 0, 0, 6], np.int32)
    tokens = rng.integers(0, V - 1, (B, L)).astype(np.int32)
    tokens[0] = [1, 1, 2, 2, 2, 0]
    tokens += tokens >= blank
    return logits, logit_len, tokens, token_len


INFEASIBLE = 3


@jax.jit
def loss_and_grad(logits, logit_len, tokens, token_len):
    def total(logits):
        loss, feasible = ctc_loss(logits, logit_len, tokens, token_len)
        return loss.sum(), (loss, feasible)

    (_, (loss, feasible)), grad = jax.value_and_grad(total, has_aux=True)(logits)
    return loss, feasible, grad


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_equals_the_sum_over_all_paths(blank):
    rng = np.random.default_rng(blank)
    labels = [s for s in range(3) if s != blank]
    T, rows = 4, []
    for length in range(4):
        rows += [list(r) for r in itertools.product(labels, repeat=length)]
    cases = [(row, t) for row in rows for t in range(T + 1)]
    logits = rng.standard_normal((len(cases), T, 3)).astype(np.float32)
    tokens = np.array([(row + [0] * 3)[:3] for row, _ in cases], np.int32)
    token_len = np.array([len(row) for row, _ in cases], np.int32)
    logit_len = np.array([t for _, t in cases], np.int32)
    loss, feasible = jax.jit(ctc_loss, static_argnums=4)(
        logits, logit_len, tokens, token_len, blank
    )
    want = np.array(
        [enumerate_paths(x[:t], row, blank) for x, (row, t) in zip(logits, cases, strict=True)]
    )
    np.testing.assert_array_equal(feasible, np.isfinite(want))
    np.testing.assert_allclose(loss, np.where(np.isfinite(want), want, 0.0), atol=2e-6)


def test_gradient_equals_finite_differences():
    logits, logit_len, tokens, token_len = ragged()
    _, _, grad = loss_and_grad(logits, logit_len, tokens, token_len)
    rng = np.random.default_rng(1)
    for _ in range(5):
        direction = rng.standard_normal(logits.shape).astype(np.float32)
        up, down = (
            loss_and_grad(logits + s * 1e-2 * direction, logit_len, tokens, token_len)[0].sum()
            for s in (1, -1)
        )
        np.testing.assert_allclose(
            (up - down) / 2e-2, np.sum(np.asarray(grad) * direction), rtol=2e-3, atol=2e-3
        )


def test_gradient_is_weighted_row_by_row():
    logits, *rest = ragged()
    weights = np.linspace(-1.0, 2.0, len(logits)).astype(np.float32)
    grad = jax.jit(jax.grad(lambda x: jnp.vdot(weights, ctc_loss(x, *rest)[0])))(logits)
    plain = loss_and_grad(logits, *rest)[2]
    np.testing.assert_allclose(grad, weights[:, None, None] * plain, atol=1e-6)


def test_agrees_with_optax():
    import optax

    logits, logit_len, tokens, token_len = ragged()
    frame_pad = (np.arange(logits.shape[1]) >= logit_len[:, None]).astype(np.float32)
    token_pad = (np.arange(tokens.shape[1]) >= token_len[:, None]).astype(np.float32)
    loss, feasible, grad = loss_and_grad(logits, logit_len, tokens, token_len)

    def total(x):
        loss = optax.ctc_loss(x, frame_pad, tokens, token_pad)
        return jnp.where(feasible, loss, 0.0).sum(), loss

    (_, want), want_grad = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    np.testing.assert_allclose(loss, np.where(feasible, want, 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, want_grad, atol=1e-5)


@pytest.mark.parametrize("blank", [0, 3, 6])
def test_agrees_with_pytorch_wherever_the_blank_is(blank):
    torch = pytest.importorskip("torch")
    logits, logit_len, tokens, token_len = ragged(blank=blank)

    def total(x):
        loss, feasible = ctc_loss(x, logit_len, tokens, token_len, blank)
        return loss.sum(), (loss, feasible)

    (_, (loss, feasible)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    want = torch.nn.functional.ctc_loss(
        x.log_softmax(-1).transpose(0, 1),
        torch.tensor(tokens, dtype=torch.long),
        torch.tensor(logit_len, dtype=torch.long),
        torch.tensor(token_len, dtype=torch.long),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )
    want.sum().backward()
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-5)


def test_infeasible_rows_have_no_loss_no_gradient_and_say_so():
    loss, feasible, grad = loss_and_grad(*ragged())
    assert list(np.flatnonzero(~np.asarray(feasible))) == [INFEASIBLE]
    assert loss[INFEASIBLE] == 0 and not np.any(grad[INFEASIBLE])
    assert np.all(np.isfinite(grad)) and np.all(np.isfinite(loss))


def test_repeated_tokens_need_a_frame_for_the_blank_between_them():
    tokens = np.array([[1, 1], [1, 2]], np.int32)
    two = np.array([2, 2], np.int32)
    _, feasible = ctc_loss(np.zeros((2, 2, 3), np.float32), two, tokens, two)
    assert list(feasible) == [False, True]


def test_row_without_tokens_must_be_all_blank_and_padding_row_costs_nothing():
    logits, logit_len, tokens, token_len = ragged()
    loss, feasible, grad = loss_and_grad(logits, logit_len, tokens, token_len)
    assert feasible[4] and feasible[5]
    assert loss[4] == 0 and not np.any(grad[4])
    blanks = jax.nn.log_softmax(logits[5, :7])[:, 0]
    np.testing.assert_allclose(loss[5], -blanks.sum(), rtol=1e-6)


def test_a_token_array_without_columns_is_all_blank():
    logits = np.ones((2, 3, 4), np.float32)
    lens = np.array([3, 2], np.int32)
    none = np.zeros((2, 0), np.int32)
    loss, feasible = ctc_loss(logits, lens, none, np.zeros(2, np.int32))
    assert np.all(feasible)
    np.testing.assert_allclose(loss, lens * np.log(4.0), rtol=1e-6)


def test_padding_and_batch_mates_change_nothing():
    logits, logit_len, tokens, token_len = ragged()
    loss, _, grad = loss_and_grad(logits, logit_len, tokens, token_len)
    wide = np.full((3, 27, 7), 1e4, np.float32)  # what padding holds must not matter
    more = np.full((3, 9), 5, np.int32)
    rows = [6, 1, 2]
    for i, row in enumerate(rows):
        wide[i, : logit_len[row]] = logits[row, : logit_len[row]]
        more[i, : token_len[row]] = tokens[row, : token_len[row]]
    loss2, _, grad2 = loss_and_grad(wide, logit_len[rows], more, token_len[rows])
    np.testing.assert_allclose(loss2, np.asarray(loss)[rows], rtol=1e-6)
    for i, row in enumerate(rows):
        n = logit_len[row]
        np.testing.assert_allclose(grad2[i, :n], grad[row, :n], atol=1e-6)
        assert not np.any(grad2[i, n:])


def test_gradient_of_every_frame_sums_to_zero():
    _, _, grad = loss_and_grad(*ragged())
    np.testing.assert_allclose(np.sum(grad, axis=2), 0.0, atol=1e-5)


def test_bfloat16_logits_are_computed_in_float32():
    logits, *rest = ragged()
    low = jnp.asarray(logits, jnp.bfloat16)
    loss, _, grad = loss_and_grad(low, *rest)
    want, _, want_grad = loss_and_grad(low.astype(jnp.float32), *rest)
    assert loss.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, want, rtol=1e-6)  # 16-bit sums would be off by 1e-2
    np.testing.assert_allclose(grad.astype(jnp.float32), want_grad, rtol=2**-8, atol=1e-6)


def test_nan_logits_of_a_valid_frame_reach_the_loss():
    logits, *rest = ragged()
    logits[1, 2] = np.nan
    loss, _, _ = loss_and_grad(logits, *rest)
    assert np.isnan(loss[1]) and np.all(np.isfinite(np.delete(loss, 1)))


def test_long_rows_stay_accurate():
    rng = np.random.default_rng(3)
    T, L, V = 400, 60, 11
    logits = 3 * rng.standard_normal((1, T, V)).astype(np.float32)
    tokens = rng.integers(1, V, (1, L)).astype(np.int32)
    loss, _, grad = loss_and_grad(logits, np.array([T]), tokens, np.array([L]))
    want, want_grad = forward_backward(logits[0].astype(np.float64), tokens[0])
    np.testing.assert_allclose(loss[0], want, rtol=1e-6)
    np.testing.assert_allclose(grad[0], want_grad, atol=1e-3)


def forward_backward(logits, tokens):
    """Loss and gradient of one row in float64: Graves et al. (2006), one state at a time."""
    T, V = logits.shape
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    states = [0]
    for token in tokens:
        states += [int(token), 0]
    S = len(states)

    def sweep(log_probs, states):
        score = np.full((T, S), -np.inf)
        score[0, :2] = log_probs[0, states[:2]]
        for t in range(1, T):
            for s in range(S):
                ways = [score[t - 1, s]] + ([score[t - 1, s - 1]] if s else [])
                if s > 1 and states[s] and states[s] != states[s - 2]:
                    ways.append(score[t - 1, s - 2])
                score[t, s] = np.logaddexp.reduce(ways) + log_probs[t, states[s]]
        return score

    alpha = sweep(log_probs, states)
    beta = sweep(log_probs[::-1], states[::-1])[::-1, ::-1]
    total = np.logaddexp(alpha[-1, -1], alpha[-1, -2])
    grad = np.exp(log_probs)
    for s, symbol in enumerate(states):
        grad[:, symbol] -= np.exp(alpha[:, s] + beta[:, s] - log_probs[:, symbol] - total)
    return -total, grad


def test_equals_nemo(goldens):
    g = np.load(goldens / "ctc" / "nemo_tiny_ctc.npz")
    loss, feasible = ctc_loss(
        g["log_probs"], g["logit_len"], g["tokens"], g["token_len"], g["log_probs"].shape[-1] - 1
    )
    assert np.all(feasible)
    np.testing.assert_allclose(loss, g["loss"], rtol=1e-5)


def test_a_batch_sharded_over_devices_stays_where_it_is():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(tuple(x[:6] for x in ragged()), rows)

    def both(logits, logit_len, tokens, token_len):
        loss, back = jax.vjp(lambda x: ctc_loss(x, logit_len, tokens, token_len)[0], logits)
        return loss, back(jnp.ones_like(loss))[0], ctc_greedy(logits, logit_len)

    program = jax.jit(both).lower(*batch).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program.as_text()
    want = loss_and_grad(*(np.asarray(x) for x in batch))
    loss, grad, _ = program(*batch)
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    np.testing.assert_allclose(grad, want[2], atol=1e-6)
