"""TTT operators: parity with ttt-lm-jax, ttt-video-dit and TTT-Moshi, and the dual form against a
loop of single gradient steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.layers import ttt
from tests.arrays import golden_in

OUT, GRAD = 1e-4, 3e-4  # of max|.|, what fast_weights goldens ask


@pytest.fixture
def golden(request, goldens):
    """Loader of a golden by name: the committed one, else the shared one (skips without)."""
    return golden_in(goldens, request, "ttt")


run = jax.jit(ttt.ttt, static_argnames=("eps", "remat_group"))


def close(got, want, tolerance, what=""):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, what
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-6), what


def to_params(z):
    """The golden's torch- or flax-named parameters as a tree with jasr's leaf names."""
    params = {}
    for key, value in z.items():
        if not key.startswith("p:"):
            continue
        *path, leaf = key[2:].replace("/", ".").split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        if leaf == "weight":
            leaf, value = ("kernel", value.T) if value.ndim == 2 else ("scale", value)
        node[leaf] = jnp.asarray(value)
    return params


def close_trees(got, want, tolerance):
    got, want = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    for (path, a), b in zip(got, want, strict=True):
        close(a, b, tolerance, jax.tree_util.keystr(path))


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("eta_kind", ["full", "token"])
def test_operator_matches_ttt_video(golden, kind, eta_kind):
    z = golden(f"video_op_{kind}_{eta_kind}")
    names = [name for name in ttt.STATE_NAMES if name in z]
    arrays = {name[5:]: jnp.asarray(z[name[5:]]) for name in z if name.startswith("grad_")}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(a):
        state = {name: a[name] for name in names}
        norm = a["ttt_norm_weight"], a["ttt_norm_bias"]
        out, state = ttt.ttt(
            a["XQ"], a["XK"], a["XV"], a["eta"], state, *norm, eps=1e-8, remat_group=2
        )
        out = jnp.einsum("bnmkh->bmknh", out)
        return jnp.sum(out * z["cotangent"]), (out, state)

    (_, (out, state)), grads = loss(arrays)
    close(out, z["out"], OUT)
    for name in names:
        close(state[name], z[f"final_{name}_states"], OUT, name)
    for name, grad in grads.items():
        close(grad, z[f"grad_{name}"], GRAD, name)


def test_closed_form_gradients_match_ttt_video(golden):
    z = golden("video_ln_utils")

    def gradient(x, target, gamma, beta):
        return ttt.layer_norm_l2_grad(x, target, gamma, beta, 1e-8)

    args = [z[name] for name in ("x", "target", "gamma", "beta")]
    out, vjp = jax.vjp(gradient, *args)
    close(out, z["out_bwd"], OUT)
    close(ttt.layer_norm(z["x"], z["gamma"], z["beta"], 1e-8), z["out_fwd"], OUT)
    close(ttt.gelu_grad(z["x"]), z["gelu_bwd"], OUT)
    for name, grad in zip(("x", "target", "gamma", "beta"), vjp(z["cotangent"]), strict=True):
        close(grad, z[f"grad_{name}"], GRAD, name)


def test_three_dimensional_rotary_tables_match_ttt_video(golden):
    z = golden("video_freqs3d")
    sizes = [int(z[name]) for name in ("frames", "height", "width", "dim")]
    cos, sin = ttt.rope_tables_3d(*sizes)
    close(cos, z["cos"], 1e-6)
    close(sin, z["sin"], 1e-6)


def check_layer(layer, params, x, z, grads=True):
    """Holds every array of layer(params, x), a dict of which "out" is the output, and the gradients
    of its weighted sum against the golden z; all in one compilation.
    """

    @jax.jit
    def run(params, x):
        def out_and_all(params, x):
            arrays = layer(params, x)
            return arrays["out"], arrays

        out, vjp, arrays = jax.vjp(out_and_all, params, x, has_aux=True)
        return arrays, vjp(jnp.asarray(z["cotangent"])) if grads else ()

    arrays, got = run(params, jnp.asarray(x))
    for name, value in arrays.items():
        close(value, z[name], OUT, name)
    if grads:
        want = to_params({k[5:]: v for k, v in z.items() if k.startswith("grad_p:")})
        assert jax.tree.structure(want) == jax.tree.structure(params)
        close_trees(got[0], want, GRAD)
        close(got[1], z["grad_x"], GRAD, "x")


def video_layer(params, x, z, cos_sin, target_eps=1e-8):
    """The reference's layer, which sees its whole mini-batch: (inputs of the operator, [B,T,D] of
    the operator, [B,T,D] after post-norm and wo).
    """
    size, base_lr = int(z["mini_batch_size"]), float(z["ttt_base_lr"])
    inputs = ttt.video_inputs(params, x, size, base_lr, cos_sin, target_eps)
    norm = params["ttt_norm_weight"], params["ttt_norm_bias"]
    out, _ = ttt.ttt(*inputs, ttt.initial_state(params, x.shape[0]), *norm, eps=1e-8, remat_group=0)
    raw = ttt.from_mini_batches(out, x.shape[1])
    return inputs, raw, ttt.video_output(params, raw)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_layer_matches_ttt_video(golden, kind):
    z = golden(f"video_layer_{kind}")

    def layer(params, x):
        inputs, _, out = video_layer(params, x, z, (z["freqs_cos"], z["freqs_sin"]))
        names = ("proc_XQ", "proc_XK", "proc_XV", "proc_eta")
        return {"out": out, **dict(zip(names, inputs, strict=True))}

    check_layer(layer, to_params(z), z["x"], z)


def test_gated_pass_in_both_directions_matches_ttt_video(golden):
    z = golden("video_bidir_gated")

    def layer(params, x):
        def branch(x):
            return video_layer(params, x, z, (z["freqs_cos"], z["freqs_sin"]))[2]

        forward = ttt.gated_residual(x, branch(x), z["forward_gating_alpha"])
        backward = branch(forward[:, ::-1])[:, ::-1]
        out = ttt.gated_residual(forward, backward, z["backward_gating_alpha"])
        return {"after_forward": forward, "out": out}

    check_layer(layer, to_params(z), z["emb"], z, grads=False)


@pytest.mark.parametrize("with_rope", [0, 1])
def test_layer_matches_ttt_moshi_with_and_without_its_missing_projection(golden, with_rope):
    z = golden(f"moshi_ttt_layer_rope{with_rope}")
    length, size = z["x"].shape[1], int(z["mini_batch_size"])

    def layer(params, x):
        # The reference fills the last mini-batch with zero *inputs*, which teach through the
        # biases. `mask_eta` is for that; here their numbers are wanted.
        filled = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0)))
        positions = jnp.arange(filled.shape[1]) % size
        cos_sin = ttt.rope_tables(positions, 8, stretch=True) if with_rope else None
        _, raw, full = video_layer(params, filled, z, cos_sin, target_eps=1e-5)
        raw, full, gate = raw[:, :length], full[:, :length], params["gating_alpha"]
        out_head = ttt.gated_residual(x, raw, gate, limit=3.0)
        out = ttt.gated_residual(x, full, gate, limit=3.0)
        return {"ttt_raw": raw, "ttt_full": full, "out_head": out_head, "out": out}

    check_layer(layer, to_params(z), z["x"], z)


FLAX_NAMES = {"ttt_dense_0": "W1", "ttt_bias_0": "b1", "ttt_dense_1": "W2", "ttt_bias_1": "b2"}


@pytest.mark.parametrize("name", ["TTTLinearBase", "TTTMLPBase", "TTTLinear", "TTTMLP"])
def test_layer_matches_ttt_lm(golden, name):
    z = golden(f"lmjax_{name}")
    for old, new in FLAX_NAMES.items():
        z = {key.replace(old, new): value for key, value in z.items()}
    size, base_lr = int(z["mini_batch_size"]), float(z["ttt_base_lr"])

    def layer(params, x):
        inputs = ttt.lm_inputs(params, x, size, base_lr, jnp.asarray(z["position_ids"]))
        state = ttt.initial_state(params, x.shape[0])
        norm = params["ttt_norm"]["scale"], params["ttt_norm"]["bias"]
        out, _ = ttt.ttt(*inputs, state, *norm, eps=1e-6, remat_group=0)
        out = ttt.lm_output(params, x, ttt.from_mini_batches(out, x.shape[1]))
        return {"out": out, **lm_statistics(inputs, state, [a[:, None] for a in norm])}

    check_layer(layer, to_params(z), z["x"], z)


def lm_statistics(inputs, state, norm):
    """The reference's statistics [M]: mean squared inner error at each mini-batch's last token with
    the first, the entry and the exit state; and the spread of v − k before the rotation.
    """

    def step(before, x):
        after, _ = ttt.mini_batch_step(before, *x, *norm, 1e-6)
        losses = [ttt.inner_loss(s, *x[1:3], *norm, 1e-6) for s in (state, before, after)]
        return after, [2 * loss[..., -1].mean() / x[0].shape[-1] for loss in losses]

    _, losses = jax.lax.scan(step, state, tuple(jnp.moveaxis(a, 2, 0) for a in inputs))
    stats = dict(zip(("stat_loss_init", "stat_loss_step0", "stat_loss_step1"), losses, strict=True))
    _, k, v, _ = inputs
    cos, sin = ttt.rope_tables(jnp.arange(k.shape[3]), k.shape[-1])
    unturned = ttt.rope(k[..., None, :], cos, -sin)[..., 0, :]
    target = v - unturned
    spread = (target - target.mean((2, 3), keepdims=True))[:, :, :, 0] ** 2  # first token of each
    return {**stats, "stat_tgt_mse": spread.mean((0, 1, 3))}


# ---- maths ---------------------------------------------------------------------------------------


def draw(kind, seed=0, batches=3, size=4, heads=2, dim=8, batch=2):
    """Random inputs of the operator: (q, k, v, eta), state, norm."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    lead = batch, heads
    q, k, v = (normal(*lead, batches, size, dim) for _ in range(3))
    eta = jnp.abs(normal(*lead, batches, size, size, scale=0.05))
    hidden = dim if kind == "linear" else 4 * dim
    state = {"W1": normal(*lead, dim, hidden, scale=0.3), "b1": normal(*lead, 1, hidden, scale=0.1)}
    if kind == "mlp":
        state["W2"] = normal(*lead, hidden, dim, scale=0.3)
        state["b2"] = normal(*lead, 1, dim, scale=0.1)
    return (q, k, v, eta), state, (1 + normal(heads, dim, scale=0.1), normal(heads, dim, scale=0.1))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_dual_form_equals_a_loop_of_single_gradient_steps(kind):
    inputs, state, norm = draw(kind)
    for causal in (True, False):
        q, k, v, eta = inputs
        eta = ttt.causal_eta(eta) if causal else eta
        got, got_state = run(q, k, v, eta, state, *norm, eps=1e-6)
        want, want_state = primal(q, k, v, eta, state, norm, eps=1e-6)
        close(got, want, 1e-5)
        close_trees(got_state, want_state, 1e-5)


def primal(q, k, v, eta, state, norm, eps):
    """What the dual form claims: one gradient per token, added up row by row, then a forward pass
    per token.
    """
    norm = [a[:, None] for a in norm]

    @jax.jit
    @jax.vmap  # over rows
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, 0, 0, 0))  # over heads
    def mini_batch(state, q, k, v, eta, scale, bias):
        def one_token(state, k, v):
            return ttt.inner_loss(state, k[None], v[None], scale, bias, eps)[0]

        grads = jax.vmap(jax.grad(one_token), (None, 0, 0))(state, k, v)

        def after(rates):
            return jax.tree.map(lambda w, g: w - jnp.tensordot(rates, g, 1), state, grads)

        def read(rates, q):
            z = ttt.inner_forward(after(rates), q[None])
            return q + ttt.layer_norm(z, scale, bias, eps)[0]

        return after(eta[-1]), jax.vmap(read)(eta, q)

    norm = [jnp.broadcast_to(a, (q.shape[0], *a.shape)) for a in norm]
    out = []
    for m in range(q.shape[2]):
        state, y = mini_batch(state, q[:, :, m], k[:, :, m], v[:, :, m], eta[:, :, m], *norm)
        out.append(y)
    return jnp.stack(out, 2), state


def test_a_future_token_changes_no_past_output_when_eta_is_causal():
    (q, k, v, eta), state, norm = draw("mlp")
    changed = [a.at[:, :, 1, 2].add(1.0) for a in (q, k, v)]  # frame 6 of 12
    for causal in (True, False):
        used = ttt.causal_eta(eta) if causal else eta
        before, _ = run(q, k, v, used, state, *norm, eps=1e-6)
        after, _ = run(*changed, used, state, *norm, eps=1e-6)
        moved = np.abs(np.asarray(after - before)).max((0, 1, 4)).reshape(-1)
        assert (moved[:6] == 0).all() == causal
        assert (moved[:4] == 0).all() and (moved[6:] > 0).all()


def test_causal_eta_leaves_the_state_at_the_end_as_it_is():
    (q, k, v, eta), state, norm = draw("linear", batches=1)
    _, whole = run(q, k, v, eta, state, *norm, eps=1e-6)
    _, causal = run(q, k, v, ttt.causal_eta(eta), state, *norm, eps=1e-6)
    close_trees(causal, whole, 0)


@pytest.mark.parametrize("group", [1, 2])
def test_state_carried_over_a_cut_gives_what_one_call_gives_for_any_remat_group(group):
    (q, k, v, eta), state, norm = draw("linear", batches=5)
    want, want_state = run(q, k, v, eta, state, *norm, eps=1e-6, remat_group=0)
    out = []
    for part in (slice(0, 2), slice(2, 5)):
        args = (a[:, :, part] for a in (q, k, v, eta))
        y, state = run(*args, state, *norm, eps=1e-6, remat_group=group)
        out.append(y)
    close(jnp.concatenate(out, 2), want, 1e-6)
    close_trees(state, want_state, 1e-6)


def test_padding_teaches_nothing_and_only_lengths_matter():
    x = np.random.default_rng(0).standard_normal((2, 10, 16)).astype(np.float32)
    params = layer_params(16, heads=2)

    @jax.jit
    def layer(x, lengths):
        mask = jnp.arange(x.shape[1]) < lengths[:, None]
        q, k, v, eta = ttt.video_inputs(params, x, 4, 1.0)
        eta = ttt.mask_eta(ttt.causal_eta(eta), mask)
        norm = params["ttt_norm_weight"], params["ttt_norm_bias"]
        out, state = run(q, k, v, eta, ttt.initial_state(params, x.shape[0]), *norm, eps=1e-8)
        return ttt.from_mini_batches(out, x.shape[1]), state

    out, state = layer(x, jnp.array([10, 6]))
    alone, alone_state = layer(x[1:, :6], jnp.array([6]))
    noisy = x.copy()
    noisy[1, 6:] = 100.0
    noisy = np.concatenate([noisy, np.full((2, 7, 16), -50, np.float32)], 1)
    with_noise, noise_state = layer(noisy, jnp.array([10, 6]))
    close(out[1, :6], alone[0], 1e-6)
    close(with_noise[0, :10], out[0], 1e-6)
    close(with_noise[1, :6], out[1, :6], 1e-6)
    close_trees(jax.tree.map(lambda a: a[1:], state), alone_state, 1e-6)
    close_trees(noise_state, state, 1e-6)


def layer_params(dim, heads, hidden=4, seed=1):
    """Random parameters of the video layer with an MLP inside."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)

    size = dim // heads
    names = ("wq", "wk", "wv", "wo")
    return {
        **{name: {"kernel": normal(dim, dim), "bias": normal(dim)} for name in names},
        "learnable_ttt_lr_weight": normal(heads, 1, dim),
        "learnable_ttt_lr_bias": normal(heads, 1),
        "ttt_norm_weight": 1 + normal(heads, size),
        "ttt_norm_bias": normal(heads, size),
        "post_norm": {"scale": 1 + normal(dim), "bias": normal(dim)},
        "W1": normal(heads, size, hidden * size),
        "b1": normal(heads, 1, hidden * size),
        "W2": normal(heads, hidden * size, size),
        "b2": normal(heads, 1, size),
    }


def test_silence_gives_finite_gradients():
    params = jax.tree.map(jnp.zeros_like, layer_params(16, heads=2))

    def loss(params, x):
        q, k, v, eta = ttt.video_inputs(params, x, 4, 1.0)
        norm = params["ttt_norm_weight"], params["ttt_norm_bias"]
        out, _ = run(q, k, v, eta, ttt.initial_state(params, 2), *norm, eps=1e-8)
        return ttt.video_output(params, ttt.from_mini_batches(out, 6)).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros((2, 6, 16)))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_output_keeps_the_dtype_and_the_state_stays_float32():
    (q, k, v, eta), state, norm = draw("mlp", batches=1)
    low = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    out, new = run(*low, eta, state, *norm, eps=1e-6)
    assert out.dtype == jnp.bfloat16
    assert {a.dtype for a in new.values()} == {jnp.dtype("float32")}


def test_convolution_in_two_pieces_with_its_tail_equals_one_piece():
    rng = np.random.default_rng(0)
    x, kernel, bias = (
        rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 3), (4, 1, 3), (3,))
    )
    whole, _ = ttt.causal_depthwise_conv(x, kernel, bias)
    first, tail = ttt.causal_depthwise_conv(x[:, :5], kernel, bias)
    second, _ = ttt.causal_depthwise_conv(x[:, 5:], kernel, bias, tail)
    close(jnp.concatenate([first, second], 1), whole, 1e-6)
