import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jasr import tree
from jasr.audio import augment
from jasr.training import optim, step


class Line:
    """A task of one linear layer: predicts y f32[B] from x f32[B,3]; rows of weight 0 are pads."""

    def init(self, rng, batch):
        kernel = jax.random.normal(rng, (batch["x"].shape[1],))
        return {"params": {"a": {"kernel": kernel, "bias": jnp.zeros(())}}, "batch_stats": {}}

    def divisors(self, batch):
        return {"mean": jnp.sum(batch["weight"])}

    def loss(self, variables, batch, divisors, keys, number):
        a = variables["params"]["a"]
        errors = jnp.square(batch["x"] @ a["kernel"] + a["bias"] - batch["y"]) * batch["weight"]
        total = jnp.sum(errors) / jnp.maximum(divisors["mean"], 1.0)
        return total, ({}, {"rows": jnp.sum(batch["weight"])})


def batch_of(seed=0, rows=8):
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    weight = np.array([1.0] * (rows - 2) + [0.0] * 2, np.float32)
    return {"x": x, "y": x.sum(1), "weight": weight}


def fresh(config, frozen=lambda path: False, task=None):
    task, batch = task or Line(), batch_of()
    key = jax.random.key(0)
    paths = tree.flatten(jax.eval_shape(lambda: task.init(key, batch))["params"])
    trained = tree.unflatten({p: x for p, x in paths.items() if not frozen(p)})
    tx, _ = optim.make(config, trained, 100)
    state = step.init_state(task, tx, key, batch, frozen, config.ema > 0)
    return jax.jit(functools.partial(step.train_step, task, tx, config)), state


PLAIN = optim.OptimConfig(name="sgd", lr=0.1, schedule="constant", weight_decay=0.0, clip_norm=0.0)


def test_loss_falls():
    run, state = fresh(PLAIN)
    losses = []
    for _ in range(30):
        state, metrics = run(state, batch_of())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.05 * losses[0]


def test_accumulation_divides_so_that_it_equals_the_whole_batch():
    run, state = fresh(PLAIN)
    whole, metrics = run(state, batch_of())
    for parts in (2, 4):
        run, state = fresh(optim.OptimConfig(**{**vars(PLAIN), "accumulate": parts}))
        cut, again = run(state, batch_of())
        np.testing.assert_allclose(metrics["loss"], again["loss"], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(cut.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_non_finite_step_changes_nothing_but_the_counters():
    run, state = fresh(optim.OptimConfig(lr=0.1, schedule="constant", ema=0.9))
    state, _ = run(state, batch_of())
    bad = batch_of()
    bad["x"][0, 0] = np.nan
    after, metrics = run(state, bad)
    for name in ("params", "opt_state", "ema"):
        before, now = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name))
        for a, b in zip(before, now, strict=True):
            np.testing.assert_array_equal(a, b)
    assert int(after.step) == 2 and int(after.bad_steps) == 1
    assert int(metrics["bad_in_row"]) == 1
    after, metrics = run(after, bad)
    assert int(metrics["bad_in_row"]) == 2
    after, metrics = run(after, batch_of())
    assert int(metrics["bad_in_row"]) == 0 and int(after.bad_steps) == 2


def test_run_with_a_bad_step_equals_the_run_that_never_saw_it():
    run, state = fresh(PLAIN)
    clean = state
    bad = batch_of()
    bad["y"][0] = np.inf
    for seed in range(3):
        clean, _ = run(clean, batch_of(seed))
    for seed in (0, None, 1, 2):
        state, _ = run(state, bad if seed is None else batch_of(seed))
    for a, b in zip(jax.tree.leaves(clean.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batch_without_usable_rows_changes_nothing():
    run, state = fresh(optim.OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5, ema=0.9))
    state, _ = run(state, batch_of())
    empty = batch_of()
    empty["weight"][:] = 0
    after, metrics = run(state, empty)
    for name in ("params", "opt_state", "ema"):
        before, now = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name))
        for a, b in zip(before, now, strict=True):
            np.testing.assert_array_equal(a, b)
    assert int(metrics["bad_in_row"]) == 0 and int(after.bad_steps) == 0


def test_frozen_parameters_do_not_move_and_have_no_optimizer_state():
    run, state = fresh(optim.OptimConfig(lr=0.1, schedule="constant"), lambda p: p == "a/bias")
    assert state.frozen == {"a": {"bias": state.frozen["a"]["bias"]}}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (3,)]
    assert len(moments) == 2 and len(jax.tree.leaves(state.opt_state)) == 4
    after, _ = run(state, batch_of())
    assert float(after.frozen["a"]["bias"]) == 0.0
    assert not np.array_equal(after.params["a"]["kernel"], state.params["a"]["kernel"])


class Noisy(Line):
    """Adds noise to y, by row as augmentation does, and by position as dropout does."""

    def __init__(self, kind):
        self.kind = kind

    def loss(self, variables, batch, divisors, keys, number):
        rows = len(batch["y"])
        if self.kind == "augment":
            keys = augment.row_keys(keys["augment"], batch["index"])
            noise = jax.vmap(jax.random.normal)(keys)
        else:
            noise = jax.random.normal(keys["dropout"], (rows,))
        batch = batch | {"y": batch["y"] + noise}
        return super().loss(variables, batch, divisors, keys, number)


def after_noise(kind, accumulate, batch):
    run, state = fresh(dataclasses.replace(PLAIN, accumulate=accumulate), task=Noisy(kind))
    return run(state, batch)[0].params["a"]["kernel"]


def test_micro_batches_see_the_augmentation_of_the_whole_batch_and_dropout_of_their_own():
    batch = batch_of() | {"index": np.arange(8)}
    whole, cut = (after_noise("augment", n, batch) for n in (1, 2))
    np.testing.assert_allclose(whole, cut, rtol=1e-5)
    batch = {k: np.repeat(v[::2], 2, axis=0) for k, v in batch.items()}  # two equal micro-batches
    half = {k: v[::2] for k, v in batch.items()}
    assert not np.allclose(after_noise("dropout", 2, batch), after_noise("dropout", 1, half))


class Normalised(Line):
    """With running statistics beside the layer of a trained and of a frozen module."""

    def init(self, rng, batch):
        stats = {name: {"mean": jnp.zeros(())} for name in ("a", "b")}
        params = super().init(rng, batch)["params"] | {"b": {"scale": jnp.ones(())}}
        return {"params": params, "batch_stats": stats}

    def loss(self, variables, batch, divisors, keys, number):
        total, (_, metrics) = super().loss(variables, batch, divisors, keys, number)
        stats = jax.tree.map(lambda x: x + 1, variables["batch_stats"])
        return total, (stats, metrics)


def test_batch_statistics_of_frozen_modules_stay():
    run, state = fresh(PLAIN, lambda path: path in ("a/bias", "b/scale"), Normalised())
    stats = run(state, batch_of())[0].batch_stats
    assert float(stats["a"]["mean"]) == 1.0 and float(stats["b"]["mean"]) == 0.0


def test_the_learning_rate_does_not_advance_on_skipped_steps():
    config = optim.OptimConfig(lr=1.0, warmup_steps=10)
    run, state = fresh(config)
    rate = optim.schedule(config, 100)
    assert optim.last_rate(rate, state.opt_state) == float(rate(0))
    empty, bad = batch_of(), batch_of()
    empty["weight"][:] = 0
    bad["x"][0] = np.nan
    for batch in (batch_of(), bad, empty, batch_of()):
        state, _ = run(state, batch)
    assert optim.last_rate(rate, state.opt_state) == float(rate(1))
