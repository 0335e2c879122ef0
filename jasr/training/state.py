"""The state of a training run: one pytree that is donated to, and returned by, every step."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

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
