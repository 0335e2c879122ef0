"""Generation by a seam.Stepper: in one compiled loop, or step by step while somebody listens.

    stepper = loading.verb(task, "generate")
    run = jax.jit(lambda variables, batch, key: generation.generate(
        stepper, variables, batch, key=key, max_steps=64, until=lambda out: out["token"] == 2))
    texts = generation.emitted(stepper, run(variables, batch, key))

Rows know nothing of each other: row r draws from the key and index[r], it ends by itself, and what
the others do after that changes nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jasr.audio.augment import row_keys


class Generated(NamedTuple):
    """What rows gave."""

    prompt: Any  # the outputs of `start`
    outputs: Any  # the outputs of the steps, [B, max_steps, ...]; zeros after a row's end
    length: Any  # i32[B] steps of each row
    ended: Any  # bool[B]: by `until`, not for want of steps


def generate(stepper, variables, batch, *, key, max_steps, until, steps=None, inputs=None):
    """Runs a Stepper until every row has ended, in one loop, to be jitted.

    Args:
      stepper: seam.Stepper.
      batch: what `stepper.start` takes, with `index` i64[B]; -1 is a padding row, which is over
        before it begins.
      key: random key; step n of a row has the key of (key, index of the row, n).
      max_steps: static int: room for so many steps.
      until: outputs of a step -> bool[B], rows that end with it (its output still counts).
      steps: i32[B], a row's own number of steps at most; None = max_steps.
      inputs: n -> {name: [B, ...]}, what step n is given beside "fresh" and "last"; None: nothing.

    Returns:
      Generated.
    """
    keys = row_keys(key, batch["index"])
    state, prompt = stepper.start(variables, batch)
    B = len(batch["index"])
    most = jnp.full(B, max_steps, jnp.int32) if steps is None else jnp.minimum(steps, max_steps)
    most = jnp.where(batch["index"] < 0, 0, most)

    def step(n, state):
        given = {} if inputs is None else inputs(n)
        given = {**given, "fresh": jnp.zeros(B, bool), "last": n + 1 == most}
        return stepper.step(variables, state, given, step_keys(keys, n))

    def turn(carry):
        n, state, kept, length, ended = carry
        state, outputs = step(n, state)
        going = (n < most) & ~ended
        kept = jax.tree.map(lambda rows, x: rows.at[:, n].set(_rows(going, x)), kept, outputs)
        return n + 1, state, kept, length + going, ended | (going & until(outputs))

    _, made = jax.eval_shape(step, jnp.int32(0), state)
    kept = jax.tree.map(lambda x: jnp.zeros((B, max_steps, *x.shape[1:]), x.dtype), made)
    carry = jnp.int32(0), state, kept, jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    carry = jax.lax.while_loop(lambda c: jnp.any((c[0] < most) & ~c[4]), turn, carry)
    return Generated(prompt, *carry[2:])


def emitted(stepper, generated):
    """What each row says, [B]: `stepper.emit` of its steps."""
    outputs, length = jax.device_get((generated.outputs, generated.length))
    return [
        stepper.emit(jax.tree.map(lambda x, r=row, n=n: x[r, :n], outputs))
        for row, n in enumerate(length)
    ]


class Live:
    """Rows that are driven step by step, and may begin and end at any of them.

    Args:
      stepper: seam.Stepper.
      batch: what `stepper.start` takes, with `index` i64[B].
      key: random key.
    """

    def __init__(self, stepper, variables, batch, key):
        self.stepper, self.variables, self.number = stepper, variables, 0
        self.keys = row_keys(key, jnp.asarray(batch["index"]))
        self.rows = len(batch["index"])
        self.state, self.prompt = jax.jit(stepper.start)(variables, batch)
        self._keys = jax.jit(step_keys)
        self._step = jax.jit(stepper.step, donate_argnums=1)

    def step(self, inputs=None, fresh=(), last=()):
        """What each row says, [B], after one more step.

        Args:
          inputs: {name: [B, ...]} as `stepper.inputs` says.
          fresh, last: numbers of the rows that begin anew, and of those for which this is the last.
        """
        given = dict(inputs or {})
        for name, rows in (("fresh", fresh), ("last", last)):
            given[name] = np.isin(np.arange(self.rows), list(rows))
        keys = self._keys(self.keys, self.number)
        self.state, outputs = self._step(self.variables, self.state, given, keys)
        self.number += 1
        outputs = jax.device_get(outputs)
        return [
            self.stepper.emit(jax.tree.map(lambda x, r=row: x[r : r + 1], outputs))
            for row in range(self.rows)
        ]


def step_keys(keys, n):
    """The rows' keys [B] of step n."""
    return jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)


def _rows(rows, x):
    """x [B, ...] in the rows bool[B], zeros in the others."""
    return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
