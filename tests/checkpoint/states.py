"""States that the checkpoint tests save, and how two of them are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "model": {
            "layers_0": {"kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)},
            "head": {"bias": jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16)},
        }
    }
    return {
        "params": params,
        "batch_stats": {},
        "opt_state": TX.init(params),
        "ema": jax.tree.map(lambda x: x * 2, params),
        "rng": {"key": jax.random.key(seed), "step": jnp.int32(seed), "host": np.arange(3)},
    }


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(x):
        if isinstance(x, jax.Array):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return x

    return jax.tree.map(one, state)


def host_params(seed):
    return jax.tree.map(np.asarray, make_state(seed)["params"])


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
