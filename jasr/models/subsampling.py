"""NeMo's subsampling front ends: log-mel frames to fewer, wider frames.

Parameter names are NeMo's: conv_{i} with i its place in torch's sequence (activations count), out,
proj_out, pre_norm. Kernels are [time, frequency, in / groups, out]. Arrays are [B,T,F,C] inside.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jasr.models.fastconformer_config import halved
from jasr.models.lact import frame_mask


def uniform(fan_in):
    """Torch's initial weights and biases: uniform up to 1 / sqrt(fan in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) / fan_in**0.5

    return init


def linear(x, features, name, use_bias=True):
    """x [..., in] times the kernel "name/kernel" plus "name/bias", in x's dtype.

    For the caller's compact method.
    """
    init = uniform(x.shape[-1])
    return nn.Dense(features, use_bias, dtype=x.dtype, kernel_init=init, bias_init=init, name=name)(
        x
    )


class ConvWeights(nn.Module):
    """kernel of `shape` [..., in / groups, out] and bias [out] (or None) of a convolution."""

    shape: tuple
    dtype: str
    use_bias: bool = True

    @nn.compact
    def __call__(self):
        fan_in = 1
        for n in self.shape[:-1]:
            fan_in *= n
        kernel = jnp.asarray(self.param("kernel", uniform(fan_in), self.shape), self.dtype)
        if not self.use_bias:
            return kernel, None
        bias = self.param("bias", uniform(fan_in), self.shape[-1:])
        return kernel, jnp.asarray(bias, self.dtype)


def taps(x, causal):
    """The nine strided views [B,T',F',C] of x [B,T,F,C] that a 3 x 3 convolution of stride 2 reads.

    Output (t, f) stands on frames and bins 2t-1 ... 2t+1, or 2t-2 ... 2t if causal.
    """
    before = 2 if causal else 1
    x = jnp.pad(x, [(0, 0), (before, 1), (before, 1), (0, 0)])
    size = [(n - 3) // 2 + 1 for n in x.shape[1:3]]
    return [
        x[:, a : a + 2 * size[0] - 1 : 2, b : b + 2 * size[1] - 1 : 2]
        for a in range(3)
        for b in range(3)
    ]


def depthwise_3x3(x, kernel, causal):
    """Depthwise (or one-channel) 3 x 3 convolution of stride 2 as nine shifted products.

    x [B,T,F,C] with kernel [3,3,1,C], or x [B,T,F,1] with any C: [B,T',F',C].
    """
    kernel = kernel.reshape(9, -1)
    return sum(tap * kernel[n] for n, tap in enumerate(taps(x, causal)))


def full_3x3(x, kernel, causal):
    """3 x 3 convolution of stride 2 of x [B,T,F,I] with kernel [3,3,I,C]."""
    pad = (2, 1) if causal else (1, 1)
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


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

        def mask(x):
            return jnp.where(frame_mask(length, x.shape[1])[..., None], x, 0) if self.masked else x

        def weights(index, *shape):
            shape = (*shape, self.channels)
            return ConvWeights(shape, x.dtype, name=f"conv_{index}")()

        y = mask(x[..., None])
        kernel, bias = weights(0, 3, 3, 1)
        y = depthwise_3x3(y, kernel, self.causal) + bias
        for stage in range(1, self.factor.bit_length()):
            length = halved(length, 1, self.causal)
            y = mask(jax.nn.relu(y))
            if stage == self.factor.bit_length() - 1:
                break
            if self.depthwise:
                kernel, bias = weights(3 * stage - 1, 3, 3, 1)
                y = depthwise_3x3(y, kernel, self.causal) + bias
                kernel, bias = weights(3 * stage, 1, 1, self.channels)
                y = y @ kernel[0, 0] + bias
            else:
                kernel, bias = weights(2 * stage, 3, 3, self.channels)
                y = full_3x3(y, kernel, self.causal) + bias
        return Flatten(self.features, name="out")(y), length


class Flatten(nn.Module):
    """Projection of [B,T,F,C] to [B,T,D]; the kernel's rows are channel-major, c * F + f."""

    features: int

    @nn.compact
    def __call__(self, x):
        batch, frames, bins, channels = x.shape
        size = bins * channels
        kernel = self.param("kernel", uniform(size), (size, self.features)).astype(x.dtype)
        bias = self.param("bias", uniform(size), (self.features,)).astype(x.dtype)
        kernel = kernel.reshape(channels, bins, -1).swapaxes(0, 1).reshape(size, -1)
        return x.reshape(batch, frames, size) @ kernel + bias


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
