"""LaCT ASR's floating-point operations, counted on paper: its products, two for a multiply-add.

What is elementwise, the front end and the low-rank initial weights are left out: under a tenth of
the sum at the published sizes. A training step takes three times a forward pass; what is recomputed
to save memory does not count.
"""

import numpy as np

from jasr.layers.newton_schulz import MUON_TUNED


def forward(config, mel_frames):
    """{part: operations of the forward pass} of one utterance of so many mel frames."""
    c = config
    frames, dim, left = mel_frames, c.audio_feature_dim, c.subsampling
    parts = {"convolutions": 0}
    for i in range(c.audio_encoder_layers):
        out = c.hidden_size if i == c.audio_encoder_layers - 1 else 2 * dim
        stride = 2 if left > 1 else 1
        frames, left = -(-frames // stride), left // stride
        parts["convolutions"] += 6 * dim * out * frames
        dim = out
    for n in range(c.num_hidden_layers):
        for part, count in layer(c, frames, c.has_lact(n)).items():
            parts[part] = parts.get(part, 0) + count
    d, blocks = c.hidden_size, c.num_hidden_layers * frames
    parts["MLP"] = 6 * d * c.mlp_size * blocks
    if c.conv_kernel:
        parts["convolutions"] += (6 * d * d + 2 * d * c.conv_kernel) * blocks
    heads = 1 + len(c.intermediate_ctc) * (2 if c.self_conditioning else 1)
    parts["CTC heads"] = 2 * d * c.ctc_vocab_size * heads * frames
    return parts


def layer(config, frames, fast=True):
    """{part: operations of the forward pass} of attention and fast weights on so many frames."""
    c = config
    d, nh, dim = c.hidden_size, c.num_lact_heads, c.fast_head_dim
    parts = {"projections": 8 * d * d * frames, "attention": 4 * d * visible_pairs(c, frames)}
    if not fast or c.lact_updates == "no_branch":
        return parts
    chunks, updates, learnt = -(-frames // c.lact_chunk_size), 1, frames  # bidirectional
    if c.lact_mode == "block":
        updates = chunks
    elif c.lact_mode != "bidirectional":
        updates, learnt = chunks - 1, (chunks - 1) * c.lact_chunk_size
    if c.lact_updates == "off":
        updates = learnt = 0
    hidden = int(dim * c.inter_multi)
    rates = 2 * d * nh * (3 + c.use_momentum + c.learnable_ttt_scale) * frames
    parts["fast weights"] = nh * dim * hidden * (6 * frames + 12 * learnt) + rates
    if c.use_muon:
        short, long = sorted((dim, hidden))
        step = 4 * short**2 * long + 2 * short**3
        parts["Newton-Schulz"] = 3 * nh * len(MUON_TUNED) * step * updates
    return parts


def visible_pairs(config, frames):
    """The number of (query, key) pairs of one head that `attention.visible` allows."""
    c = config
    i = np.arange(frames)
    last = i + 1 if c.causal else np.full(frames, frames)
    if c.lact_mode == "block":
        last = np.minimum((i // c.lact_chunk_size + 1) * c.lact_chunk_size, frames)
    first = 0
    if c.window_size:
        first = np.maximum(i - c.window_size + 1, 0)
        if not c.causal:
            last = np.minimum(i + c.window_size, frames)
    return int(np.sum(last - first))
