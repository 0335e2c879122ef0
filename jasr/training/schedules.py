"""Learning rates as functions of the number of updates already made (0 for the first one).

jasr's own schedules have lower-case names. The others are NeMo's, under the names of its classes
and with its values at every step: most rise with (s + 1) / (w + 1) up to s = w = `warmup_steps`,
fall until s = N = `decay_steps`, and are `min_lr` from N + 1 on.
"""

import jax.numpy as jnp

OWN = ("cosine", "linear", "noam", "constant")


def make(config, total_steps):
    """rate(step) -> f32[]: the learning rate of the update after `step` others.

    Args:
      config: has schedule, lr, min_lr, warmup_steps, decay_steps, hold_steps, constant_steps,
        d_model, power and decay_rate (see `OptimConfig`).
      total_steps: where the decay ends, if config.decay_steps is 0.

    Raises:
      ValueError: parts that are longer than the whole, or a setting that the schedule needs
        and does not have.
    """
    for name, users in ONLY.items():
        if vars(config)[name] and config.schedule not in users:
            raise ValueError(f"config.optim.{name} is for {', '.join(users)} only")
    end = config.decay_steps or total_steps
    if config.schedule in OWN:
        return _own(config, end)
    if config.lr < config.min_lr:
        raise ValueError(f"config.optim.lr {config.lr} is below min_lr {config.min_lr}")
    return (_noam if config.schedule == "NoamAnnealing" else _policy)(config, end)


def _own(config, end):
    """The warm-up rises linearly and reaches `lr` after `warmup_steps` updates; "noam" then falls
    with 1/sqrt(step), as Vaswani et al. 2017 eq. 3, scaled so that its peak is `lr`.
    """
    warm = config.warmup_steps
    if config.schedule in ("cosine", "linear") and warm >= end:
        raise ValueError(f"config.optim.warmup_steps {warm} must be below the {end} decay steps")

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warm, 1)) if warm else 1.0
        if config.schedule == "constant":
            return config.lr * rise
        if config.schedule == "noam":
            peak = max(warm, 1)
            fall = jnp.sqrt(peak / jnp.maximum(step + 1, peak))
            return jnp.maximum(config.lr * rise * fall, jnp.where(rise < 1, 0.0, config.min_lr))
        share = jnp.clip((step - warm) / max(end - warm, 1), 0.0, 1.0)
        if config.schedule == "cosine":
            fall = 0.5 * (1 + jnp.cos(jnp.pi * share))
        else:
            fall = 1 - share
        rate = config.min_lr + (config.lr - config.min_lr) * fall
        return jnp.where(rise < 1, config.lr * rise, rate)

    return rate


# ---- NeMo's --------------------------------------------------------------------------------------


def _policy(config, end):
    """Warm-up, `hold_steps` at the peak, a fall, and `min_lr` for the last `constant_steps` and on.

    With constant_steps, as Megatron's, the warm-up is s / w.
    """
    warm, hold, constant = config.warmup_steps, config.hold_steps, config.constant_steps
    held, last = warm + hold, end - constant
    if held >= last:
        raise ValueError(
            f"config.optim.warmup_steps {warm}, hold_steps {hold} and constant_steps {constant} "
            f"together must be below the {end} decay steps"
        )
    fall = _fall(config, end)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        left = jnp.maximum(last - step, 0) / (last - held)
        value = jnp.where(step < held, config.lr, fall(step, left))
        value = jnp.where(step > last, config.min_lr, value)
        rise = step / max(warm, 1) if constant else (step + 1) / (warm + 1)
        return jnp.where((step <= warm) & (warm > 0), config.lr * rise, value)

    return rate


def _fall(config, end):
    """fall(step, left) of a policy; left is what is left of the fall, from 1 to 0."""
    lr, low, warm, hold = config.lr, config.min_lr, config.warmup_steps, config.hold_steps
    match config.schedule:
        case "CosineAnnealing":
            # (1 + cos(pi (1 - left))) / 2, without the loss of digits near the end
            return lambda step, left: low + jnp.square(jnp.sin(0.5 * jnp.pi * left)) * (lr - low)
        case "WarmupAnnealing":
            return lambda step, left: low + left * (lr - low)
        case "PolynomialDecayAnnealing" | "PolynomialHoldDecayAnnealing":
            return lambda step, left: low + left**config.power * (lr - low)
        case "SquareAnnealing":
            return lambda step, left: jnp.maximum(lr * jnp.square(left), low)
        case "SquareRootAnnealing":  # of all steps, not of those after the warm-up: it drops there
            return lambda step, left: jnp.maximum(
                lr * jnp.sqrt(jnp.maximum(end - step, 0) / end), low
            )
        case "InverseSquareRootAnnealing":
            return lambda step, left: lr / jnp.sqrt((step + 1) / (warm + 1))
        case "NoamHoldAnnealing":
            if not warm:
                raise ValueError("config.optim.schedule NoamHoldAnnealing needs warmup_steps")
            power, peak = config.decay_rate, max(1.0, warm**config.decay_rate)
            return lambda step, left: jnp.maximum(
                lr * peak / jnp.maximum(1.0, jnp.maximum(step - hold, 0) ** power), low
            )
    return lambda step, left: lr


def _noam(config, end):
    """lr is a factor, not the peak: the peak is lr / sqrt(d_model * warmup_steps)."""
    if not config.d_model:
        raise ValueError("config.optim.schedule NoamAnnealing needs d_model, the model's width")
    warm = config.warmup_steps
    factor = config.lr * config.d_model**-0.5

    def rate(step):
        step = jnp.maximum(jnp.asarray(step, jnp.float32), 1.0)
        fall = step**-0.5
        value = factor * (jnp.minimum(fall, step * warm**-1.5) if warm else fall)
        return jnp.where(step > warm, jnp.maximum(value, config.min_lr), value)

    return rate


NEMO = (
    "CosineAnnealing", "NoamAnnealing", "NoamHoldAnnealing", "InverseSquareRootAnnealing",
    "WarmupAnnealing", "PolynomialDecayAnnealing", "PolynomialHoldDecayAnnealing",
    "SquareRootAnnealing", "SquareAnnealing", "WarmupPolicy", "WarmupHoldPolicy",
)  # fmt: skip
SCHEDULES = (*OWN, *NEMO)
ONLY = {  # settings that other schedules have no use for
    "hold_steps": ("NoamHoldAnnealing", "PolynomialHoldDecayAnnealing", "WarmupHoldPolicy"),
    "constant_steps": ("CosineAnnealing",),
}


def from_nemo(sched, total_steps):
    """The fields of `OptimConfig` that make NeMo's `optim.sched` section, as a dict.

    Args:
      sched: {"name", "warmup_steps" | "warmup_ratio", "max_steps", "min_lr" ...}.
      total_steps: what ratios are of, where max_steps is not given (NeMo then computes it).

    Raises:
      ValueError: a schedule or a setting that is not reproduced here, or both a number of steps
        and a ratio.
    """
    rest = {k: v for k, v in sched.items() if v is not None}
    name = rest.pop("name", None)
    if name not in NEMO:
        raise ValueError(f"NeMo's schedule {name!r} is not here, only {', '.join(NEMO)}")
    end = rest.pop("max_steps", -1)
    fields = {"schedule": name, "decay_steps": end if end > 0 else total_steps}
    fields["min_lr"] = rest.pop("min_lr", 1e-5 if name == "SquareAnnealing" else 0.0)
    for part in ("warmup", "hold", "constant"):
        steps, ratio = rest.pop(f"{part}_steps", None), rest.pop(f"{part}_ratio", None)
        if steps is not None and ratio is not None:
            raise ValueError(f"NeMo's optim.sched has both {part}_steps and {part}_ratio")
        if steps is not None or ratio is not None:
            fields[f"{part}_steps"] = int(ratio * fields["decay_steps"]) if steps is None else steps
    for key in ("d_model", "power", "decay_rate"):
        if key in rest:
            fields[key] = rest.pop(key)
    for idle in ("monitor", "reduce_on_plateau", "last_epoch"):
        rest.pop(idle, None)
    if rest.pop("cycle", False) or rest:
        raise ValueError(f"NeMo's optim.sched has {sorted(rest) or 'cycle'}, not reproduced here")
    return fields
