"""The task of NeMo's recognisers: losses and transcripts of every head, in any batch."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import common
from jasr import settings as settings_lib
from jasr import sharding, text, tree
from jasr.systems import loading
from jasr.systems.fastconformer.settings import LossConfig

KINDS = ("ctc", "rnnt", "tdt", "hybrid")
SOME = ("rnnt", "hybrid")  # every loss is in one of them: a hybrid has TDT and CTC
RATE = 16000
TOKENIZER = text.CharTokenizer((*" abcd", text.BLANK))
# Compiled with little optimisation: these graphs run once, and compiling is what a test waits for.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(kind, **changes):
    """A plain config of a tiny model without random parts."""
    c = common.default("parakeet")
    c.model.kind = kind
    c.model.encoder.update(
        n_layers=1, d_model=16, n_heads=2, subsampling_factor=4, subsampling_conv_channels=4,
        conv_norm_type="layer_norm", dropout=0.0, dropout_pre_encoder=0.0, dropout_emb=0.0,
        dropout_att=0.0, padding_counts=False,
    )  # fmt: skip
    c.model.decoder.update(pred_hidden=8, dropout=0.0)
    c.model.joint.update(joint_hidden=8, dropout=0.0)
    c.loss.update(kind="tdt" if kind == "hybrid" else kind, omega=0.0)
    c.spec_augment.update(freq_masks=0, time_masks=0)
    for name, value in changes.items():
        section, key = name.split("__")
        c[section][key] = value
    return json.loads(c.to_json())


def batch(lengths=(1.0, 0.6, 0.8), longest=1.0, tokens=((1, 2, 3), (4, 4), (2,))):
    """Noise of so many seconds as a batch of `longest` seconds; rows hold their own index."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (3, 2 * RATE)).astype(np.float32)
    audio = np.zeros((len(lengths), int(longest * RATE)), np.float32)
    ids = np.zeros((len(lengths), 4), np.int32)
    for row, seconds in enumerate(lengths):
        audio[row, : int(seconds * RATE)] = noise[row, : int(seconds * RATE)]
        ids[row, : len(tokens[row])] = tokens[row]
    return {
        "audio": audio,
        "audio_len": np.array([int(s * RATE) for s in lengths], np.int32),
        "tokens": ids,
        "token_len": np.array([len(t) for t in tokens[: len(lengths)]], np.int32),
        "index": np.arange(len(lengths), dtype=np.int32),
    }


def keys():
    return {"augment": jax.random.key(1), "dropout": jax.random.key(2)}


def loss_of(task, variables, rows, keys, step=0):
    """What `task.loss` gives for a whole batch, of which `rows` are all."""
    return task.loss(variables, rows, task.divisors(rows), keys, step)


@functools.cache
def made(kind):
    """(task, variables) of a tiny model."""
    task = loading.build(config(kind), TOKENIZER)
    return task, jit(task.init)(jax.random.key(0), batch())


@pytest.mark.parametrize("kind", SOME)
def test_losses_do_not_depend_on_padding_or_batch_mates(kind):
    task, variables = made(kind)
    loss, divisors = jit(task.loss), task.divisors(batch())
    assert set(map(float, divisors.values())) == {3.0}
    total, (_, metrics) = loss(variables, batch(), divisors, keys(), 0)
    assert metrics["infeasible"] == 0
    longer, _ = loss(variables, batch(longest=1.5), divisors, keys(), 0)
    alone = [
        loss(variables, jax.tree.map(lambda x, r=r: x[r : r + 1], batch()), divisors, keys(), 0)[0]
        for r in range(3)
    ]
    np.testing.assert_allclose(longer, total, rtol=1e-5)
    np.testing.assert_allclose(sum(alone), total, rtol=1e-5)


@pytest.mark.parametrize("kind", SOME)
def test_gradients_are_finite_and_reach_every_parameter(kind):
    task, variables = made(kind)
    rows = batch()
    rows["audio_len"][2] = rows["token_len"][2] = 0  # padding of the batch

    def loss(params):
        return loss_of(task, {**variables, "params": params}, rows, keys())[0]

    grads = tree.flatten(jit(jax.grad(loss))(variables["params"]))
    assert all(np.all(np.isfinite(g)) for g in grads.values())
    dead = [path for path, g in grads.items() if not np.any(g)]
    # one key bias moves all scores of a query alike
    assert all("linear_k/bias" in path for path in dead), dead


@pytest.mark.parametrize("kind", KINDS)
def test_rules_of_sharding_cover_every_parameter(kind):
    task = loading.build(config(kind), TOKENIZER)
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch())
    paths = list(tree.flatten(shapes["params"]))
    assert set(tree.match(task.sharding, paths, what="sharding")) == set(paths)


def test_a_batch_on_eight_devices_is_worked_on_where_it_lies():
    if jax.device_count() < 8:
        pytest.skip("fewer than 8 devices")
    task, variables = made("hybrid")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=8))
    rows = jax.tree.map(lambda x: np.concatenate([x] * 3)[:8], batch())
    params = jax.device_put(variables["params"], NamedSharding(mesh, PartitionSpec()))

    def step(task, *arguments):
        def loss(params, rows):
            return loss_of(task, {**variables, "params": params}, rows, keys())[0]

        return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()

    placed = params, sharding.put_batch(rows, mesh)
    spread = step(dataclasses.replace(task, groups=sharding.batch_ways(mesh)), *placed)
    moved = re.findall(
        r"= (\S+?)\{\S* (?:all-gather|all-to-all|collective-permute)", spread.as_text()
    )
    assert set(moved) == {"f32[8,104,160]"}  # the front end's frames of the audio, nothing later
    alone = variables["params"], rows
    (got, grad), (want, want_grad) = spread(*placed), step(task, *alone)(*alone)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, array in tree.flatten(want_grad).items():
        limit = 1e-4 * np.abs(array).max() + 1e-6
        np.testing.assert_allclose(tree.flatten(grad)[path], array, rtol=0, atol=limit)


@pytest.mark.parametrize("kind", ("ctc", *SOME))
def test_predictions_do_not_depend_on_batch_mates_and_lie_inside(kind):
    task, variables = made(kind)
    # an untrained head says blank everywhere: make the tokens likely
    name = {"ctc": "decoder/decoder_layers_0/bias", "hybrid": "joint/joint_net/bias"}
    flat = tree.flatten(variables["params"])
    path = name.get(kind, "joint/joint_net/bias")
    flat[path] = flat[path].at[:5].add(0.5)
    variables = {**variables, "params": tree.unflatten(flat)}
    predict = jit(task.predict)
    together = jax.device_get(predict(variables, batch()))
    for r in range(3):
        one = jax.device_get(predict(variables, jax.tree.map(lambda x, r=r: x[r : r + 1], batch())))
        n = together["token_len"][r]
        assert n == one["token_len"][0] and n > 0
        for key in ("tokens", "start_frame", "end_frame"):
            np.testing.assert_array_equal(one[key][0, :n], together[key][r, :n])
        assert np.all(together["end_frame"][r, :n] <= together["logit_len"][r])
        assert np.all(np.diff(together["start_frame"][r, :n]) >= 0)


def test_hybrid_is_the_weighted_sum_and_decodes_with_either_branch():
    task, variables = made("hybrid")
    total, _ = jit(loss_of, static_argnums=0)(task, variables, batch(), keys())
    parts = []
    for weight in (0.0, 1.0):
        part = loading.build(config("hybrid", loss__ctc_weight=weight), TOKENIZER)
        parts.append(jit(loss_of, static_argnums=0)(part, variables, batch(), keys())[0])
    np.testing.assert_allclose(total, 0.7 * parts[0] + 0.3 * parts[1], rtol=1e-5)
    by_ctc = loading.build(config("hybrid", decoding__branch="ctc"), TOKENIZER)
    assert "durations" not in jax.eval_shape(by_ctc.predict, variables, batch())


def test_micro_batches_add_up_to_the_batch_where_the_divisors_of_a_hybrid_differ():
    """The CTC loss of the first row has no path: its divisor is smaller than the transducer's."""
    task, variables = made("hybrid")
    rows = batch(tokens=((1, 1, 1, 1), (4, 4), (2,)), lengths=(0.2, 0.6, 0.8))
    divisors = task.divisors(rows)
    assert {k: float(v) for k, v in divisors.items()} == {"transducer": 3, "ctc": 2}
    loss = jit(task.loss)
    whole = loss(variables, rows, divisors, keys(), 0)[0]
    parts = [jax.tree.map(lambda x, r=r: x[r : r + 1], rows) for r in range(3)]
    cut = [loss(variables, part, divisors, keys(), 0)[0] for part in parts]
    np.testing.assert_allclose(sum(cut), whole, rtol=1e-5)


def test_omega_draws_one_of_two_losses_for_the_batch():
    _, variables = made("hybrid")
    task = loading.build(config("hybrid", loss__omega=0.5), TOKENIZER)
    loss = jit(functools.partial(loss_of, task))
    seen = {
        float(loss(variables, batch(), keys() | {"dropout": jax.random.key(n)})[0])
        for n in range(12)
    }
    assert len(seen) == 2
    plain = jit(functools.partial(loss_of, made("hybrid")[0]))(variables, batch(), keys())[0]
    assert min(abs(x - plain) for x in seen) < 1e-4


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="blank as the last id"):
        loading.build(config("ctc"), text.CharTokenizer((text.BLANK, *"abc")))
    with pytest.raises(ValueError, match="'rnnt' does not train a model of kind 'tdt'"):
        loading.build(config("tdt", loss__kind="rnnt"), TOKENIZER)
    with pytest.raises(ValueError, match="feat_in 80 differs"):
        loading.build(config("ctc", front_end__n_mels=64), TOKENIZER)
    with pytest.raises(ValueError, match="config.model.kind must be one of .* got 'aed'"):
        loading.build(config("ctc") | {"model": {"kind": "aed"}}, TOKENIZER)
    with pytest.raises(ValueError, match="config.model.encoder.n_leyers"):
        loading.build(config("ctc") | {"model": {"encoder": {"n_leyers": 2}}}, TOKENIZER)


@pytest.mark.parametrize(
    "name, value",
    [
        ("omega", 2.0), ("sigma", -1.0), ("ctc_weight", 7.0), ("durations", (1, 2.5)),
        ("durations", (0,)), ("durations", (-1, 1)), ("ctc_reduction", "foo"), ("reduction", "foo"),
    ],
)  # fmt: skip
def test_settings_of_the_loss_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"config.loss.{name} "):
        settings_lib.build(LossConfig, {name: value}, "config.loss")
    LossConfig(reduction="sum")  # of a NeMo file that is only decoded


def test_files_of_nemo_before_2_5_are_heard_alike_in_any_batch():
    settings = config("ctc")
    settings["model"]["encoder"] |= {"masked_subsampling": False, "padding_counts": True}
    task = loading.build(settings, TOKENIZER)
    variables = jit(task.init)(jax.random.key(0), batch())
    frames = jit(task.frames)
    # 57 frames of features: the last one of the encoder's would read what follows them
    want, count = frames(variables, batch((0.57,), 0.57))
    for longest in (1.0, 2.0):
        got, length = frames(variables, batch((0.57,), longest))
        assert length[0] == count[0] > 10
        np.testing.assert_allclose(got[0, : count[0]], want[0, : count[0]], atol=1e-5)


def test_frames_that_texts_need():
    ctc, tdt = (loading.build(config(kind), TOKENIZER) for kind in ("ctc", "tdt"))
    assert ctc.frames_needed([1, 1, 2]) == 4 and tdt.frames_needed([1, 1, 2]) == 1
    slow = loading.build(config("tdt", loss__durations=(1, 2)), TOKENIZER)
    assert slow.frames_needed([1, 1, 2]) == 4
    assert ctc.seconds_per_frame == pytest.approx(0.04)
