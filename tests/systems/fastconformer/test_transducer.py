"""Prediction and joint networks against NeMo and PyTorch, step by step against all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import settings, tree
from jasr.interop import sections
from jasr.losses.transducer import rnnt_loss, tdt_loss
from jasr.systems.fastconformer import nemo_config
from jasr.systems.fastconformer.transducer import (
    Joint,
    JointConfig,
    Prediction,
    PredictionConfig,
)

DURATIONS = (0, 1, 2, 3, 4)


def error(got, want):
    """Largest difference as a share of the largest value."""
    want = np.asarray(want)
    return np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))


@pytest.fixture(params=["tiny_tdt", "tiny_rnnt"])
def golden(goldens, request):
    """(name, arrays, params {"decoder", "joint"}, Prediction, Joint) of a NeMo model."""
    with np.load(goldens / "nemo" / "transducer" / f"{request.param}.npz") as f:
        z = dict(f)
    prefix = "params/"
    params = {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}
    tdt = request.param == "tiny_tdt"
    prediction = Prediction(PredictionConfig(vocab_size=64, pred_hidden=48, dropout=0.2))
    joint = Joint(JointConfig(64, 64, 48, 40, num_extra_outputs=5 * tdt, dropout=0.2))
    return request.param, z, tree.unflatten(params), prediction, joint


def test_networks_equal_nemo(golden):
    _, z, params, prediction, joint = golden
    tokens = np.asarray(z["targets"], np.int32)
    variables = {"params": params["decoder"]}
    out = prediction.apply(variables, tokens)
    np.testing.assert_allclose(out, z["decoder_out"], atol=2e-6)

    @jax.jit
    def step(token, state):
        return prediction.apply(variables, token, state, method="step")

    state = prediction.apply(variables, len(tokens), method="initial_state")
    for u, token in enumerate(np.pad(tokens, ((0, 0), (1, 0)), constant_values=64).T):
        g, state = step(token, state)
        np.testing.assert_allclose(g, out[:, u], atol=1e-6)
    np.testing.assert_allclose(state[0], z["state_h"], atol=2e-6)
    np.testing.assert_allclose(state[1], z["state_c"], atol=2e-6)

    variables = {"params": params["joint"]}
    f, g = z["encoded"], z["decoder_out"]
    logits, stages = joint.apply(variables, f, g, mutable="stages")
    assert error(stages["stages"]["enc_proj"][0], z["enc_proj"]) < 1e-6
    assert error(stages["stages"]["pred_proj"][0], z["pred_proj"]) < 1e-6
    assert error(logits[:, 3], z["raw_frame_3"]) < 2e-6
    node = joint.apply(variables, z["enc_proj"][:, 3] + z["pred_proj"][:, 0], method="output")
    np.testing.assert_allclose(node, logits[:, 3, 0], atol=2e-5)


def test_all_logits_equal_nemo(shared_dir, golden):
    name, z, params, _, joint = golden
    with np.load(shared_dir / "goldens" / "nemo" / f"{name}.npz") as full:
        want = full["joint/raw"]
    assert (
        error(joint.apply({"params": params["joint"]}, z["encoded"], z["decoder_out"]), want) < 2e-6
    )


def test_gradients_of_training_equal_nemo(golden):
    name, z, params, prediction, joint = golden
    rows = tuple(np.asarray(z[k], np.int32) for k in ("encoded_len", "targets", "target_len"))

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        bound = joint.bind({"params": params["joint"]})
        g = prediction.apply({"params": params["decoder"]}, rows[1])
        parts = (bound.encoder_part(z["encoded"]), bound.prediction_part(g), *bound.output_layer())
        if name == "tiny_rnnt":
            return rnnt_loss(*parts, *rows, blank=64)[0].mean()
        return tdt_loss(*parts, *rows, blank=64, durations=DURATIONS, sigma=0.02)[0].mean()

    loss, grad = mean(params)
    grad = tree.flatten(grad)
    np.testing.assert_allclose(loss, z["total_loss"], rtol=1e-5)
    # The TDT model is so sure that PyTorch's float32 gradients are 9e-4 from those in float64.
    limit = 1e-4 if name == "tiny_rnnt" else 3e-3
    for key, value in z.items():
        kind, _, path = key.partition("/")
        if kind == "grad":
            assert error(grad[path], value) < limit, path
        elif kind == "gradnorm":
            np.testing.assert_allclose(np.linalg.norm(grad[path]), value, rtol=limit / 3)
    assert not np.any(grad["decoder/prediction/embed/embedding"][64])


def torch_lstm(layers, size, seed=0):
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    return torch.nn.LSTM(size, size, layers, batch_first=True)


def test_two_layers_equal_pytorch():
    their = torch_lstm(2, 6)
    import torch

    config = PredictionConfig(vocab_size=9, pred_hidden=6, pred_rnn_layers=2)
    module = Prediction(config)
    tokens = np.random.default_rng(0).integers(0, 9, (3, 7))
    params = module.init(jax.random.key(0), tokens)["params"]
    weights = {k: v.detach().numpy() for k, v in their.named_parameters()}
    params["prediction"]["dec_rnn"]["lstm"] = weights
    table = torch.tensor(np.asarray(params["prediction"]["embed"]["embedding"]), requires_grad=True)
    start = torch.zeros(3, 1, 6)
    want, _ = their(torch.cat([start, table[torch.tensor(tokens)]], dim=1))
    weight = np.random.default_rng(1).standard_normal(want.shape).astype(np.float32)
    (want * torch.tensor(weight)).sum().backward()

    def total(params):
        out = module.apply({"params": params}, tokens)
        return jnp.vdot(weight, out), out

    (_, got), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-6)
    for name, parameter in their.named_parameters():
        found = grad["prediction"]["dec_rnn"]["lstm"][name]
        assert error(found, parameter.grad.numpy()) < 1e-5, name
    assert error(grad["prediction"]["embed"]["embedding"], table.grad.numpy()) < 1e-5

    @jax.jit
    def step(token, state):
        return module.apply({"params": params}, token, state, method="step")

    state = (jnp.zeros((2, 3, 6)),) * 2
    for u, token in enumerate([np.full(3, 9), *tokens.T]):
        g, state = step(token, state)
        np.testing.assert_allclose(g, got[:, u], atol=1e-6)


def test_the_blank_is_zero_and_learns_nothing_with_or_without_a_row():
    tokens = np.array([[0, 3, 4, 1]])
    outs = []
    for as_pad in (True, False):
        module = Prediction(PredictionConfig(4, pred_hidden=5, blank_as_pad=as_pad))
        params = module.init(jax.random.key(1), tokens)["params"]
        table = params["prediction"]["embed"]["embedding"]
        assert table.shape == (4 + as_pad, 5)
        params["prediction"]["embed"]["embedding"] = jnp.ones_like(table)  # the blank's row too

        def total(params, module=module):
            out = module.apply({"params": params}, tokens)
            return jnp.sum(jnp.sin(out)), out

        (_, out), grad = jax.value_and_grad(total, has_aux=True)(params)
        outs.append(out)
        of_table = grad["prediction"]["embed"]["embedding"]
        assert not np.any(of_table[4:]) and not np.any(of_table[2])
        assert np.all(np.any(of_table[np.array([0, 1, 3])], axis=1))
    np.testing.assert_array_equal(*outs)


def test_initial_values_are_nemos():
    def weights(**settings):
        config = PredictionConfig(50, pred_hidden=32, pred_rnn_layers=2, **settings)
        variables = Prediction(config).init(jax.random.key(0), np.zeros((1, 1), int))
        return variables["params"]["prediction"]

    net = weights()
    table = net["embed"]["embedding"]
    assert not np.any(table[50]) and abs(np.std(table[:50]) - 1) < 0.1
    for layer in (0, 1):
        of = {k: v for k, v in net["dec_rnn"]["lstm"].items() if k.endswith(f"l{layer}")}
        assert np.all(of[f"bias_ih_l{layer}"][32:64] == 1)
        assert not np.any(of[f"bias_hh_l{layer}"][32:64]) and np.any(of[f"bias_hh_l{layer}"][:32])
        kernel = of[f"weight_hh_l{layer}"]
        assert kernel.shape == (128, 32) and 0.9 < np.max(np.abs(kernel)) * 32**0.5 <= 1
    half = weights(weights_init_scale=0.5, hidden_hidden_bias_scale=1.0)["dec_rnn"]["lstm"]
    np.testing.assert_allclose(half["weight_ih_l0"], net["dec_rnn"]["lstm"]["weight_ih_l0"] / 2)
    assert np.all(half["bias_ih_l1"][32:64] == 0.5) and np.any(half["bias_hh_l1"][32:64])
    chrono = weights(t_max=20)["dec_rnn"]["lstm"]["bias_ih_l0"]
    np.testing.assert_array_equal(chrono[:32], -chrono[32:64])
    assert np.all(np.exp(chrono[32:64]) <= 19.001) and not np.any(chrono[64:])


def test_training_drops_and_draws_and_evaluation_does_not():
    config = PredictionConfig(6, pred_hidden=16, pred_rnn_layers=2, dropout=0.5)
    tokens = np.array([[1, 2, 3]])
    variables = Prediction(config).init(jax.random.key(0), tokens)

    def run(seed, **settings):
        module = Prediction(PredictionConfig(6, 16, 2, **settings))
        return module.apply(variables, tokens, True, rngs={"dropout": jax.random.key(seed)})

    plain = Prediction(config).apply(variables, tokens)
    dropped = run(0, dropout=0.5)
    np.testing.assert_array_equal(dropped, run(0, dropout=0.5))
    assert 0.2 < np.mean(dropped == 0) < 0.8 and not np.any(plain == 0)
    drawn = run(0, random_state_sampling=True)
    assert np.all(drawn != plain) and np.all(drawn != run(1, random_state_sampling=True))

    joint = Joint(JointConfig(6, 8, 16, 12, dropout=0.5))
    f = np.ones((1, 4, 8), np.float32)
    variables = joint.init(jax.random.key(0), f, plain)
    apply = functools.partial(joint.apply, variables, f, plain)
    assert np.any(apply(True, rngs={"dropout": jax.random.key(0)}) != apply())


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_parts_of_the_joint_make_the_whole(activation):
    joint = Joint(JointConfig(6, 8, 16, 12, num_extra_outputs=2, activation=activation))
    rng = np.random.default_rng(0)
    f, g = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 4, 16))
    variables = joint.init(jax.random.key(0), f, g)
    bound = joint.bind(variables)
    enc, pred, (kernel, bias) = (
        bound.encoder_part(f),
        bound.prediction_part(g),
        bound.output_layer(),
    )
    assert kernel.shape == (12, 9) and bias.shape == (9,) and np.any(bias)
    hidden = getattr(jax.nn, activation)(enc[:, :, None] + pred[:, None])
    np.testing.assert_allclose(joint.apply(variables, f, g), hidden @ kernel + bias, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_states_in_float32():
    tokens = np.array([[1, 2, 3]])
    full = Prediction(PredictionConfig(6, pred_hidden=16))
    half = Prediction(PredictionConfig(6, pred_hidden=16, dtype="bfloat16"))
    variables = full.init(jax.random.key(0), tokens)
    out = half.apply(variables, tokens)
    assert (
        out.dtype == jnp.bfloat16
        and error(out.astype(np.float32), full.apply(variables, tokens)) < 0.02
    )
    state = half.apply(variables, 1, method="initial_state")
    g, state = half.apply(variables, tokens[:, 0], state, method="step")
    assert g.dtype == jnp.bfloat16 and all(s.dtype == jnp.float32 for s in state)
    joint = Joint(JointConfig(6, 8, 16, 12, dtype="bfloat16"))
    variables = joint.init(jax.random.key(0), jnp.ones((1, 2, 8)), out)
    assert joint.apply(variables, jnp.ones((1, 2, 8)), out).dtype == jnp.bfloat16


NEMO = {
    "decoder": {
        "_target_": "nemo.collections.asr.modules.RNNTDecoder",
        "normalization_mode": None,
        "random_state_sampling": False,
        "blank_as_pad": True,
        "vocab_size": 64,
        "prednet": {"pred_hidden": 48, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.2},
    },
    "joint": {
        "_target_": "nemo.collections.asr.modules.RNNTJoint",
        "log_softmax": None,
        "preserve_memory": False,
        "fuse_loss_wer": True,
        "fused_batch_size": 16,
        "num_extra_outputs": 5,
        "num_classes": 64,
        "vocabulary": ["a"] * 64,
        "jointnet": {
            "joint_hidden": 40,
            "activation": "ReLU",
            "dropout": None,
            "encoder_hidden": 64,
            "pred_hidden": 48,
        },
    },
}


TABLES = {
    "decoder": (nemo_config.PREDICTION, PredictionConfig),
    "joint": (nemo_config.JOINT, JointConfig),
}


def read(name, section):
    """The settings of a section; ValueError lists its problems."""
    (table, cls), problems = TABLES[name], []
    values = sections.complete(cls, sections.read(table, section, problems), name, problems)
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**values)


def test_configs_come_from_nemo_and_go_back():
    decoder = read("decoder", NEMO["decoder"])
    assert decoder == PredictionConfig(64, 48, 1, dropout=0.2) and decoder.blank == 64
    joint = read("joint", NEMO["joint"])
    assert joint == JointConfig(64, 64, 48, 40, 5, "relu", 0.0) and joint.outputs == 70
    for name, config in (("decoder", decoder), ("joint", joint)):
        written = sections.write(TABLES[name][0], settings.to_dict(config))
        assert read(name, written) == config
    how = sections.write(nemo_config.JOINT, settings.to_dict(joint), NEMO["joint"])
    assert how["fused_batch_size"] == 16 and how["fuse_loss_wer"]  # NeMo's own matter


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("decoder", {"normalization_mode": "layer"}, "decoder.normalization_mode is 'layer'"),
        (
            "decoder",
            {"_target_": "nemo.x.StatelessTransducerDecoder"},
            "StatelessTransducerDecoder",
        ),
        ("decoder", {"prednet": {"rnn_hidden_size": 96}}, "prednet.rnn_hidden_size is 96"),
        (
            "decoder",
            {"prednet": {"pred_rnn_layers": 0}},
            "prednet.pred_rnn_layers is 0, must be at least 1",
        ),
        ("joint", {"masking_prob": 0.5}, "joint.masking_prob is 0.5"),
        ("joint", {"jointnet": {"joint_hidden": 4}}, "jointnet.encoder_hidden is missing; joint.j"),
        ("joint", {"jointnet": {"activation": 3}}, "jointnet.activation is 3, which it cannot be"),
        ("joint", {"num_classes": 0}, "joint.num_classes is 0, must be at least 1"),
    ],
)
def test_sections_that_are_not_known_are_refused_by_name(section, change, message):
    with pytest.raises(ValueError, match=message):
        read(section, NEMO[section] | change)
