"""Adam's moments in 8 bits: an optax transformation with a quarter of the state's memory.

Block-wise dynamic quantisation (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
2021). Each block of at most 256 neighbours is divided by its largest magnitude, and what is left
in [-1, 1] goes to the nearest of 256 levels. The levels are spaced like floating-point numbers of
seven decades: 10^-6 .. 10^0, each decade in twice as many equal parts as the one below it. The
first moment has a sign; the second has none, and twice as many parts.

Codes have the shape of their parameter, and blocks are boxes that are full along the last axes, so
a state is sharded like its parameter and no block crosses a shard where the sizes divide.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BLOCK = 256  # elements, at most, that share a scale
SMALLEST = 4096  # elements; the moments of smaller tensors stay f32, as they save nothing
DECADES = 7
ZERO = 127  # the code of 0 in the signed map


class Adam8bitState(NamedTuple):
    """State of `scale_by_adam8bit`; the trees have the structure of the parameters.

    count: i32[], updates made. mu, nu: u8 codes of the moments in the parameter's shape, and for a
    tensor below SMALLEST elements the f32 moment itself. mu_scale, nu_scale: f32, one a block, in
    the shape `block_counts`; f32[] 1 for a small tensor.
    """

    count: Any
    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any


def scale_by_adam8bit(b1=0.9, b2=0.98, eps=1e-6, smallest=SMALLEST):
    """`optax.scale_by_adam` with its moments in 8 bits between updates.

    An update reads the moments, does Adam's arithmetic in f32 and writes them back; it is made
    from the exact new moments, as Adam's is. A second moment that is not 0 is never rounded to 0:
    the next update would divide by eps.

    Args:
      smallest: tensors of fewer elements keep f32 moments.
    """

    def init(params):
        leaves, structure = jax.tree.flatten(params)
        mu, nu, scale = [], [], []
        for leaf in leaves:
            small = leaf.size < smallest
            blocks = () if small else block_counts(leaf.shape)
            mu.append(jnp.zeros(leaf.shape) if small else jnp.full(leaf.shape, ZERO, jnp.uint8))
            nu.append(jnp.zeros(leaf.shape, jnp.float32 if small else jnp.uint8))
            scale.append(jnp.full(blocks, 1.0 if small else 0.0, jnp.float32))
        tree = structure.unflatten
        again = [jnp.array(x) for x in scale]  # two leaves may not share a buffer to be donated
        return Adam8bitState(jnp.int32(0), tree(mu), tree(scale), tree(nu), tree(again))

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        grads, structure = jax.tree.flatten(updates)
        old = [jax.tree.leaves(part) for part in state[1:]]
        new = []
        for grad, mu, mu_scale, nu, nu_scale in zip(grads, *old, strict=True):
            g = grad.astype(jnp.float32)
            small = mu.dtype != jnp.uint8
            m = mu if small else read(mu, mu_scale, signed=True)
            v = nu if small else read(nu, nu_scale, signed=False)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * jnp.square(g)
            step = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            mu, mu_scale = (m, mu_scale) if small else write(m, signed=True)
            nu, nu_scale = (v, nu_scale) if small else write(v, signed=False)
            new.append((step.astype(grad.dtype), mu, mu_scale, nu, nu_scale))
        step, *parts = (structure.unflatten([leaf[i] for leaf in new]) for i in range(5))
        return step, Adam8bitState(count, *parts)

    return optax.GradientTransformation(init, update)


# ---- blocks --------------------------------------------------------------------------------------


def block_shape(shape):
    """The box of at most 256 elements that shares a scale, for an array of this shape.

    It is full along the last axes, a part of at most one axis and 1 along those before. The part
    divides its axis if a divisor is at least a quarter of what there is room for; otherwise all
    parts but the last are equal.
    """
    room, block = BLOCK, []
    for size in reversed(shape):
        part = min(size, room)
        if part < size:
            exact = max(n for n in range(1, part + 1) if size % n == 0)
            part = exact if 4 * exact >= room else math.ceil(size / math.ceil(size / room))
        block.append(part)
        room = room // part if part == size else 1
    return tuple(reversed(block))


def block_counts(shape):
    """The number of blocks along each axis of an array of this shape."""
    return tuple(math.ceil(n / b) for n, b in zip(shape, block_shape(shape), strict=True))


def _boxes(shape):
    """[count, part, count, part, ...]: an array of this shape, padded, with its axes cut."""
    pairs = zip(block_counts(shape), block_shape(shape), strict=True)
    return [n for pair in pairs for n in pair]


def _largest(x):
    """The largest magnitude of each block, f32[block_counts]."""
    x, boxes = jnp.abs(x), _boxes(x.shape)
    missing = [(0, c * b - n) for n, c, b in zip(x.shape, boxes[::2], boxes[1::2], strict=True)]
    if any(after for _, after in missing):
        x = jnp.pad(x, missing)
    return x.reshape(boxes).max(axis=tuple(range(1, 2 * x.ndim, 2)))


def _spread(scale, shape):
    """The scales of blocks, f32[block_counts], at each element, f32[shape]."""
    boxes = _boxes(shape)
    scale = scale.reshape([n for count in scale.shape for n in (count, 1)])
    padded = [c * b for c, b in zip(boxes[::2], boxes[1::2], strict=True)]
    scale = jnp.broadcast_to(scale, boxes).reshape(padded)
    return scale[tuple(slice(n) for n in shape)]


# ---- levels --------------------------------------------------------------------------------------


def levels(signed):
    """The levels that are not negative, ascending f64: 0, the decades' parts and 1.

    Decade j = 0..6 reaches from 10^(j-7) to 10^(j-6); a level is the middle of one of its 2^j parts
    (2^(j+1) without sign). That makes 129 levels, of which 127 exist with either sign, or 256.
    """
    values = [0.0]
    for j in range(DECADES):
        parts = 2 ** (j if signed else j + 1)
        values += [10.0 ** (j - 6) * (0.1 + 0.9 * (i + 0.5) / parts) for i in range(parts)]
    return np.array([*values, 1.0])


def level_map(signed):
    """The value of each code, f32[256], ascending."""
    values = levels(signed)
    return np.concatenate([-values[ZERO:0:-1] if signed else [], values]).astype(np.float32)


def nearest(x, signed):
    """The number in `levels` of the level nearest to x in [0, 1], i32.

    Within a decade the number is linear in x, and its slope falls from decade to decade, so the
    least of these lines, cut to a whole number, is at most one off; the middles between levels
    put it right. A search in the middles would take twenty times as long on a CPU.
    """
    values = levels(signed)
    middles = np.concatenate([[-1.0], (values[1:] + values[:-1]) / 2, [2.0]]).astype(np.float32)
    guess = None
    for j in range(DECADES):
        parts = 2 ** (j if signed else j + 1)
        first = parts if signed else parts - 1
        slope = 10.0 ** (6 - j) * parts / 0.9
        line = slope * x + (first - parts / 9)
        guess = line if guess is None else jnp.minimum(guess, line)
    guess = jnp.clip(guess, 0, len(values) - 1).astype(jnp.int32)
    middles = jnp.asarray(middles)
    return guess - (x < middles[guess]) + (x >= middles[guess + 1])


def read(codes, scale, signed):
    """f32 values of u8 codes and their blocks' scales."""
    values = jnp.asarray(level_map(signed))
    return values[codes.astype(jnp.int32)] * _spread(scale, codes.shape)


def write(x, signed):
    """(u8 codes, f32 scales of the blocks) of f32 values; without sign, none may be negative."""
    scale = _largest(x)
    scale = jnp.where(scale < np.finfo(np.float32).tiny, 0.0, scale)  # 1 / scale must be finite
    share = jnp.abs(x) / _spread(jnp.where(scale == 0, 1.0, scale), x.shape)
    code = nearest(share, signed)
    if signed:
        code = ZERO + jnp.where(x < 0, -jnp.minimum(code, ZERO), code)
    else:
        code = jnp.maximum(code, (x > 0).astype(jnp.int32))
    return code.astype(jnp.uint8), scale
