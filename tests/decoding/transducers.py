"""Small transducers for tests: those of the NeMo goldens, and random ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jasr.decoding.transducer import Steps

DURATIONS = {"tiny_rnnt": None, "tiny_tdt": (0, 1, 2, 3, 4), "tiny_hybrid_tdt": (0, 1, 2, 3, 4)}
BLANK = 64
# Tests compile more than they run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def lstm_steps(g):
    """Steps of a golden's one-layer LSTM and its joint, from its arrays in torch's layout."""
    g = {name: jnp.asarray(x) for name, x in g.items() if "/" not in name}

    def predict(token, state):
        h, c = state  # f[1, N, P], as torch has them
        gates = g["embed"][token] @ g["weight_ih_l0"].T + h[0] @ g["weight_hh_l0"].T + g["bias"]
        i, f, z, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c[0] + jax.nn.sigmoid(i) * jnp.tanh(z)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return h @ g["pred_weight"].T + g["pred_bias"], (h[None], c[None])

    def initial_state(n):
        zeros = jnp.zeros((1, n, g["embed"].shape[1]))
        return zeros, zeros

    def output(enc, pred):
        return jax.nn.relu(enc + pred) @ g["output_weight"].T + g["output_bias"]

    return Steps(predict, initial_state, output)


def random_steps(seed, V, E=0, J=6, scale=2.0, bias=None):
    """Steps with random weights whose prediction depends on all tokens so far.

    The state is f[N, J]; `bias` f[V + 1 + E] is added to the logits.
    """
    rng = np.random.default_rng(seed)
    embed = jnp.asarray(rng.standard_normal((V + 1, J)), jnp.float32)
    mix = jnp.asarray(rng.standard_normal((J, J)) / np.sqrt(J), jnp.float32)
    out = jnp.asarray(scale * rng.standard_normal((J, V + 1 + E)) / np.sqrt(J), jnp.float32)
    bias = jnp.zeros(V + 1 + E) if bias is None else jnp.asarray(bias, jnp.float32)

    def predict(token, state):
        state = jnp.tanh(embed[token] + state @ mix)
        return state, state

    return Steps(
        predict,
        lambda n: jnp.zeros((n, J)),
        lambda enc, pred: jnp.tanh(enc + pred) @ out + bias,
    )


def random_encoder(seed, B, T, J=6):
    """f32[B, T, J] random frames."""
    return np.random.default_rng(seed).standard_normal((B, T, J)).astype(np.float32)


def rows_of(out):
    """Per row [(token, start frame, end frame, duration)] of a decoder's dict."""
    names = ("tokens", "start_frame", "end_frame", "durations")
    columns = [np.asarray(out[name]) for name in names]
    return [
        list(zip(*(c[b, :n].tolist() for c in columns), strict=True))
        for b, n in enumerate(np.asarray(out["token_len"]))
    ]


def naive_greedy(enc, n_frames, steps, blank, durations, max_symbols, strategy):
    """One row, one symbol at a time, as NeMo's two loops do it: [(token, frame, duration)], score.

    Written for any `durations`; None: RNN-T.
    """
    pred, state = steps.predict(jnp.array([blank]), steps.initial_state(1))
    found, score, t, here = [], 0.0, 0, 0

    def look():
        z = np.asarray(steps.output(jnp.asarray(enc[None, t]), pred)[0], np.float64)
        k = int(np.argmax(z[: blank + 1]))
        log_prob = z[k] - np.log(np.sum(np.exp(z[: blank + 1])))
        if durations is None:
            return k, int(k == blank), log_prob
        return k, durations[int(np.argmax(z[blank + 1 :]))], log_prob

    while t < n_frames:
        k, d, log_prob = look()
        if k != blank:
            found.append((k, t, d))
            score += log_prob
            pred, state = steps.predict(jnp.array([k]), state)
        if strategy == "greedy" and durations is not None:
            here += 1
            if d == 0 and k == blank:  # the same again until max_symbols
                here = max_symbols
            t += d
            if d == 0 and here < max_symbols:
                continue
            t += here == max_symbols
            here = 0
        elif k == blank:
            t, here = t + max(d, 1), 0
        else:
            here += 1
            t += d
            if d > 0:
                here = 0
            elif here >= max_symbols:
                t, here = t + 1, 0
    return found, score
