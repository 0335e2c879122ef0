"""The training step of every task: gradients of a summed loss, accumulation, guarded update."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import optax

from jasr import tree
from jasr.training.optim import ema_update
from jasr.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length and rhythm of a run, in optimizer steps."""

    steps: int = 1000
    log_every: int = 50
    eval_every: int = 500  # validate and save
    save_every: int = 0  # save more often than that; 0 = no
    sample_every: int = 0  # show one prediction more often than that; 0 = no
    tensorboard: bool = False

    def __post_init__(self):
        for name, least in dict(
            steps=1, log_every=1, eval_every=1, save_every=0, sample_every=0
        ).items():
            if getattr(self, name) < least:
                raise ValueError(f"config.train.{name} must be at least {least}")
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
    """Mean loss, its gradient, the new batch statistics and the summed metrics.

    Sums of losses and of weights run over all micro-batches before the one division, so that the
    result is that of the whole batch (batch statistics apart, which follow micro-batch order).
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    augment, dropout = jax.random.split(rng)

    def loss(params, batch_stats, rows, number):
        variables = {"params": tree.merge(params, state.frozen), "batch_stats": batch_stats}
        # Dropout falls on positions in the micro-batch, augmentation on rows by their index.
        keys = {"augment": augment, "dropout": jax.random.fold_in(dropout, number)}
        return task.loss(variables, rows, keys, state.step)

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
    weight = jnp.maximum(metrics["weight"], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    return total / weight, grads, stats, metrics


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
    loss, grads, stats, metrics = gradients(task, state, batch, optim.accumulate)
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    usable = metrics["weight"] > 0
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
    metrics = dict(metrics, loss=loss, grad_norm=norm, bad=bad, bad_in_row=state.bad_in_row)
    return state, metrics
