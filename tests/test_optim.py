import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import optim, tree

PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def lr(step, **kw):
    return float(optim.schedule(optim.OptimConfig(**kw), 100)(step))


def test_warmup_reaches_the_peak_and_cosine_ends_at_min_lr():
    kw = dict(lr=2.0, warmup_steps=10, min_lr=0.5)
    rates = [lr(s, **kw) for s in (0, 4, 9, 10)]
    np.testing.assert_allclose(rates, [0.2, 1.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(lr(55, **kw), 1.25, rtol=1e-6)
    np.testing.assert_allclose([lr(100, **kw), lr(500, **kw)], [0.5, 0.5], rtol=1e-6)


def test_linear_falls_in_a_line_and_decay_steps_replace_the_total():
    kw = dict(schedule="linear", lr=1.0, decay_steps=50)
    np.testing.assert_allclose([lr(s, **kw) for s in (0, 25, 50)], [1.0, 0.5, 0.0], atol=1e-6)


def test_noam_falls_with_the_square_root_after_its_peak():
    kw = dict(schedule="noam", lr=1.0, warmup_steps=4)
    np.testing.assert_allclose([lr(1, **kw), lr(3, **kw), lr(15, **kw)], [0.5, 1.0, 0.5], rtol=1e-6)


def test_warmup_longer_than_the_decay_is_refused():
    with pytest.raises(ValueError, match="warmup_steps"):
        lr(0, warmup_steps=100)
    with pytest.raises(ValueError, match="schedule"):
        lr(0, schedule="cosin")


def test_one_step_equals_adamw_by_hand():
    cfg = optim.OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5, clip_norm=0.0, eps=1e-8)
    tx, _ = optim.make(cfg, PARAMS, 10)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.3), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * (1 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(updates["a"]["bias"], -0.1, rtol=1e-5)  # biases do not decay


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
    with pytest.raises(ValueError, match=f"config.optim.{next(iter(wrong))}"):
        optim.OptimConfig(**wrong)
