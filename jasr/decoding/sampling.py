"""Drawing a token from logits: temperature, the k most likely, the nucleus; each row by its key.

Pure functions of arrays. The order is that of most language models' code: the temperature first,
then top-k, then top-p (Holtzman et al., 2020) among what is left.
"""

import jax
import jax.numpy as jnp


def top_k(logits, k):
    """Logits f[..., V] with -inf for all but the k largest; of equal ones at the edge all stay.

    k: static int; 0 keeps all.
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits, p):
    """Logits f[..., V] with -inf for all but the fewest most likely whose probabilities reach p.

    The most likely one always stays. Of tokens as likely as the last one that is needed all stay.

    Args:
      p: f[...] or a number; 1 keeps all.
    """
    p = jnp.asarray(p, logits.dtype)[..., None]
    falling = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    needed = (before < p) | (p >= 1)
    needed = needed.at[..., 0].set(True)
    least = jnp.min(jnp.where(needed, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def sample(keys, logits, temperature, *, k=0, p=1.0):
    """Tokens i32[B], each drawn by its row's key alone.

    Args:
      keys: [B] random keys, one a row.
      logits: f[B, V].
      temperature: f[B] or a number; 0 = the most likely token, of equal ones the lowest id.
      k, p: of `top_k` and `top_p`; p may be f[B].
    """
    logits = logits.astype(jnp.float32)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), logits.shape[:1])
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    drawn = jax.vmap(jax.random.categorical)(keys, top_p(top_k(scaled, k), p))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
