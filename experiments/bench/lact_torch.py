"""The LaCT layer in plain eager PyTorch, from the same equations, for comparison only."""

import math

import torch
import torch.nn.functional as F

from jasr.layers.newton_schulz import MUON_TUNED


def newton_schulz(g):
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in MUON_TUNED:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def shifted(w0, w1, w2, q, k, v, lr, momentum, chunk, muon):
    """Apply-then-update over chunks; everything [B*H, ...]."""
    sizes = [w.norm(dim=2, keepdim=True) for w in (w0, w1, w2)]
    carried, outs, length = None, [], q.shape[1]
    for begin in range(0, length, chunk):
        part = slice(begin, min(begin + chunk, length))
        qi, ki, vi, li = q[:, part], k[:, part], v[:, part], lr[:, part]
        outs.append((F.silu(qi @ w0.mT) * (qi @ w2.mT)) @ w1.mT)
        if part.stop == length:
            break
        gate, up = ki @ w0.mT, ki @ w2.mT
        hidden = F.silu(gate) * up
        back = vi @ w1
        s = torch.sigmoid(gate)
        d_gate = back * up * s * (1 + gate * (1 - s))
        d_up = back * F.silu(gate)
        delta = [
            (d_gate * li[..., 0:1]).mT @ ki,
            vi.mT @ (hidden * li[..., 1:2]),
            (d_up * li[..., 2:3]).mT @ ki,
        ]
        beta = momentum[:, part].mean(dim=1, keepdim=True)
        if carried is not None:
            delta = [d + beta * m for d, m in zip(delta, carried, strict=True)]
        carried = delta
        if muon:
            delta = [newton_schulz(d) for d in delta]
        w0, w1, w2 = (
            (w + d) / ((w + d).norm(dim=2, keepdim=True) + 1e-5) * n
            for w, d, n in zip((w0, w1, w2), delta, sizes, strict=True)
        )
    return torch.cat(outs, dim=1)


def rope(x, cos, sin):
    """x [B, L, N, H]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def layer(p, x, cos, sin, band, config):
    """[B, L, D] -> [B, L, D]. p: {jasr's path: tensor}; band: bool[L, L], True = read."""
    c, batch, length = config, x.shape[0], x.shape[1]
    nh, n = c.num_lact_heads, c.num_attn_heads
    q, k, v = (x @ p["qkv/kernel"]).chunk(3, dim=-1)
    split = [y.view(batch, length, n, -1) for y in (q, k, v)]
    split = [rope(split[0], cos, sin), rope(split[1], cos, sin), split[2]]
    local = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in split), attn_mask=band)
    local = local.transpose(1, 2).reshape(x.shape)

    def fast_heads(y):
        y = y.reshape(batch, length, nh, -1).transpose(1, 2)
        return y.reshape(batch * nh, length, -1)

    def normed(y, i):
        y = F.silu(y * p["qk_scale"][:, i] + p["qk_offset"][:, i]).view(batch, length, nh, -1)
        y = y / (y.norm(dim=-1, keepdim=True) + 1e-5)
        return fast_heads(rope(y.reshape(batch, length, n, -1), cos, sin))

    rates = x @ p["lr_proj/kernel"] + p["lr_proj/bias"]
    shift = c.fw_base_lr + math.log(-math.expm1(-c.fw_base_lr))
    lr = fast_heads(F.softplus(rates.float() + shift))
    momentum = fast_heads(
        torch.sigmoid(x @ p["momentum_proj_0/kernel"] + p["momentum_proj_0/bias"])
    )
    w = [p[name].repeat(batch, 1, 1) for name in ("w0", "w1", "w2")]
    out = shifted(
        *w, normed(q, 0), normed(k, 1), fast_heads(F.silu(v)), lr, momentum,
        c.lact_chunk_size, c.use_muon,
    )  # fmt: skip
    out = out * torch.rsqrt(out.pow(2).mean(dim=-1, keepdim=True) + 1e-5) * p["ttt_norm/scale"]
    scale = F.silu(x @ p["ttt_scale_proj/kernel"] + p["ttt_scale_proj/bias"])
    out = out.view(batch, nh, length, -1).transpose(1, 2) * scale[..., None]
    return (local + out.reshape(x.shape)) @ p["o_proj/kernel"]
