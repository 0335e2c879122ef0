"""Adam with moments in 8 bits: its levels, blocks, memory, loss curves, meshes and checkpoints."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jasr import checkpoint, sharding, tree
from jasr.losses.ctc import ctc_loss
from jasr.training import adamw8bit, optim
from jasr.training.adamw8bit import block_counts, block_shape, level_map, levels, scale_by_adam8bit

read = jax.jit(adamw8bit.read, static_argnums=2)
write = jax.jit(adamw8bit.write, static_argnums=1)


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- levels --------------------------------------------------------------------------------------


def test_maps_are_those_of_dynamic_quantisation():
    signed, unsigned = level_map(True), level_map(False)
    for values in (signed, unsigned):
        assert values.shape == (256,) and (np.diff(values) > 0).all() and values[-1] == 1
    assert signed[adamw8bit.ZERO] == 0 and unsigned[0] == 0
    np.testing.assert_array_equal(signed[:127], -signed[128:255][::-1])
    # the least levels; a decade's parts; the decades' sizes
    np.testing.assert_allclose(signed[128:131], [5.5e-7, 3.25e-6, 7.75e-6], rtol=1e-6)
    np.testing.assert_allclose(unsigned[1:3], [3.25e-7, 7.75e-7], rtol=1e-6)
    np.testing.assert_allclose(np.diff(signed[-65:-1]), 0.9 / 64, rtol=1e-4)
    np.testing.assert_allclose(np.diff(unsigned[-129:-1]), 0.9 / 128, rtol=1e-4)
    decades = np.floor(np.log10(levels(False)[1:-1]))
    assert [int((decades == d).sum()) for d in range(-7, 0)] == [2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_levels(signed):
    values = levels(signed)
    rng = np.random.default_rng(0)
    middles = (values[1:] + values[:-1]) / 2
    x = [np.linspace(0, 1, 5001), 10 ** rng.uniform(-9, 0, 5001), values, middles * 0.9999]
    x = np.concatenate([*x, middles * 1.0001]).astype(np.float32)
    got = np.asarray(jax.jit(adamw8bit.nearest, static_argnums=1)(x, signed))
    least = np.abs(x[:, None].astype(np.float64) - values).min(1)
    assert (np.abs(x - values[got]) <= least * 1.001 + 1e-9).all()


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_read_is_near_what_was_written(signed):
    x = normal((64, 640)) * 10.0 ** np.random.default_rng(1).uniform(-4, 2, (64, 640))
    x = x.astype(np.float32) if signed else np.abs(x).astype(np.float32)
    codes, scale = write(x, signed)
    assert codes.dtype == np.uint8 and codes.shape == x.shape
    assert scale.dtype == np.float32 and scale.shape == (64, 4)
    largest = np.abs(x).reshape(64, 4, 160).max(-1)
    np.testing.assert_array_equal(scale, largest)
    share = np.abs(x) / largest.repeat(160, axis=1)
    error = np.abs(np.asarray(read(codes, scale, signed)) - x) / largest.repeat(160, axis=1)
    decade = 10 ** np.maximum(np.ceil(np.log10(share)), -6)
    parts = 2 ** (6 + np.log10(decade) + (not signed))
    # half a part of the decade; at the top, the largest negative number has no level of its own
    assert (error <= decade * 0.9 / parts / 2 * 1.01 + 5e-7).all()
    again = write(np.asarray(read(codes, scale, signed)), signed)
    assert (np.asarray(again[0]) == np.asarray(codes)).mean() > 0.9


def test_zeros_and_the_smallest_numbers_stay_finite():
    x = np.zeros((16, 512), np.float32)
    x[1, :256] = 1e-45
    x[2, 7] = 1e-37
    x[3, 7] = 3e38
    got = np.asarray(read(*write(x, False), False))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_array_equal(got[2:4], x[2:4])


def test_a_second_moment_is_never_rounded_to_zero():
    x = np.full((16, 256), 1e-12, np.float32)
    x[:, 0], x[:, 1] = 1.0, 0.0
    got = np.asarray(read(*write(x, False), False))
    assert (got[:, 2:] > 0).all() and (got[:, 1] == 0).all()


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, block",
    [
        ((1024, 1024), (1, 256)),
        ((1024, 640), (1, 160)),  # 256 does not divide 640, 160 does
        ((640, 1030), (1, 206)),
        ((64, 8193), (1, 249)),  # nothing useful divides 8193
        ((151936,), (128,)),
        ((64, 64), (4, 64)),
        ((512, 3, 3), (16, 3, 3)),
        ((9, 1, 512), (1, 1, 256)),
        ((5000, 1), (250, 1)),
    ],
)
def test_blocks_are_boxes_along_the_last_axes(shape, block):
    assert block_shape(shape) == block
    scales = np.prod(block_counts(shape))
    assert 2 + 8 * scales / np.prod(shape) < 0.3 * 8


@pytest.mark.parametrize("shape", [(3, 8193), (64, 64), (40, 3, 35), (4097,)])
def test_a_large_value_is_felt_in_its_own_block_only(shape):
    x = normal(shape)
    spoilt = x.copy()
    spoilt.flat[0] = 1e6
    before, after = (np.asarray(read(*write(v, True), True)) for v in (x, spoilt))
    inside = np.zeros(shape, bool)
    inside[tuple(slice(n) for n in block_shape(shape))] = True
    np.testing.assert_array_equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).mean() > 0.9
    assert np.abs(before - x).max() < 0.04


# ---- updates -------------------------------------------------------------------------------------


def test_small_tensors_get_adams_updates_bit_for_bit():
    ours, adams = scale_by_adam8bit(0.9, 0.98, 1e-6), optax.scale_by_adam(0.9, 0.98, 1e-6)
    params = {"bias": normal((7,)), "kernel": normal((63, 65))}
    state, want_state = ours.init(params), adams.init(params)
    for seed in range(3):
        grads = jax.tree.map(lambda x, s=seed: normal(x.shape, s), params)
        got, state = ours.update(grads, state)
        want, want_state = adams.update(grads, want_state)
        for name in params:
            np.testing.assert_allclose(got[name], want[name], rtol=2e-6)
    assert state.mu["kernel"].dtype == np.float32 and state.mu_scale["kernel"].shape == ()


def test_the_first_update_is_adams_and_keeps_the_gradients_dtype():
    grads = {"w": normal((64, 128), dtype=ml_dtypes.bfloat16)}
    tx = scale_by_adam8bit(eps=1e-8)
    got, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert got["w"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got["w"], np.sign(grads["w"]))
    assert state.mu["w"].dtype == np.uint8 and int(state.count) == 1


def test_a_tree_without_leaves_is_no_error():
    tx = scale_by_adam8bit()
    updates, state = tx.update({}, tx.init({}))
    assert updates == {} and int(state.count) == 1


def size(state):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_the_state_needs_less_than_three_tenths_of_adams():
    d, v = 1024, 1024
    layer = {
        "norm": {"scale": (d,), "bias": (d,)},
        "ff1": {"kernel": (d, 4 * d)},
        "ff2": {"kernel": (4 * d, d)},
        "self_attn": {name: {"kernel": (d, d)} for name in ("q", "k", "v", "out", "pos")}
        | {"pos_bias_u": (8, 128)},
        "conv": {"pointwise": {"kernel": (1, d, 2 * d)}, "depthwise": {"kernel": (9, 1, d)}},
    }
    shapes = {f"layers_{i}": layer for i in range(2)} | {
        "pre_encode": {"conv": {"kernel": (3, 3, 1, 256)}, "out": {"kernel": (4096, d)}},
        "prediction": {"embedding": (v + 1, 640), "lstm": {"kernel": (640, 2560)}},
        "joint": {"kernel": (640, v + 6)},
    }
    flat = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in tree.flatten(shapes).items()}
    params = tree.unflatten(flat)
    ours = jax.eval_shape(scale_by_adam8bit().init, params)
    adams = jax.eval_shape(optax.scale_by_adam().init, params)
    assert size(ours) <= 0.27 * size(adams)
    qwen = {"embed": jax.ShapeDtypeStruct((151936, 2048), jnp.bfloat16)}
    assert size(jax.eval_shape(scale_by_adam8bit().init, qwen)) < 0.26 * 8 * 151936 * 2048


def curve(name, loss, params, steps, lr=3e-3):
    """Losses f32[steps] of a run; loss(params, step) is of a new batch at every step."""
    config = optim.OptimConfig(name=name, lr=lr, warmup_steps=10, b2=0.98, weight_decay=1e-3)
    tx, _ = optim.make(config, params, steps)

    def step(carry, number):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, number)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return np.asarray(jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[1])


def network(sizes, seed):
    return {
        f"dense_{i}": {
            "kernel": jnp.asarray(normal((m, n), seed + i) / np.sqrt(m)),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def forward(params, x):
    for name in params:
        x = x if name == "dense_0" else jax.nn.silu(x)
        x = x @ params[name]["kernel"] + params[name]["bias"]
    return x


def test_loss_curve_of_a_regression_is_that_of_adamw():
    teacher = network((32, 128, 16), 50)

    def loss(params, step):
        a, b = jax.random.split(jax.random.fold_in(jax.random.key(3), step))
        x = jax.random.normal(a, (128, 32))
        y = forward(teacher, x) + 0.5 * jax.random.normal(b, (128, 16))
        return jnp.mean(jnp.square(forward(params, x) - y))

    run = lambda name: curve(name, loss, network((32, 256, 16), 0), 400)  # noqa: E731
    ours, adams = run("adamw8bit"), run("adamw")
    windows = lambda x: x.reshape(20, 20).mean(1)  # noqa: E731
    assert windows(adams)[-1] < 0.4 * adams[0]
    np.testing.assert_allclose(windows(ours), windows(adams), rtol=0.01)
    assert not np.array_equal(ours, adams)


def test_loss_curve_of_ctc_is_that_of_adamw():
    sounds = jnp.asarray(normal((20, 32), 9))

    def loss(params, step):
        a, b = jax.random.split(jax.random.fold_in(jax.random.key(4), step))
        tokens = jax.random.randint(a, (16, 6), 1, 20)
        frames = jnp.repeat(sounds[tokens], 3, axis=1)
        frames += 2.0 * jax.random.normal(b, frames.shape)
        lengths = jnp.full(16, 18), jnp.full(16, 6)
        values, _ = ctc_loss(forward(params, frames), lengths[0], tokens, lengths[1])
        return values.mean() / 6

    run = lambda name: curve(name, loss, network((32, 256, 20), 0), 300, lr=1e-2)  # noqa: E731
    ours, adams = run("adamw8bit"), run("adamw")
    windows = lambda x: x.reshape(15, 20).mean(1)  # noqa: E731
    assert windows(adams)[-1] < 0.5 * adams[0]
    np.testing.assert_allclose(windows(ours), windows(adams), rtol=0.01)


# ---- meshes and checkpoints ----------------------------------------------------------------------


def test_the_state_is_sharded_like_its_parameters_and_computes_the_same():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    params = {"m": {"kernel": normal((64, 1024)), "odd": normal((8, 1030)), "bias": normal((8,))}}
    rules = ((".*/kernel", ("fsdp", "tensor")), (".*/odd", ("fsdp", None)), (".*", None))
    where = sharding.param_shardings(params, mesh, rules)
    tx = scale_by_adam8bit()
    like = jax.eval_shape(tx.init, params)
    places = sharding.like_params(like, params, where, mesh)
    for part in (places.mu, places.nu):
        assert part["m"]["kernel"].spec == P("fsdp", "tensor")
        assert part["m"]["odd"].spec == P("fsdp", None)

    # what the scales could follow too: no block crosses a shard
    finer = places._replace(
        mu_scale={"m": places.mu_scale["m"] | {"kernel": NamedSharding(mesh, P("fsdp", "tensor"))}}
    )
    plain_state = tx.init(params)
    for out in (places, finer):
        update = jax.jit(tx.update, out_shardings=(where, out))
        state = jax.device_put(plain_state, out)
        for seed in range(2):
            grads = jax.tree.map(lambda x, s=seed: normal(x.shape, s), params)
            got, state = update(jax.device_put(grads, where), state)
            if seed == 0:
                want, one = jax.jit(tx.update)(grads, plain_state)
        want, one = jax.jit(tx.update)(grads, one)
        for a, b in zip(jax.tree.leaves((got, state)), jax.tree.leaves((want, one)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_saved_state_continues_bit_for_bit(tmp_path):
    params = {"m": {"kernel": normal((64, 128)), "bias": normal((8,))}}
    tx = scale_by_adam8bit()
    update = jax.jit(tx.update)
    grads = [jax.tree.map(lambda x, s=s: normal(x.shape, s), params) for s in range(3)]
    state = tx.init(params)
    for g in grads[:2]:
        _, state = update(g, state)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    with checkpoint.Checkpoints(tmp_path / "c") as c:
        c.save(2, {"opt_state": state}, {}, {})
        c.close()
        _, back, _ = c.restore(None, {"opt_state": like})
    want, got = update(grads[2], state), update(grads[2], back["opt_state"])
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)
