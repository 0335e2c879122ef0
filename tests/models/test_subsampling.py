"""Subsampling by convolutions: the values and gradients of plain ones, in pieces too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.models.fastconformer import subsampling

B, T, F, C, D = 2, 45, 11, 3, 4


def plain(params, x, depthwise, causal):
    """The same by XLA's own convolutions; nothing is masked."""
    pad = [(2, 1), (2, 1)] if causal else [(1, 1), (1, 1)]

    def convolve(y, weights, stride, pad, groups=1):
        y = jax.lax.conv_general_dilated(
            y,
            weights["kernel"],
            (stride, stride),
            pad,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return y + weights["bias"]

    y = jax.nn.relu(convolve(x[..., None], params["conv_0"], 2, pad))
    for stage in (1, 2):
        if depthwise:
            y = convolve(y, params[f"conv_{3 * stage - 1}"], 2, pad, groups=C)
            y = convolve(y, params[f"conv_{3 * stage}"], 1, "VALID")
        else:
            y = convolve(y, params[f"conv_{2 * stage}"], 2, pad)
        y = jax.nn.relu(y)
    y = y.swapaxes(2, 3).reshape(*y.shape[:2], -1)
    return y @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize("depthwise, causal", [(True, False), (True, True), (False, False)])
def test_values_and_gradients_are_those_of_plain_convolutions(depthwise, causal, monkeypatch):
    x = np.random.default_rng(0).standard_normal((B, T, F)).astype(np.float32)
    length = jnp.full(B, T)
    module = subsampling.ConvSubsampling(depthwise, 8, C, D, causal, masked=False)
    params = jax.jit(module.init)(jax.random.key(0), x, length)["params"]

    def apply(params, x):
        return module.apply({"params": params}, x, length)[0]

    def both(f):
        weights = jnp.cos(jnp.arange(D))
        grad = jax.grad(lambda p, x: jnp.sum(jnp.sin(f(p, x)) @ weights), argnums=(0, 1))
        return jax.jit(lambda p, x: (f(p, x), grad(p, x)))(params, x)

    want = both(lambda p, x: plain(p, x, depthwise, causal))
    for size in (1 << 27, 2 * B * C * 4 * 6 * 4):  # one piece, pieces of two frames
        monkeypatch.setattr(subsampling, "PIECE_BYTES", size)
        for a, b in zip(jax.tree.leaves(both(apply)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_long_inputs_take_bounded_memory():
    module = subsampling.ConvSubsampling(True, 8, 64, 8, False, masked=True)
    x = jax.ShapeDtypeStruct((1, 200_000, 80), jnp.float32)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), x, length)
    program = jax.jit(lambda p, x, n: module.apply(p, x, n)[0]).lower(params, x, length).compile()
    whole = 200_000 // 2 * 40 * 64 * 4  # bytes of what the first convolution gives: 1 GB
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * whole
