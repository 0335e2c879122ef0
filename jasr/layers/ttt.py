"""TTT-Linear and TTT-MLP: a small network that learns from the tokens while it reads them.

Each head carries the weights of a linear map (`W1`, `b1`) or of a two-layer MLP (also `W2`, `b2`).
Tokens come in mini-batches; within one, every token's gradient is taken at the weights with which
the mini-batch began, and token i reads the weights after the steps that row i of the learning-rate
matrix eta prescribes. All in closed form (the "dual form"), as pure functions of arrays.

Sources: Sun et al. 2024, "Learning to (Learn at Test Time)" (arXiv 2407.04620) and its ttt-lm-jax;
Dalal et al. 2025 and their ttt-video-dit, whose layer TTT-Moshi uses. The two differ in eta, in the
target and in what surrounds the operator: functions named `lm_*` and `video_*`.

Axis letters here: B batch, T frames, D model, N heads, H head dim, M mini-batches, K tokens of a
mini-batch, E hidden dim of the fast weights.
"""

import functools

import jax
import jax.numpy as jnp

STATE_NAMES = ("W1", "b1", "W2", "b2")


# ---- the operator --------------------------------------------------------------------------------


def layer_norm(x, scale, bias, eps):
    """x normalised over its last axis with biased variance, in two passes; eps is in the root.

    Two passes because eps is as small as 1e-8, where E[x²] − E[x]² in float32 is mostly rounding.
    """
    centred = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    return centred * rstd * scale + bias


def layer_norm_l2_grad(z, target, scale, bias, eps):
    """Gradient with respect to z of ½‖layer_norm(z) − target‖², in closed form; same shape as z."""
    centred = z - z.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    unit = centred * rstd
    error = (unit * scale + bias - target) * scale
    mean_error = error.mean(-1, keepdims=True)
    return rstd * (error - mean_error - unit * jnp.mean(error * unit, -1, keepdims=True))


def gelu(x):
    """Tanh-approximated GELU of x."""
    return jax.nn.gelu(x, approximate=True)


def gelu_grad(x):
    """Derivative of the tanh-approximated GELU at x."""
    root, cubic = (2 / jnp.pi) ** 0.5, 0.044715
    t = jnp.tanh(root * x * (1 + cubic * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * cubic * x * x)


def inner_forward(state, x):
    """What the fast weights make of x [..., K, H] before the norm: [..., K, H]."""
    z = x @ state["W1"] + state["b1"]
    return gelu(z) @ state["W2"] + state["b2"] if "W2" in state else z


def inner_loss(state, k, v, scale, bias, eps):
    """½‖LN(f(k)) − (v − k)‖² of each token, summed over H: [..., K]; it falls."""
    error = layer_norm(inner_forward(state, k), scale, bias, eps) - (v - k)
    return 0.5 * jnp.sum(error * error, -1)


def mini_batch_step(state, q, k, v, eta, scale, bias, eps):
    """One mini-batch in dual form: (state after it, output [..., K, H]).

    state: W1 [..., H, E or H], b1 [..., 1, E or H] and for the MLP W2 [..., E, H], b2 [..., 1, H];
    q, k, v [..., K, H]; eta [..., K, K], row = the token that reads, column = the token whose
    gradient is taken; scale, bias broadcast to [..., K, H]. The state moves by the last row of eta.
    Causal exactly when eta is lower triangular.
    """
    exit_rate = eta[..., -1, :, None]
    q_k = q @ k.mT
    z1 = k @ state["W1"] + state["b1"]
    if "W2" not in state:
        g1 = layer_norm_l2_grad(z1, v - k, scale, bias, eps)
        read = q @ state["W1"] + state["b1"] - (eta * (q_k + 1)) @ g1
        new = {}
    else:
        hidden = gelu(z1)
        g2 = layer_norm_l2_grad(hidden @ state["W2"] + state["b2"], v - k, scale, bias, eps)
        g1 = (g2 @ state["W2"].mT) * gelu_grad(z1)
        read_hidden = gelu(q @ state["W1"] + state["b1"] - (eta * (q_k + 1)) @ g1)
        read = read_hidden @ state["W2"] + state["b2"] - (eta * (read_hidden @ hidden.mT + 1)) @ g2
        new = {
            "W2": state["W2"] - hidden.mT @ (exit_rate * g2),
            "b2": state["b2"] - jnp.sum(exit_rate * g2, -2, keepdims=True),
        }
    new["W1"] = state["W1"] - k.mT @ (exit_rate * g1)
    new["b1"] = state["b1"] - jnp.sum(exit_rate * g1, -2, keepdims=True)
    return new, q + layer_norm(read, scale, bias, eps)


def ttt(q, k, v, eta, state, scale, bias, *, eps, remat_group=4):
    """What each token reads from weights that learn along the way, and those weights at the end:
    (out [B,N,M,K,H], state).

    q, k, v: [B,N,M,K,H]; eta [B,N,M,K,K] (see `lm_eta`, `video_eta`, `causal_eta`, `mask_eta`);
    scale, bias [N,H], the norm of the inner model; state: dict of W1, b1 (and W2, b2), each
    [B,N,...] as in `mini_batch_step`, e.g. from `initial_state` or from the previous call on the
    same stream, which must have ended at a mini-batch's end. eps: 1e-6 in ttt-lm-jax, 1e-8 in
    ttt-video-dit. Computed in float32; out has the dtype of q, the state stays float32. Gradients
    flow through every mini-batch; the backward pass keeps the state at the start of every
    `remat_group`-th only and recomputes the rest (0: keep everything).
    """
    dtype, batches = q.dtype, q.shape[2]
    inputs = tuple(jnp.moveaxis(a.astype(jnp.float32), 2, 0) for a in (q, k, v, eta))
    scale, bias = (a.astype(jnp.float32)[:, None, :] for a in (scale, bias))
    state = {name: a.astype(jnp.float32) for name, a in state.items()}

    def step(state, x):
        return mini_batch_step(state, *x, scale, bias, eps)

    # A ragged last group is filled up with mini-batches of eta = 0, which leave the state as it is.
    group = min(remat_group or batches, batches)
    inputs = tuple(
        _pad_axis(a, 0, -batches % group).reshape(-1, group, *a.shape[1:]) for a in inputs
    )
    steps = functools.partial(jax.lax.scan, step)
    if remat_group:
        steps = jax.checkpoint(steps, prevent_cse=False)
    state, out = jax.lax.scan(steps, state, inputs)
    out = out.reshape(-1, *out.shape[2:])[:batches]
    return jnp.moveaxis(out, 0, 2).astype(dtype), state


def initial_state(params, batch):
    """State of a stream that has read nothing: the learnt W1, b1 (W2, b2) [N,...] of `params` for
    each of `batch` rows, [B,N,...]."""
    return {
        name: jnp.broadcast_to(params[name], (batch, *params[name].shape))
        for name in STATE_NAMES
        if name in params
    }


def _pad_axis(x, axis, amount):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, amount)
    return jnp.pad(x, widths) if amount else x


# ---- mini-batches and learning rates -------------------------------------------------------------


def to_mini_batches(x, size):
    """Mini-batches [B,N,M,K,...] of x [B,T,N,...], T filled up with zeros to a multiple of K =
    size."""
    x = _pad_axis(x, 1, -x.shape[1] % size)
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 3, 1)


def from_mini_batches(x, length):
    """Frames [B,T,N*H] of mini-batches [B,N,M,K,H], heads side by side, cut to T = length."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4])[:, :length]


def token_rate(x, weight, bias, size):
    """Each token's own share of the learning rate, sigmoid(x·w + b) in (0, 1): f32[B,N,M,K] for x
    [B,T,D], weight [N,D], bias [N]."""
    logits = jnp.einsum("btd,nd->btn", x.astype(jnp.float32), weight.astype(jnp.float32)) + bias
    return to_mini_batches(jax.nn.sigmoid(logits), size)


def lm_eta(rate, token_idx, base_lr, head_dim):
    """Causal eta [B,N,M,K,K] of ttt-lm-jax: base_lr · max(1/(i+1) + token_idx_i, 0) · rate_j / H
    for j ≤ i.

    rate [B,N,M,K] from `token_rate`; token_idx [K], learnt, zero at first. base_lr: 1.0 for
    TTT-Linear and 0.1 for TTT-MLP in the paper.
    """
    size = rate.shape[-1]
    row = jnp.maximum(1 / jnp.arange(1, size + 1) + token_idx, 0)
    return causal_eta(base_lr / head_dim * row[:, None] * rate[..., None, :])


def video_eta(rate, base_lr, head_dim):
    """Eta [B,N,M,K,K] of ttt-video-dit and TTT-Moshi: base_lr · rate_j / (K·H) in every row.

    Not causal: every token reads the steps of all K tokens. Pass it through `causal_eta` where the
    future must not be seen.
    """
    size = rate.shape[-1]
    return jnp.broadcast_to(base_lr / (head_dim * size) * rate[..., None, :], (*rate.shape, size))


def causal_eta(eta):
    """Eta without the entries in which a token reads the step of a later one. The state's exit
    (last row) is unchanged."""
    return jnp.tril(eta)


def mask_eta(eta, mask):
    """Eta [B,N,M,K,K] in which padding teaches nothing: columns of tokens outside `mask` bool[B,T]
    are zero.

    Eta enters every step linearly, so this equals leaving those tokens out. A mini-batch of padding
    alone leaves the state as it is.
    """
    keep = to_mini_batches(mask[:, :, None], eta.shape[-1])[..., None, :]
    return jnp.where(keep, eta, 0)


# ---- what stands around the operator -------------------------------------------------------------


def l2_normalize(x, eps=1e-12):
    """x with length one over the last axis; x / eps for vectors shorter than eps, with a finite
    gradient (1/eps) at zero."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, eps * eps))


def video_target(k, v, scale, bias, eps):
    """Value v' such that the inner target v' − k is LN'(v − k), the normalised difference: same
    shape as v.

    LN' divides by the *unbiased* standard deviation plus eps (1e-8 in ttt-video-dit, 1e-5 in
    TTT-Moshi), unlike `layer_norm`.
    """
    centred = v - k
    centred = centred - centred.mean(-1, keepdims=True)
    square = jnp.sum(centred * centred, -1, keepdims=True) / (v.shape[-1] - 1)
    # d√x/dx is infinite at 0
    std = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return centred / (std + eps) * scale + bias + k


def rope_tables(positions, head_dim, theta=10000.0, stretch=False):
    """Cosine and sine [..., H/2] of the rotary angle at each of `positions` i32[...].

    TTT uses position modulo K: only the place within the mini-batch. stretch: TTT-Moshi's factor
    0.5 + 1.5·exp(−i/(2H)), i = 0, 2, …, on the frequencies.
    """
    index = jnp.arange(0, head_dim, 2) / head_dim
    frequency = theta**-index
    if stretch:
        frequency = frequency * (0.5 + 1.5 * jnp.exp(-index / 2))
    angle = positions[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope(x, cos, sin):
    """x [B,T,N,H] with each interleaved pair (2i, 2i+1) turned by the angle of cos, sin [T,H/2] (or
    [B,T,H/2])."""
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape)


def causal_depthwise_conv(x, kernel, bias, tail=None):
    """Each channel of x [B,T,D] filtered with its own kernel [W,1,D] over this frame and the W−1
    before it, and the new tail: ([B,T,D], [B,W-1,D]).

    tail: the last W−1 frames of the stream before x (none: zeros, the start of a stream).
    """
    width = kernel.shape[0]
    if tail is None:
        tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    x = jnp.concatenate([tail, x], 1)
    length = x.shape[1] - width + 1
    y = sum(x[:, i : i + length] * kernel[i, 0] for i in range(width)) + bias
    return y, x[:, length:]


def dense(params, x):
    """x @ kernel, plus the bias where there is one."""
    y = x @ params["kernel"]
    return y + params["bias"] if "bias" in params else y


def _heads(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


def lm_inputs(params, x, size, base_lr, positions=None):
    """Inputs (q, k, v, eta) of `ttt` as ttt-lm-jax makes them from x [B,T,D]; eta is causal.

    params: wq, wk, wv {kernel}; learnable_ttt_lr {kernel [N,D,1], bias [N,1]}; learnable_token_idx
    [K]. With conv_q and conv_k (the Mamba backbone) wq serves both and a causal convolution of
    width 4 tells them apart. positions i32[T] or [B,T] (default 0, 1, …), taken modulo K.
    """
    heads = params["learnable_ttt_lr"]["kernel"].shape[0]
    q, v = dense(params["wq"], x), dense(params["wv"], x)
    if "conv_q" in params:
        k, _ = causal_depthwise_conv(q, params["conv_k"]["kernel"], params["conv_k"]["bias"])
        q, _ = causal_depthwise_conv(q, params["conv_q"]["kernel"], params["conv_q"]["bias"])
    else:
        k = dense(params["wk"], x)
    q, k, v = (_heads(a, heads) for a in (q, k, v))
    positions = jnp.arange(x.shape[1]) if positions is None else positions
    cos_sin = rope_tables(positions % size, q.shape[-1])
    q, k = rope(q, *cos_sin), rope(k, *cos_sin)
    rate_params = params["learnable_ttt_lr"]
    rate = token_rate(x, rate_params["kernel"][..., 0], rate_params["bias"][:, 0], size)
    eta = lm_eta(rate, params["learnable_token_idx"], base_lr, q.shape[-1])
    return (*(to_mini_batches(a, size) for a in (q, k, v)), eta)


def lm_output(params, x, out):
    """Layer output [B,T,D]: post-norm (eps 1e-6), times gelu(x·wg) where there is wg (the Mamba
    backbone), then wo; out [B,T,D]."""
    y = layer_norm(out, params["post_norm"]["scale"], params["post_norm"]["bias"], 1e-6)
    return dense(params["wo"], y * gelu(dense(params["wg"], x)) if "wg" in params else y)


def video_inputs(params, x, size, base_lr, cos_sin=None, target_eps=1e-8):
    """Inputs (q, k, v, eta) of `ttt` as ttt-video-dit and TTT-Moshi make them from x [B,T,D]; eta
    is NOT causal.

    params: wq, wk, wv {kernel, bias}; learnable_ttt_lr_weight [N,1,D], learnable_ttt_lr_bias [N,1];
    ttt_norm_weight, ttt_norm_bias [N,H]. q and k have length one; v is `video_target`. cos_sin:
    tables [T,H/2] or None for no rotation.
    """
    heads = params["learnable_ttt_lr_weight"].shape[0]
    q, k, v = (_heads(dense(params[name], x), heads) for name in ("wq", "wk", "wv"))
    q, k = l2_normalize(q), l2_normalize(k)
    if cos_sin is not None:
        q, k = rope(q, *cos_sin), rope(k, *cos_sin)
    v = video_target(k, v, params["ttt_norm_weight"], params["ttt_norm_bias"], target_eps)
    weight, bias = params["learnable_ttt_lr_weight"][:, 0], params["learnable_ttt_lr_bias"][:, 0]
    rate = token_rate(x, weight, bias, size)
    eta = video_eta(rate, base_lr, q.shape[-1])
    return (*(to_mini_batches(a, size) for a in (q, k, v)), eta)


def video_output(params, out):
    """Layer output [B,T,D]: post-norm (eps 1e-6), then wo; out [B,T,D]."""
    norm = params["post_norm"]
    return dense(params["wo"], layer_norm(out, norm["scale"], norm["bias"], 1e-6))


def gated_residual(x, branch, alpha, limit=jnp.inf):
    """x + tanh(α)·branch per channel, α f32[D] clipped to ±limit (3 in TTT-Moshi); α starts at 0.1,
    so that the branch comes in softly."""
    return x + jnp.tanh(jnp.clip(alpha, -limit, limit)) * branch


def rope_tables_3d(frames, height, width, head_dim, theta=10000.0):
    """Cosine and sine [frames·height·width, H/2] of ttt-video-dit's rotary angles in time, height
    and width.

    A quarter of the head's angles turns with the frame, three eighths each with row and column.
    """
    spatial = head_dim // 8 * 3
    axes = ((frames, head_dim - 2 * spatial), (height, spatial), (width, spatial))
    grid = jnp.meshgrid(*(jnp.arange(n) for n, _ in axes), indexing="ij")
    angles = [
        place.reshape(-1, 1) * theta ** -(jnp.arange(0, dim, 2) / dim)
        for place, (_, dim) in zip(grid, axes, strict=True)
    ]
    angle = jnp.concatenate(angles, -1)
    return jnp.cos(angle), jnp.sin(angle)
