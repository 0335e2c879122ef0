"""NeMo's subsampling front ends: log-mel frames to fewer, wider frames.

Parameter names are NeMo's: conv_{i} with i its place in torch's sequence (activations count), out,
proj_out, pre_norm. Kernels are [time, frequency, in / groups, out]. Arrays are [B,T,F,C] inside.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jasr.layers.basic import Weights
from jasr.models.fastconformer.settings import halved

# Bytes of the first convolution's output that exist at once.
PIECE_BYTES = 1 << 27


def uniform(fan_in):
    """Torch's initial weights and biases: uniform up to 1 / sqrt(fan in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) / fan_in**0.5

    return init


def linear(x, features, name, use_bias=True):
    """x [..., in] times the kernel "name/kernel" plus "name/bias", in x's dtype.

    For the caller's compact method. All rows lie in one axis: the kernel's gradient of several
    takes a transposed copy of x on CPUs.
    """
    init = uniform(x.shape[-1])
    layer = nn.Dense(features, use_bias, dtype=x.dtype, kernel_init=init, bias_init=init, name=name)
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def weights(name, shape, dtype, use_bias=True):
    """kernel of `shape` [..., in / groups, out] and bias [out] (or None) under a name, for the
    caller's compact method."""
    init = uniform(math.prod(shape[:-1]))
    made = Weights(shape, init, init if use_bias else None, name=name)()
    return tuple(x if x is None else jnp.asarray(x, dtype) for x in made)


def taps(x):
    """The nine strided views [B,T,F,...] of x [B,2T+1,2F+1,...] that a 3 x 3 convolution reads.

    Its stride is 2, and it does not pad.
    """
    ends = [n - 2 for n in x.shape[1:3]]
    return [x[:, a : a + ends[0] : 2, b : b + ends[1] : 2] for a in range(3) for b in range(3)]


@jax.custom_vjp
def first_3x3(x, kernel):
    """3 x 3 convolution of stride 2 of one channel, x [B,2T+1,2F+1] with kernel [3,3,1,C]:
    [B,T,F,C].

    Nine products of a number and a row, which XLA merges with what follows; the gradient is that
    of one matrix product.
    """
    kernel = kernel.reshape(9, -1)
    return sum(tap[..., None] * kernel[n] for n, tap in enumerate(taps(x)))


def _first_backward(saved, g):
    _, back = jax.vjp(lambda x, k: jnp.stack(taps(x), axis=-1) @ k.reshape(9, -1), *saved)
    return back(g)


first_3x3.defvjp(lambda x, kernel: (first_3x3(x, kernel), (x, kernel)), _first_backward)


@jax.custom_vjp
def depthwise_3x3(x, kernel):
    """Depthwise 3 x 3 convolution of stride 2, x [B,2T+1,2F+1,C] with kernel [3,3,1,C]: [B,T,F,C].

    A sum of nine products; XLA's grouped convolution is twenty times slower on CPUs. So is what
    automatic differentiation makes of the sum, which keeps nine arrays; the gradient is written.
    """
    kernel = kernel.reshape(9, -1)
    return sum(tap * kernel[n] for n, tap in enumerate(taps(x)))


def _depthwise_backward(saved, g):
    x, kernel = saved
    k = kernel[:, :, 0]
    # An element of x is read by 4, 2, 2 or 1 outputs, by whether its row and column are even.
    around = jnp.pad(g, [(0, 0), (1, 1), (1, 1), (0, 0)])
    own, above, left = around[:, 1:, 1:], around[:, :-1, 1:], around[:, 1:, :-1]
    even_even = own * k[0, 0] + above * k[2, 0] + left * k[0, 2] + around[:, :-1, :-1] * k[2, 2]
    even_odd = own * k[0, 1] + above * k[2, 1]
    odd_even = own * k[1, 0] + left * k[1, 2]
    even, odd = (
        jnp.stack(pair, axis=3) for pair in ((even_even, even_odd), (odd_even, own * k[1, 1]))
    )
    to_x = jnp.stack([even, odd], axis=2)  # [B,T+1,2,F+1,2,C]
    batch, rows, _, columns, _, channels = to_x.shape
    to_x = to_x.reshape(batch, 2 * rows, 2 * columns, channels)[:, :-1, :-1]
    sums = [jnp.sum(tap * g, axis=(0, 1, 2), dtype=jnp.float32) for tap in taps(x)]
    return to_x, jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


depthwise_3x3.defvjp(lambda x, kernel: (depthwise_3x3(x, kernel), (x, kernel)), _depthwise_backward)


def full_3x3(x, kernel):
    """3 x 3 convolution of stride 2, x [B,2T+1,2F+1,I] with kernel [3,3,I,C]: [B,T,F,C]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolve(x, limits, first, rest, causal):
    """All convolutions of a subsampling, each followed by ReLU: x [B,T,F] to [B,T',F',C].

    Long inputs go through in pieces of PIECE_BYTES, whose inner frames are computed again for the
    gradient. Frames 2t-1 ... 2t+1, or 2t-2 ... 2t if causal, make frame t, and bins likewise.

    Args:
      limits: before each convolution and after the last how many frames are not zero, i32[B] or
        numbers.
      first: (kernel [3,3,1,C], bias). rest: tuples (kernel [3,3,C,C], bias), or depthwise and
        pointwise ones (kernel [3,3,1,C], bias, kernel [1,1,C,C], bias).
    """
    times, before = len(rest) + 1, 2 if causal else 1
    factor, lead = 2**times, (2**times - 1) * before
    batch, frames, bins = x.shape
    out = halved(frames, times, causal)
    widest = batch * halved(bins, 1, causal) * first[1].size * x.dtype.itemsize * factor // 2
    count = -(-out // max(1, PIECE_BYTES // widest))
    size = -(-out // count)
    after = (count * size + 1) * factor - 1 - lead - frames
    x = jnp.pad(x, [(0, 0), (lead, after), (0, 0)])

    def cleared(y, start, limit):
        """y with zeros outside of the frames 0 ... limit - 1; its first frame is `start`."""
        t = start + jnp.arange(y.shape[1])
        valid = (t >= 0) & (t < jnp.asarray(limit)[..., None])
        return jnp.where(valid.reshape(-1, y.shape[1], *[1] * (y.ndim - 2)), y, 0)

    def widened(y):  # what the bins' ends need
        end = 2 * halved(y.shape[2], 1, causal) + 1 - before - y.shape[2]
        return jnp.pad(y, [(0, 0), (0, 0), (before, end)] + [(0, 0)] * (y.ndim - 3))

    def piece(number):
        begin = number * size
        starts = [begin]  # of this piece's frames before each convolution and after the last
        for _ in range(times):
            starts.insert(0, 2 * starts[0] - before)
        y = jax.lax.dynamic_slice_in_dim(x, begin * factor, (size + 1) * factor - 1, axis=1)
        y = first_3x3(widened(cleared(y, starts[0], limits[0])), first[0]) + first[1]
        for start, limit, weights in zip(starts[1:], limits[1:], rest, strict=False):
            y = widened(cleared(jax.nn.relu(y), start, limit))
            kernel, bias, *pointwise = weights
            y = (depthwise_3x3 if pointwise else full_3x3)(y, kernel) + bias
            if pointwise:
                y = y @ pointwise[0][0, 0] + pointwise[1]
        return cleared(jax.nn.relu(y), begin, limits[-1])

    if count == 1:
        return piece(0)
    y = jax.lax.map(jax.checkpoint(piece), jnp.arange(count))
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * size, *y.shape[3:])[:, :out]


class ConvSubsampling(nn.Module):
    """dw_striding or striding: 3 x 3 convolutions of stride 2, ReLU, a projection; [B,T,D].

    masked: padding is zeroed before every convolution, so that nothing depends on it.
    """

    depthwise: bool
    factor: int
    channels: int
    features: int
    causal: bool
    masked: bool

    @nn.compact
    def __call__(self, x, length):
        """Args: x [B,T,F]; length i32[B]. Returns (frames [B,T',D], their lengths)."""

        def conv(index, *shape):
            return weights(f"conv_{index}", (*shape, self.channels), x.dtype)

        times = self.factor.bit_length() - 1
        first, rest = conv(0, 3, 3, 1), []
        for stage in range(1, times):
            if self.depthwise:
                inner = conv(3 * stage - 1, 3, 3, 1)
                rest.append((*inner, *conv(3 * stage, 1, 1, self.channels)))
            else:
                rest.append(conv(2 * stage, 3, 3, self.channels))
        lengths, frames = ([n] for n in (length, x.shape[1]))
        for _ in range(times):
            lengths.append(halved(lengths[-1], 1, self.causal))
            frames.append(halved(frames[-1], 1, self.causal))
        y = convolve(x, lengths if self.masked else frames, first, rest, self.causal)
        batch, frames, bins, channels = y.shape
        size = bins * channels
        kernel, bias = weights("out", (size, self.features), x.dtype)
        # the kernel's rows are channel-major, c * F + f
        kernel = kernel.reshape(channels, bins, -1).swapaxes(0, 1).reshape(size, -1)
        return y.reshape(batch, frames, size) @ kernel + bias, lengths[-1]


class StackingSubsampling(nn.Module):
    """stacking, stacking_norm: `factor` frames side by side (the last ones zero), projected."""

    factor: int
    features: int
    norm: bool

    @nn.compact
    def __call__(self, x):
        batch, frames, bins = x.shape
        x = jnp.pad(x, [(0, 0), (0, -frames % self.factor), (0, 0)])
        if self.norm:
            x = nn.LayerNorm(1e-5, x.dtype, use_fast_variance=False, name="pre_norm")(x)
        return linear(x.reshape(batch, -1, self.factor * bins), self.features, "proj_out")
