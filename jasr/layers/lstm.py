"""torch's LSTM over sequences, with its input product taken of all steps at once."""

import jax
import jax.numpy as jnp


def lstm(x, w_ih, w_hh, bias, h, c):
    """Outputs [B, N, P] of one layer, in x's dtype; products in it, gates and states in f32.

    Args:
      x: f[B, N, I].
      w_ih: f[4P, I], w_hh: f[4P, P], bias: f[4P] (the sum of torch's two); gates i, f, g, o.
      h, c: f32[B, P], the state before the first step.
    """
    w_hh = w_hh.T.astype(x.dtype)
    into = (x.swapaxes(0, 1) @ w_ih.T.astype(x.dtype)).astype(jnp.float32) + bias

    def step(state, into):
        h, c = state
        h, c = _cell(into + _product(h, w_hh), c)
        return (h, c), h

    _, out = jax.lax.scan(step, (h, c), into)
    return out.swapaxes(0, 1).astype(x.dtype)


def gates_of(x, w_ih, bias):
    """What inputs x [N, I] add to the gates, f32[N, 4P]; the other arguments of `lstm`."""
    return _product(x, w_ih.T.astype(x.dtype)) + bias


def lstm_step(gates, w_hh, h, c, dtype):
    """The state (h, c) f32[B, P] after one more input, given as its `gates_of`."""
    return _cell(gates + _product(h, w_hh.T.astype(dtype)), c)


def _product(h, w):
    return (h.astype(w.dtype) @ w).astype(jnp.float32)


def _cell(gates, c):
    """(h, c) f32[B, P] after a step, from f32[B, 4P] and c before it."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c
