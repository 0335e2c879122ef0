"""The depthwise convolution of the ASR blocks: values and its written gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.layers.basic import depthwise


def naive(x, kernel, before):
    out = np.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(len(kernel)):
            if 0 <= t + i - before < x.shape[1]:
                out[:, t] += x[:, t + i - before] * kernel[i]
    return out


@pytest.mark.parametrize("before", [0, 2, 4])
def test_depthwise_equals_a_loop_over_frames(before):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 7, 3)), rng.normal(size=(5, 3))
    got = depthwise(jnp.float32(x), jnp.float32(kernel), before)
    np.testing.assert_allclose(got, naive(x, kernel, before), atol=1e-5)


@pytest.mark.parametrize("before", [1, 4])
def test_written_gradient_equals_automatic_differentiation(before):
    rng = np.random.default_rng(1)
    x, kernel, r = (jnp.float32(rng.normal(size=s)) for s in ((2, 7, 3), (5, 3), (2, 7, 3)))

    def plain(x, kernel):
        padded = jnp.pad(x, ((0, 0), (before, 4 - before), (0, 0)))
        return jnp.sum(r * sum(padded[:, i : i + 7] * kernel[i] for i in range(5)))

    got = jax.grad(lambda x, k: jnp.sum(r * depthwise(x, k, before)), (0, 1))(x, kernel)
    for a, b in zip(got, jax.grad(plain, (0, 1))(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
