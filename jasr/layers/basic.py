"""Layers that several models have: norms, dropout, masks, depthwise convolution."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def frame_mask(length, frames):
    """bool[B,T,1], True on the first `length` frames."""
    return (jnp.arange(frames) < length[:, None])[..., None]


def record(module, name, x):
    """Keeps x in the collection "stages" if that is mutable, in the order of the computation."""
    if not module.is_initializing():
        module.sow("stages", name, x)


def hash_uniform(key, shape):
    """u32 pseudo-random numbers of a position and a key: murmur3's finaliser over a counter, twice.

    A hash of the position costs a few fused integer operations, where XLA's generators are an
    eighth of a training step on CPUs; it gives the same bits under any sharding.
    """
    x, step = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        x = x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
        step *= shape[axis]
    for word in jax.random.bits(key, (2,), jnp.uint32):
        x = x * jnp.uint32(0x9E3779B9) + word
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        x = x ^ (x >> 16)
    return x


class Weights(nn.Module):
    """(kernel of `shape` [..., in, out], bias [out] or None): those of a linear map or convolution
    whose product the caller takes. init, bias_init: (key, shape) -> values; None: no bias."""

    shape: tuple
    init: Callable
    bias_init: Callable | None = nn.initializers.zeros

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", self.init, self.shape)
        return kernel, self.bias_init and self.param("bias", self.bias_init, self.shape[-1:])


class Dropout(nn.Module):
    """x with a share `rate` of its elements zeroed and the rest scaled up; x in evaluation."""

    rate: float

    @nn.compact
    def __call__(self, x, train):
        if not train or self.rate == 0:
            return x
        bits = hash_uniform(self.make_rng("dropout"), x.shape)
        keep = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * scale over the last axis, computed in f32, returned in x's
    dtype."""

    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            y = y * self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return y.astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch norm over valid frames (or over all, as torch does), f32, with torch's running
    statistics: momentum 0.1, unbiased."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x, mask, train):
        """Args: x [B,T,C]; mask bool[B,T,1], or None to count every frame."""
        dim = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (dim,))
        bias = self.param("bias", nn.initializers.zeros, (dim,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (dim,))
        var = self.variable("batch_stats", "var", jnp.ones, (dim,))
        x = x.astype(jnp.float32)
        m, v = mean.value, var.value
        if train:
            weight = jnp.ones(x.shape[:2] + (1,)) if mask is None else mask.astype(jnp.float32)
            count = jnp.maximum(jnp.sum(weight), 1.0)
            m = jnp.sum(x * weight, axis=(0, 1)) / count
            v = jnp.sum(jnp.square(x - m) * weight, axis=(0, 1)) / count
            if not self.is_initializing():
                share = jnp.where(jnp.sum(weight) > 0, 0.1, 0.0)  # rows of padding teach nothing
                mean.value += share * (m - mean.value)
                var.value += share * (v * count / jnp.maximum(count - 1, 1.0) - var.value)
        gain = scale * jax.lax.rsqrt(v + self.eps)
        return x * gain + (bias - m * gain)


def _shifted_sum(x, kernel, before):
    """sum over i of x[:, t + i - before] * kernel[i], zero beyond the ends."""
    width, frames = kernel.shape[0], x.shape[1]
    x = jnp.pad(x, ((0, 0), (before, width - 1 - before), (0, 0)))

    def one_sum(x, kernel):
        return sum(x[:, i : i + frames] * kernel[i] for i in range(width))

    def loop(x, kernel):  # as one sum, XLA's CPU compiler writes out every shift of x by itself
        def add(i, total):
            return total + jax.lax.dynamic_slice_in_dim(x, i, frames, axis=1) * kernel[i]

        return jax.lax.fori_loop(0, width, add, jnp.zeros_like(x[:, :frames]))

    return jax.lax.platform_dependent(x, kernel, cpu=loop, default=one_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x, kernel, before):
    """Depthwise convolution over time, [B,T,D] with kernel [W,D]: W shifted multiply-adds.

    Frame t reads the frames t - before ... t - before + W - 1. XLA's grouped convolution is about
    nine times slower on CPUs; the written gradient keeps x alone, not its W shifts.
    """
    return _shifted_sum(x, kernel, before)


def _depthwise_forward(x, kernel, before):
    return _shifted_sum(x, kernel, before), (x, kernel)


def _depthwise_backward(before, saved, cotangent):
    x, kernel = saved
    width, frames = kernel.shape[0], x.shape[1]
    after = width - 1 - before
    to_x = _shifted_sum(cotangent, kernel[::-1], after)
    x = jnp.pad(x, ((0, 0), (before, after), (0, 0)))

    def tap(i):
        shifted = jax.lax.dynamic_slice_in_dim(x, i, frames, axis=1)
        return jnp.sum(shifted * cotangent, axis=(0, 1), dtype=jnp.float32)

    to_kernel = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.map(tap, jnp.arange(width)),
        default=lambda: jnp.stack([tap(i) for i in range(width)]),
    )
    return to_x, to_kernel.astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)
