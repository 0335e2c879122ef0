"""How the losses of utterances become one number: sums of values over sums of counts.

A loss of a batch is a sum of ratios, each of them sum(value) / sum(count) over the rows. The counts
follow from the data alone, so that a batch's divisors are known before the model runs, and the
contributions of its micro-batches add up to the loss of the whole batch.
"""

import jax.numpy as jnp

REDUCTIONS = ("mean", "mean_batch", "mean_volume")


def scale_and_count(token_len, good, reduction):
    """(f32[B] factor of each row's loss, f32[B] its part of the divisor).

    Args:
      token_len: i32[B] tokens of each row.
      good: bool[B], rows that count: neither padding nor without a path.
      reduction: "mean" = mean over utterances of loss / tokens, "mean_batch" = mean over
        utterances, "mean_volume" = sum of losses / sum of tokens.

    Raises:
      ValueError: another reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"config.loss.reduction {reduction!r}: choose {', '.join(REDUCTIONS)}")
    good = good.astype(jnp.float32)
    length = token_len.astype(jnp.float32)
    scale = good / jnp.maximum(length, 1.0) if reduction == "mean" else good
    return scale, good * length if reduction == "mean_volume" else good


def contribution(losses, scale, divisor):
    """f32[]: what rows of these losses f32[B] add to a loss whose divisor is f32[]."""
    return jnp.sum(jnp.where(scale > 0, losses * scale, 0.0)) / jnp.maximum(divisor, 1.0)
