"""Attention against a loop over queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.layers import attention
from tests.layers.fast_weight_goldens import error


def naive(q, k, v, reads):
    """Softmax attention query by query over the keys that `reads(b, i, j)` allows."""
    out = np.zeros_like(q)
    for b, i, n in np.ndindex(q.shape[:3]):
        keys = [j for j in range(k.shape[1]) if reads(b, i, j)]
        if not keys:
            continue
        score = k[b, keys, n] @ q[b, i, n] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        out[b, i, n] = weight @ v[b, keys, n] / weight.sum()
    return out


def tokens(seed=0):
    r = np.random.default_rng(seed)
    return tuple(r.normal(size=(2, 10, 2, 4)).astype(np.float32) for _ in range(3))


CASES = {
    "full": (dict(causal=False), lambda i, j: True),
    "window on both sides": (dict(causal=False, window=3), lambda i, j: abs(i - j) < 3),
    "causal": (dict(causal=True), lambda i, j: j <= i),
    "causal window": (dict(causal=True, window=4), lambda i, j: i - 4 < j <= i),
    "to the end of the chunk": (
        dict(causal=True, window=5, chunk=4),
        lambda i, j: i - 5 < j < (i // 4 + 1) * 4,
    ),
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_a_loop_over_visible_keys(name, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(attention, "DENSE_FRAMES", 4)
        monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    limits, reads = CASES[name]
    q, k, v = tokens()
    length = np.array([10, 7])
    with jax.disable_jit():
        got = attention.attend(q, k, v, key_len=jnp.asarray(length), **limits)
    want = naive(q, k, v, lambda b, i, j: reads(i, j) and j < length[b])
    valid = np.arange(10) < length[:, None]  # a pad query may have no key at all
    assert error(got[valid], want[valid]) < 1e-6


def test_written_backward_pass_equals_the_derived_one():
    q, k, v = (x.transpose(0, 2, 1, 3) for x in tokens())
    bias = np.where(np.arange(10) < np.array([[10], [7]]), 0, attention.MASKED)[:, None, None]

    def derived(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) + bias)
        return jnp.einsum("bnts,bnsh->bnth", weights, v)

    d_out = tokens(1)[0].transpose(0, 2, 1, 3)
    with jax.disable_jit():
        want, want_grad = jax.vjp(derived, q, k, v)
        got, got_grad = jax.vjp(
            lambda *x: attention.softmax_attention(*x, jnp.asarray(bias, jnp.float32)), q, k, v
        )
        assert error(got, want) < 1e-6
        for a, b in zip(got_grad(d_out), want_grad(d_out), strict=True):
            assert error(a, b) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_blocks_have_the_gradients_of_one_piece(name, monkeypatch):
    q, k, v = tokens()
    d_out = tokens(1)[0]

    def gradients():
        def out(*x):
            return attention.attend(*x, key_len=jnp.array([10, 7]), **CASES[name][0])

        with jax.disable_jit():
            return jax.vjp(out, q, k, v)[1](jnp.asarray(d_out).at[1, 7:].set(0))

    want = gradients()
    monkeypatch.setattr(attention, "DENSE_FRAMES", 4)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    for a, b in zip(gradients(), want, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_rotation_inside_the_blocks_equals_rotation_before_them(name, monkeypatch):
    qkv, d_out = jnp.stack(tokens(), axis=2), jnp.asarray(tokens(1)[0]).at[1, 7:].set(0)
    table, length = attention.rope_table(10, 4, 100.0), jnp.array([10, 7])

    def run(qkv):
        out = attention.rotary_attention(qkv, table, key_len=length, **CASES[name][0])
        return jnp.where((jnp.arange(10) < length[:, None])[..., None, None], out, 0)

    with jax.disable_jit():
        want, want_grad = jax.vjp(run, qkv)
        monkeypatch.setattr(attention, "DENSE_FRAMES", 4)
        monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
        got, got_grad = jax.vjp(run, qkv)
        assert error(got, want) < 1e-6 and error(got_grad(d_out)[0], want_grad(d_out)[0]) < 1e-5


def test_a_window_on_both_sides_beyond_a_block_reads_no_more_than_its_span():
    """2 * (QUERY_BLOCK + 2 * (window - 1)) keys at most, whatever the length; lowered, not run."""
    frames, window = 4 * attention.DENSE_FRAMES, 100
    x = jax.ShapeDtypeStruct((1, frames, 1, 8), jnp.float32)

    def out(q, k, v, key_len):
        return attention.attend(q, k, v, causal=False, window=window, key_len=key_len).sum()

    grad = jax.jit(jax.grad(out, (0, 1, 2)))
    text = grad.lower(x, x, x, jax.ShapeDtypeStruct((1,), jnp.int32)).as_text()
    block = attention.QUERY_BLOCK
    assert f"tensor<1x1x{block}x{block + 2 * (window - 1)}xf32>" in text  # scores of one block
    assert f"x{frames}x{frames}x" not in text and f"x{block}x{frames}x" not in text


def test_a_row_of_padding_has_a_key_where_cudnn_attends(monkeypatch):
    given = {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, **settings: given.update(settings)
    )
    x = jnp.zeros((2, 4, 1, 8), jnp.bfloat16)
    attention.attend(x, x, x, causal=False, key_len=jnp.array([4, 0]))
    assert given["key_value_seq_lengths"].tolist() == [4, 1]


def test_a_row_without_valid_keys_stays_finite():
    q, k, v = tokens()
    grads = jax.grad(
        lambda q: attention.attend(q, k, v, causal=False, key_len=jnp.array([10, 0])).sum()
    )(q)
    assert np.all(np.isfinite(grads))


def test_rotary_scores_depend_on_distance_only():
    r = np.random.default_rng(0)
    q, k = (np.broadcast_to(r.normal(size=(1, 1, 1, 8)), (1, 6, 1, 8)) for _ in range(2))
    table = attention.rope_table(6, 8, 10000.0)
    rotated = [np.asarray(attention.rope(jnp.asarray(x), table))[0, :, 0] for x in (q, k)]
    scores = rotated[0] @ rotated[1].T
    for shift in range(1, 5):
        np.testing.assert_allclose(np.diag(scores, shift), scores[0, shift], rtol=1e-4, atol=1e-4)
    later = attention.rope_table(3, 8, 10000.0, offset=3)
    np.testing.assert_allclose(later[0], table[0][3:], rtol=1e-6)
