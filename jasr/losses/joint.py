"""The joint network of a transducer inside of its loss: log-probabilities without the logits.

The logits of all nodes (frame, u), [B, T, U + 1, V], are larger than the rest of the model
together, and a loss reads two of the V log-probabilities of a node and those of the durations. So
the output layer is applied to a chunk of nodes at a time, and only those few numbers are kept.

The backward pass computes the logits of a chunk again and turns their gradient into that of the
layer and of its inputs at once. It visits only the nodes that have a gradient: in an alignment of
T frames with U labels the paths with any probability to speak of pass through a small part of the
nodes, a fifth at T = 125 and U = 40 with random weights. The forward pass visits the nodes within
the lengths. How many chunks that makes is known at run time only; shapes are fixed all the same,
since a chunk is filled with nodes wherever they lie.
"""

import functools
import typing

import jax
import jax.numpy as jnp

from jasr.losses.lattice import log_sum_exp, within

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}
# Nodes whose gradient is below this share of their row's largest are left out of the backward
# pass; all of them together weigh about as much, which is below float32's rounding.
NEGLIGIBLE = 1e-8


def row_tokens(tokens, token_len, blank):
    """i32[B, U + 1]: the tokens, then blanks for the nodes that no label leaves."""
    is_token = jnp.arange(tokens.shape[1]) < token_len[:, None]
    tokens = jnp.where(is_token, tokens, blank).astype(jnp.int32)
    return jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=blank)


class _Form(typing.NamedTuple):
    """What is fixed when the joint network is compiled."""

    frames: int
    nodes: int  # of a frame: U + 1
    blank: int
    extra: int
    activation: str
    dropout: float
    chunk: int
    emphasis: float  # of the labels in the gradient
    clamp: float


def joint_cells(
    enc,
    pred,
    kernel,
    bias,
    enc_len,
    tokens,
    token_len,
    *,
    blank,
    extra=0,
    activation="relu",
    dropout=0.0,
    key=None,
    fastemit_lambda=0.0,
    clamp=0.0,
    chunk=None,
    groups=1,
):
    """Log-probabilities at each node of the blank, the next label and each duration,
    f32[B, T, U + 1, 2 + extra]: log-softmaxes over the first V and over the last `extra` outputs.

    Computed in float32 whatever comes in; the product with the kernel has JAX's default precision.
    Outside of the lengths the values are 0, whatever `enc` and `pred` contain there. The gradient
    is written by hand and not differentiable again.

    Args:
      enc, pred, kernel, bias, enc_len, tokens, token_len, blank: as `transducer.rnnt_loss`'s, with
        `extra` more outputs of kernel f[J, V + extra] and bias.
      activation: between the sum of the two sides and the output layer, one of ACTIVATIONS.
      dropout: share of hidden units dropped after the activation, drawn for each node from `key`,
        a typed key or one of each row; without a key nothing is dropped. What is dropped at a node
        does not depend on chunks or padding, and with a key of each row not on batch mates.
      fastemit_lambda: FastEmit (Yu et al., 2021): labels count 1 + lambda times in the gradient.
      clamp: as in NeMo on GPUs, the gradient of a row's loss by a logit of a token or the blank is
        limited to -clamp..clamp, before what the loss is multiplied by later; 0 or less: it is not.
      chunk: nodes whose logits exist at once; None = a 32nd of all, but at most 32 MiB of logits.
      groups: the rows are worked on in this many equal groups, side by side: the number of devices
        that a batch is sharded over, so that each looks for nodes among its own rows.

    Raises:
      ValueError: shapes or settings do not fit each other.
    """
    B, T, J = enc.shape
    U1 = pred.shape[1]
    if tokens.shape[1] + 1 != U1 or pred.shape[2] != J or kernel.shape[0] != J:
        raise ValueError(
            f"enc {enc.shape}, pred {pred.shape}, tokens {tokens.shape} and kernel {kernel.shape} "
            "must be [B, T, J], [B, U + 1, J], [B, U] and [J, V]"
        )
    if not 0 <= blank < kernel.shape[1] - extra:
        raise ValueError(f"blank {blank} is not among the {kernel.shape[1] - extra} tokens")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if B % groups:
        raise ValueError(f"{B} rows cannot be worked on in {groups} equal groups")
    seeds = None
    if not dropout or key is None:
        dropout = 0.0
    else:
        key = jax.random.split(key, B) if key.ndim == 0 else key
        seeds = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(key)
    if chunk is None:
        # so few that the last chunk's empty places do not count, but enough for a product
        chunk = max(128, min(B // groups * T * U1 // 32, 2**23 // kernel.shape[1]) // 128 * 128)
    exists = within(T, U1, enc_len, token_len)
    own = row_tokens(tokens, token_len, blank)
    per_row = (enc.astype(jnp.float32), pred.astype(jnp.float32), own, exists, seeds)
    enc, pred, own, exists, seeds = jax.tree.map(
        lambda x: x.reshape(groups, B // groups, *x.shape[1:]), per_row
    )
    cells = _cells(
        _Form(T, U1, blank, extra, activation, dropout, chunk, 1 + fastemit_lambda, clamp),
        enc.reshape(groups, -1, J),
        pred.reshape(groups, -1, J),
        kernel.astype(jnp.float32),
        bias.astype(jnp.float32),
        own.reshape(groups, -1),
        exists.reshape(groups, -1),
        seeds,
    )
    return cells.reshape(B, T, U1, 2 + extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cells(form, enc, pred, kernel, bias, own, exists, seeds):
    """The cells f32[G, N, 2 + E] of the nodes N = (row, frame, u) of each group of rows.

    Args:
      enc: f32[G, rows * T, J]; pred: f32[G, rows * (U + 1), J]; own: i32[G, rows * (U + 1)].
      exists: bool[G, N], the nodes to be computed.
      seeds: u32[G, rows, 2] of the dropout, or None.
    """
    return _cells_fwd(form, enc, pred, kernel, bias, own, exists, seeds)[0]


def _cells_fwd(form, enc, pred, kernel, bias, own, exists, seeds):
    def chunk(node, enc, pred, own, seeds):
        logits = _logits(form, node, seeds, _summed(form, node, enc, pred), kernel, bias)
        token, duration = jnp.split(logits, [logits.shape[-1] - form.extra], axis=-1)
        norm = log_sum_exp(token, axis=-1)
        label = _at(own, _sources(form, node)[1])[:, None]
        label = jnp.take_along_axis(token, label, axis=-1, mode="clip")
        pair = jnp.concatenate([token[:, form.blank, None], label], axis=-1)
        duration = _less(duration, log_sum_exp(duration, axis=-1))
        return jnp.concatenate([_less(pair, norm), duration, jnp.stack(norm, axis=-1)], axis=-1)

    def step(i, packed):
        node = jax.lax.dynamic_slice_in_dim(nodes, i * form.chunk, form.chunk, 1)
        cells = jax.vmap(chunk)(node, enc, pred, own, seeds)
        return jax.lax.dynamic_update_slice_in_dim(packed, cells, i * form.chunk, 1)

    nodes, chunks = _listed(exists, form.chunk)
    packed = jnp.zeros((*nodes.shape, 4 + form.extra))
    packed = jax.lax.fori_loop(0, chunks, step, packed)
    rank = jnp.cumsum(exists, axis=1) - 1
    cells = jnp.where(exists[..., None], jax.vmap(_at)(packed, rank), 0.0)
    return cells[..., : 2 + form.extra], (enc, pred, kernel, bias, own, seeds, cells)


def _cells_bwd(form, saved, g):
    enc, pred, kernel, bias, own, seeds, cells = saved
    outputs = jnp.arange(kernel.shape[1] - form.extra)
    others = 1 - jnp.eye(form.extra)
    rest_of = functools.partial(jnp.matmul, b=others, precision=jax.lax.Precision.HIGHEST)

    def chunk(total, node, enc, pred, own, seeds, cells, g, limit):
        summed = _summed(form, node, enc, pred)
        logits_of = functools.partial(_logits, form, node, seeds)
        logits, back = jax.vjp(logits_of, summed, kernel, bias)
        token = logits[:, : len(outputs)]
        frame, label = _sources(form, node)
        cell, norm = jnp.split(_at(cells, node), [2 + form.extra], axis=-1)
        blank_log, label_log, duration_log = jnp.split(cell, [1, 2], axis=-1)
        of_blank, of_label, of_duration = jnp.split(_at(g, node), [1, 2], axis=-1)
        of_label *= form.emphasis
        # 1 - p where p is near 1 from its logarithm or as the sum of the others: by subtraction
        # the gradient of a model that is sure would be rounding errors.
        at_blank = -of_label * jnp.exp(blank_log) - of_blank * jnp.expm1(blank_log)
        at_label = -of_blank * jnp.exp(label_log) - of_label * jnp.expm1(label_log)
        of_token = -(of_blank + of_label) * jnp.exp(_less(token, norm.T))
        of_token = jnp.where(outputs == _at(own, label)[:, None], at_label, of_token)
        of_token = jnp.where(outputs == form.blank, at_blank, of_token)
        if form.clamp > 0:
            most = _at(limit, node // (form.frames * form.nodes))[:, None]
            of_token = jnp.clip(of_token, -most, most)
        share = jnp.exp(duration_log)
        of_duration = of_duration * rest_of(share) - share * rest_of(of_duration)
        of_sum, *of_weights = back(jnp.concatenate([of_token, of_duration], axis=-1))
        of_enc, of_pred, *weights = total
        of_enc = of_enc.at[frame].add(of_sum, mode="drop")
        of_pred = of_pred.at[label].add(of_sum, mode="drop")
        return of_enc, of_pred, *(a + b for a, b in zip(weights, of_weights))

    def step(i, total):
        node = jax.lax.dynamic_slice_in_dim(nodes, i * form.chunk, form.chunk, 1)
        return jax.vmap(chunk)(total, node, enc, pred, own, seeds, cells, g, limit)

    by_row = g.reshape(len(g), -1, form.frames * form.nodes, g.shape[-1])
    # Every path leaves its first node by the blank or a label: g has there what the loss has.
    limit = form.clamp * jnp.abs(jnp.sum(by_row[:, :, 0, :2], axis=-1))
    # Half of a bound on the sum of a node's absolute gradients of its logits.
    size = jnp.sum(jnp.abs(g) * -jnp.expm1(cells[..., : g.shape[-1]]), axis=-1)
    size = size.reshape(len(g), -1, form.frames * form.nodes)
    top = jnp.max(size, axis=-1, keepdims=True)
    nothing = (size == 0) | (size < NEGLIGIBLE * top)  # false of what is not finite
    nodes, chunks = _listed(~nothing.reshape(g.shape[:2]), form.chunk)
    # Weights' gradients of each group by itself: devices then meet once, after the loop.
    weights = [jnp.zeros((len(g), *x.shape)) for x in (kernel, bias)]
    total = (jnp.zeros_like(enc), jnp.zeros_like(pred), *weights)
    of_enc, of_pred, *weights = jax.lax.fori_loop(0, chunks, step, total)
    return of_enc, of_pred, *(jnp.sum(x, axis=0) for x in weights), None, None, None


_cells.defvjp(_cells_fwd, _cells_bwd)


def _listed(wanted, chunk):
    """The nodes i32[G, n] that are wanted bool[G, N], in order and followed by N, which is none;
    and the number of chunks that hold them in every group."""
    N = wanted.shape[1]
    size = -(-N // chunk) * chunk
    nodes = jax.vmap(lambda x: jnp.nonzero(x, size=size, fill_value=N)[0])(wanted)
    most = jnp.max(jnp.sum(wanted, axis=1))
    return nodes, (most + chunk - 1) // chunk


def _less(x, norm):
    """x f32[n, K] less both parts of its normaliser f32[n], the large one first."""
    return x - norm[0][:, None] - norm[1][:, None]


def _at(x, index):
    """x[index], and 0 where there is no such element."""
    return x.at[index].get(mode="fill", fill_value=0)


def _sources(form, node):
    """Of each node its place in `enc`, (row, frame), and in `pred`, (row, u)."""
    frame = node // form.nodes
    return frame, frame // form.frames * form.nodes + node % form.nodes


def _summed(form, node, enc, pred):
    frame, label = _sources(form, node)
    return _at(enc, frame) + _at(pred, label)


def _logits(form, node, seeds, x, kernel, bias):
    """Logits f32[n, V + E] of the sums f32[n, J] of the joint network's two sides."""
    hidden = ACTIVATIONS[form.activation](x)
    if form.dropout:
        bits = _node_bits(form, node, seeds, hidden.shape[1])
        kept = bits >= jnp.uint32(form.dropout * 2**32)
        hidden = jnp.where(kept, hidden / (1 - form.dropout), 0.0)
    return hidden @ kernel + bias


def _node_bits(form, node, seeds, size):
    """u32[n, size] pseudo-random bits of each node, a hash of its row's seeds, frame and u.

    A few fused integer operations (the finaliser of murmur3 over a counter): XLA's generators
    would be a third of a small model's training step on CPUs.
    """

    def mixed(x):
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    row, frame = jnp.divmod(node // form.nodes, form.frames)
    own = seeds.at[row].get(mode="clip")  # [n, 2]
    own = mixed(own[:, 0] + frame.astype(jnp.uint32)) + mixed(
        own[:, 1] + (node % form.nodes).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    )
    unit = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return mixed(mixed(own)[:, None] + unit)
