"""Newton-Schulz orthogonalisation ("Muon"), with norms that are safe at zero.

Paper arXiv 2505.23884, Appendix A; reference zeropower_via_newtonschulz5 (lact_llm, lact_nvs).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# One (a, b, c) per iteration of X <- aX + (bA + cAA)X with A = XX'. Five tuned triples: lact_llm,
# lact_asr, minimal.
MUON_TUNED = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def muon_constant(steps):
    """The coefficients of lact_nvs and of the paper: one triple `steps` times.

    0 steps are not "off": they still divide by the Frobenius norm.
    """
    return ((3.4445, -4.7750, 2.0315),) * steps


def guarded_norm(x, axis=-1):
    """Euclidean norm over `axis` (kept) whose gradient at zero is 0, as torch's; JAX's is NaN."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def newton_schulz(g, coefficients):
    """g / (|g|_F + 1e-7) pushed towards the nearest orthogonal matrix, f32[..., m, n].

    f32 throughout: the reference's bf16 iteration is off by up to a quarter of the largest value.
    """
    g = jnp.asarray(g, jnp.float32)
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = _iterate(x / (guarded_norm(x, axis=(-2, -1)) + 1e-7), coefficients)
    return x.mT if tall else x


# Accelerators multiply f32 in bf16 or TF32 unless told otherwise.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _outer(x, y):
    return jnp.einsum("...ij,...kj->...ik", x, y, precision=jax.lax.Precision.HIGHEST)


def _polynomial(x, abc):
    """A = XX' and aI + bA + cAA."""
    a, b, c = abc
    gram = _outer(x, x)
    return gram, a * jnp.eye(gram.shape[-1]) + b * gram + c * _product(gram, gram)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _iterate(x, coefficients):
    for abc in coefficients:
        x = _product(_polynomial(x, abc)[1], x)
    return x


def _iterate_forward(x, coefficients):
    kept = []
    for abc in coefficients:
        # named, so that a surrounding jax.checkpoint can keep the iterates, or all three
        x = checkpoint_name(x, "iterate")
        gram, poly = (checkpoint_name(y, "gram") for y in _polynomial(x, abc))
        kept.append((x, gram, poly))
        x = _product(poly, x)
    return checkpoint_name(x, "iterate"), kept


def _iterate_backward(coefficients, kept, d_x):
    """Four products an iteration, where the derived pass has six.

    A and P = aI + bA + cAA are symmetric, so with S = dP + dP' the Gram's gradient and its
    transpose add up to bS + c(SA + (SA)'): the derived pass multiplies each of these on its own.
    """
    for (_, b, c), (x, gram, poly) in zip(reversed(coefficients), reversed(kept), strict=True):
        d_poly = _outer(d_x, x)
        both = d_poly + d_poly.mT
        product = _product(both, gram)
        d_gram = b * both + c * (product + product.mT)
        d_x = _product(poly, d_x) + _product(d_gram, x)
    return (d_x,)


_iterate.defvjp(_iterate_forward, _iterate_backward)
