"""The optax chain of a run, from plain settings."""

import jax
import jax.numpy as jnp
import optax

from jasr import settings, tree
from jasr.training.adamw8bit import scale_by_adam8bit
from jasr.training.schedules import SCHEDULES
from jasr.training.schedules import make as schedule


@settings.section
class OptimConfig:
    """Settings of optimizer and schedule; steps are optimizer steps."""

    name: str = settings.field("adamw", choices=("adamw", "adamw8bit", "sgd"))  # 8bit: of moments
    # the peak; NoamAnnealing's is lr / sqrt(d_model * warmup_steps)
    lr: float = settings.field(1e-3, least=0)
    schedule: str = settings.field("cosine", choices=SCHEDULES)  # see schedules.py
    warmup_steps: int = settings.field(0, least=0)
    decay_steps: int = settings.field(0, least=0)  # where the decay ends; 0 = config.train.steps
    min_lr: float = settings.field(0.0, least=0)
    # at the peak, after the warm-up (NeMo's ...Hold...)
    hold_steps: int = settings.field(0, least=0)
    # at min_lr, the last of the decay steps (CosineAnnealing)
    constant_steps: int = settings.field(0, least=0)
    d_model: int = settings.field(0, least=0)  # of NoamAnnealing
    power: float = settings.field(1.0, least=0)  # of Polynomial(Hold)DecayAnnealing
    decay_rate: float = settings.field(0.5, least=0)  # of NoamHoldAnnealing
    b1: float = settings.field(0.9, least=0, below=1)
    b2: float = settings.field(0.98, least=0, below=1)
    eps: float = settings.field(1e-6, least=0)
    weight_decay: float = settings.field(0.01, least=0)
    decay_rules: tuple = ((r".*/(kernel|embedding|w0|w1|w2|w_left|w_right)", 1.0), (".*", 0.0))
    lr_rules: tuple = ()  # (regex, multiplier) ...; a parameter without a rule has 1.0
    clip_norm: float = settings.field(1.0, least=0)  # global gradient norm; 0 = no clipping
    accumulate: int = settings.field(1, least=1)  # micro-batches that one global batch is cut into
    # decay of the exponential moving average of the parameters; 0 = none
    ema: float = settings.field(0.0, least=0, below=1)
    # the run stops after so many non-finite steps in a row; 0 = never
    max_bad_steps: int = settings.field(10, least=0)


def _scale_by_tree(factors):
    """Updates times one number for each parameter path."""

    def update(updates, state, params=None):
        flat = {p: u * factors[p] for p, u in tree.flatten(updates).items()}
        return tree.unflatten(flat), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make(config, params, total_steps, frozen=()):
    """(optax transformation, schedule) for a tree of trainable parameters.

    Clipping by global norm, Adam moments, decoupled weight decay by rule (Loshchilov & Hutter
    2019), multipliers by rule, learning rate.

    Args:
      params: tree of arrays or ShapeDtypeStructs; only names are read.
      frozen: paths of the parameters that are not trained; a rule may match these alone.

    Raises:
      tree.TreeError: a rule that matches no parameter, a parameter without a decay rule.
      ValueError: parts of the schedule that are longer than the whole.
    """
    rate = schedule(config, total_steps)
    paths = list(tree.flatten(params))
    whole = [*paths, *frozen]
    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    if config.name == "adamw":
        chain.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    elif config.name == "adamw8bit":
        chain.append(scale_by_adam8bit(config.b1, config.b2, config.eps))
    else:
        chain.append(optax.trace(config.b1) if config.b1 else optax.identity())
    if config.weight_decay:
        decay = tree.match(config.decay_rules, whole, what="config.optim.decay_rules rule")
        mask = tree.unflatten({p: decay[p] != 0 for p in paths})
        odd = {v for v in decay.values() if v not in (0.0, 1.0)}
        if odd:
            raise ValueError(f"config.optim.decay_rules values must be 0 or 1, got {sorted(odd)}")
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    if config.lr_rules:
        found = tree.match(config.lr_rules, whole, what="config.optim.lr_rules rule", optional=True)
        chain.append(_scale_by_tree({p: found.get(p, 1.0) for p in paths}))
    chain.append(optax.scale_by_learning_rate(rate))
    return optax.chain(*chain), rate


def last_rate(rate, opt_state):
    """The learning rate of the last update that was made; skipped steps do not advance it.

    Args:
      rate, opt_state: schedule and state of the transformation that `make` returned.
    """
    return float(rate(max(int(opt_state[-1].count) - 1, 0)))


def ema_update(ema, params, step, decay):
    """The moving average after `step` updates; the decay itself warms up as (1 + t) / (10 + t)."""
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step)).astype(jnp.float32)
    return jax.tree.map(lambda e, p: e + (1 - now) * (p.astype(e.dtype) - e), ema, params)
