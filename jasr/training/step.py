"""The training step of every task: its state, gradients, accumulation, guarded update."""

import functools
import importlib.util
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jasr import settings, tree
from jasr.training.optim import ema_update


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes: one pytree that is donated to, and returned by, every step.

    step: i32[] updates tried; bad_steps: i32[] skipped because something was not finite;
    bad_in_row: i32[] of these without a good one between; params: trainable parameters;
    frozen: the others; batch_stats: running statistics; opt_state: optax; ema: moving average of
    `params` or {}; rng: u32[2] key data of the run's key (step keys are folded from it).
    """

    step: Any
    bad_steps: Any
    bad_in_row: Any
    params: Any
    frozen: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    rng: Any


@settings.section
class RunConfig:
    """Length and rhythm of a run, in optimizer steps."""

    steps: int = settings.field(1000, least=1)
    log_every: int = settings.field(50, least=1)
    eval_every: int = settings.field(500, least=1)  # validate and save
    save_every: int = settings.field(0, least=0)  # save more often than that; 0 = no
    sample_every: int = settings.field(0, least=0)  # show one prediction more often; 0 = no
    # length in passes over the training data instead of steps; 0 = steps
    epochs: float = settings.field(0.0, least=0, below=math.inf)
    validate: tuple = ()  # names of what is measured on the validation sets; () = all there is
    tensorboard: bool = False

    def __post_init__(self):
        if self.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise ValueError(
                "config.train.tensorboard needs tensorboardX: pip install tensorboardX"
            )


def init_state(task, tx, rng, batch, is_frozen, ema):
    """A fresh TrainState; to be jitted with `out_shardings`, or shaped with jax.eval_shape.

    Args:
      rng: the run's key.
      batch: a batch (or its shapes) of any bucket.
      is_frozen: function path -> bool of the parameters that no gradient reaches.
      ema: whether to keep a moving average of the trainable parameters.
    """
    variables = task.init(jax.random.fold_in(rng, 0xFFFFFFFF), batch)
    paths = tree.flatten(variables["params"])
    params, frozen = tree.split(variables["params"], {p for p in paths if not is_frozen(p)})
    return TrainState(
        step=jnp.int32(0),
        bad_steps=jnp.int32(0),
        bad_in_row=jnp.int32(0),
        params=params,
        frozen=frozen,
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.array, params) if ema else {},
        rng=jax.random.key_data(rng),
    )


def micro_batches(batch, count):
    """The batch cut into `count` micro-batches, [B, ...] -> [count, B / count, ...].

    Rows are dealt out in turn, so that a batch split over devices stays where it is.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), batch
    )


def gradients(task, state, batch, accumulate):
    """Loss, its gradient, the new batch statistics, the summed metrics, and whether any row counts.

    The divisors of the whole batch come first, from its data alone; what the micro-batches
    contribute then adds up to the loss of the whole batch (batch statistics apart, which follow
    micro-batch order).
    """
    divisors = task.divisors(batch)
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    augment, dropout = jax.random.split(rng)

    def loss(params, batch_stats, rows, number):
        variables = {"params": tree.merge(params, state.frozen), "batch_stats": batch_stats}
        # Dropout falls on positions in the micro-batch, augmentation on rows by their index.
        keys = {"augment": augment, "dropout": jax.random.fold_in(dropout, number)}
        return task.loss(variables, rows, divisors, keys, state.step)

    grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (total, (stats, metrics)), grads = grad(state.params, state.batch_stats, batch, 0)
    else:

        def body(carry, rows_and_index):
            grads, total, stats, metrics = carry
            rows, i = rows_and_index
            (t, (stats, m)), g = grad(state.params, stats, rows, i)
            add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
            return (add(grads, g), total + t, stats, add(metrics, m)), None

        rows = micro_batches(batch, accumulate)
        first = jax.tree.map(lambda x: x[0], rows)
        shapes = jax.eval_shape(grad, state.params, state.batch_stats, first, 0)
        (_, (_, metrics)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        carry = (grads, jnp.float32(0), state.batch_stats, metrics)
        (grads, total, stats, metrics), _ = jax.lax.scan(
            body, carry, (rows, jnp.arange(accumulate))
        )
    usable = functools.reduce(jnp.logical_or, [value > 0 for value in divisors.values()])
    return total, grads, stats, metrics, usable


def _without_frozen(stats, state):
    """The batch statistics `stats`, but those of wholly frozen modules as they were."""

    def modules(params):
        return {path.rpartition("/")[0] for path in tree.flatten(params)}

    frozen, old = modules(state.frozen) - modules(state.params), tree.flatten(state.batch_stats)
    return tree.unflatten(
        {
            path: old[path] if path.rpartition("/")[0] in frozen else new
            for path, new in tree.flatten(stats).items()
        }
    )


def train_step(task, tx, optim, state, batch):
    """The state after one batch, and the step's metrics (f32 scalars).

    A step whose loss, gradient or update is not finite changes nothing but the counters `step`,
    `bad_steps` and `bad_in_row`; a batch without any usable row changes nothing either, and is
    not counted as bad. Batch statistics of modules whose parameters are all frozen stay.
    """
    loss, grads, stats, metrics, usable = gradients(task, state, batch, optim.accumulate)
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    params = optax.apply_updates(state.params, updates)
    good = finite & usable

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    params = keep(params, state.params)
    ema = state.ema
    if optim.ema > 0:
        ema = keep(ema_update(state.ema, params, state.step, optim.ema), state.ema)
    bad = (~finite).astype(jnp.int32)
    state = state.replace(
        step=state.step + 1,
        bad_steps=state.bad_steps + bad,
        bad_in_row=jnp.where(finite, 0, state.bad_in_row + 1),
        params=params,
        batch_stats=keep(_without_frozen(stats, state), state.batch_stats),
        opt_state=keep(opt_state, state.opt_state),
        ema=ema,
    )
    guards = dict(bad=bad, bad_in_row=state.bad_in_row, usable=usable.astype(jnp.int32))
    metrics = dict(metrics, loss=loss, grad_norm=norm, **guards)
    return state, metrics
