import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import tree
from jasr.training import optim

PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("rows", [2, 2000])
def test_one_step_equals_adamw_by_hand(name, rows):
    params = {"a": {"kernel": jnp.ones((rows, 3)), "bias": jnp.ones(3)}}
    cfg = optim.OptimConfig(
        name=name, lr=0.1, schedule="constant", weight_decay=0.5, clip_norm=0.0, eps=1e-8
    )
    tx, _ = optim.make(cfg, params, 10)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.3), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * (1 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(updates["a"]["bias"], -0.1, rtol=1e-5)  # biases do not decay


def test_lr_rules_and_the_last_rate_hold_with_moments_in_8_bits():
    params = {"a": {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}}
    cfg = optim.OptimConfig(
        name="adamw8bit", lr=1.0, schedule="WarmupPolicy", warmup_steps=3, weight_decay=0.0,
        lr_rules=((".*/kernel", 0.1),),
    )  # fmt: skip
    tx, rate = optim.make(cfg, params, 10)
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.025, rtol=1e-3)
    np.testing.assert_allclose(updates["a"]["bias"], -0.25, rtol=1e-3)
    _, state = tx.update(params, state, params)
    assert optim.last_rate(rate, state) == pytest.approx(0.5)


def test_lr_rules_multiply_and_dead_rules_raise():
    cfg = optim.OptimConfig(
        name="sgd", b1=0.0, lr=1.0, schedule="constant", weight_decay=0.0, clip_norm=0.0,
        lr_rules=((".*/bias", 0.1),),
    )  # fmt: skip
    tx, _ = optim.make(cfg, PARAMS, 10)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["a"]["bias"], -0.1)
    np.testing.assert_allclose(updates["a"]["kernel"], -1.0)
    with pytest.raises(tree.TreeError, match="lr_rules"):
        optim.make(optim.OptimConfig(lr_rules=(("nothing", 2.0),)), PARAMS, 10)


def test_ema_warms_up_and_then_keeps_its_decay():
    old, new = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    early = float(optim.ema_update(old, new, jnp.int32(0), 0.99)["w"])
    late = float(optim.ema_update(old, new, jnp.int32(10**6), 0.99)["w"])
    np.testing.assert_allclose([early, late], [0.9, 0.01], rtol=1e-3)


def test_rules_hold_for_frozen_parameters_too():
    biases = {"a": {"bias": PARAMS["a"]["bias"]}}
    with pytest.raises(tree.TreeError, match="match nothing"):
        optim.make(optim.OptimConfig(), biases, 10)
    tx, _ = optim.make(optim.OptimConfig(), biases, 10, frozen=("a/kernel",))
    assert set(tx.update(biases, tx.init(biases), biases)[0]["a"]) == {"bias"}


@pytest.mark.parametrize(
    "wrong",
    [dict(accumulate=0), dict(warmup_steps=-1), dict(ema=1.0), dict(clip_norm=-1.0)],
    ids=str,
)
def test_values_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"OptimConfig.{next(iter(wrong))}"):
        optim.OptimConfig(**wrong)


def test_unknown_optimizers_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="must be one of 'adamw', 'adamw8bit', 'sgd'"):
        optim.make(optim.OptimConfig(name="adam"), PARAMS, 10)
