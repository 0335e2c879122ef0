"""LaCT ASR: the reference's numbers, its sizes, and independence of padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import tree
from jasr.losses.ctc import ctc_loss
from jasr.systems.lact import model as lact
from jasr.systems.lact.model import BASE, IMPROVED, LARGE, LactConfig, LactCtc
from tests.layers.fast_weight_goldens import close, close_gradients, error, jit, torch_tree


def shapes(config):
    """Shapes of the variables, without making them."""
    mel, length = jnp.zeros((1, 32, config.n_mels)), jnp.array([32])
    return jax.eval_shape(lambda: LactCtc(config).init(jax.random.key(0), mel, length))


@pytest.mark.parametrize(
    "name",
    [
        "prenorm_lowrank",
        pytest.param("updates", marks=pytest.mark.slow),
        pytest.param("noupdate", marks=pytest.mark.slow),
    ],
)
def test_model_matches_the_reference(golden, name):
    z = golden(f"lact_asr_{name}")
    config = LactConfig(
        n_mels=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        audio_encoder_layers=int(z["conv_layers"]),
        audio_encoder_dropout=0.0,
        num_attn_heads=int(z["num_attn_heads"]),
        num_lact_heads=int(z["num_lact_heads"]),
        lact_chunk_size=int(z["chunk"]),
        window_size=int(z["chunk"]),
        rope_theta=5e5,
        use_muon=True,
        attn_qk_norm=bool(z["attn_qk_norm"]),
        ttt_prenorm=bool(z.get("ttt_prenorm", 0)),
        w0_w2_low_rank=int(z.get("w0_w2_low_rank", -1)),
        ctc_vocab_size=9,
        batch_norm="reference",
    )
    model = LactCtc(config)
    params, stats = torch_tree(z, "p:"), torch_tree(z, "b:")
    mel, length, tokens, token_len = (
        jnp.asarray(z[k]) for k in ("mel", "input_lengths", "labels", "label_lengths")
    )

    def loss_of(logits):
        return jnp.mean(ctc_loss(logits, length, tokens, token_len)[0] / token_len)

    def loss(params, mel):
        variables = {"params": params, "batch_stats": stats}
        logits = model.apply(variables, mel.swapaxes(1, 2), length)["logits"]
        return loss_of(logits), logits

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, logits), (d_params, d_mel) = grad(params, mel)
    assert error(logits, z["logits_eval"]) <= 1e-4 and error(value, z["loss_eval"]) <= 1e-5
    assert error(d_mel, z["grad_eval_mel"]) <= 3e-4
    got = tree.flatten(d_params)
    want = tree.flatten(torch_tree(z, "grad_eval_p:"))
    # Half a last bit in every parameter moves the momentum's gradient by up to 1.7e-4, ours as well
    # as the golden's.
    close_gradients(got, want, 4e-4)
    # chunks longer than the utterance: nothing ever reaches the rates and the momentum
    dead = [k for k in got if not np.any(got[k])]
    assert len(dead) == len(z["unused_params"])
    assert all("lr_proj" in k or "momentum_proj" in k for k in dead)

    variables = {"params": params, "batch_stats": stats}
    out, after = run(
        config, variables, mel.swapaxes(1, 2), length, train=True, mutable=["batch_stats"]
    )
    assert error(out["logits"], z["logits_train"]) <= 1e-4
    assert error(loss_of(out["logits"]), z["loss_train"]) <= 1e-5
    close(tree.flatten(after["batch_stats"]), tree.flatten(torch_tree(z, "b_after:")), 1e-5)
    expected = 0 if name == "noupdate" else 2
    assert out["updates"].tolist() == [expected, expected]


@pytest.mark.parametrize(
    ("fields", "count"), [(BASE, 88_558_800), (IMPROVED, 311_165_808), (LARGE, 316_917_600)]
)
def test_published_sizes_have_the_original_number_of_parameters(fields, count):
    params = shapes(LactConfig(**fields, ctc_vocab_size=29))["params"]
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)) == count


SMALL = LactConfig(
    n_mels=4,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attn_heads=2,
    num_lact_heads=2,
    ctc_vocab_size=5,
    lact_chunk_size=4,
    window_size=4,
    subsampling=2,
    conv_kernel=3,
    use_muon=True,
    fw_base_lr=0.1,
    initializer_range=0.0,
    audio_encoder_dropout=0.0,
    intermediate_ctc=(1,),
)


def batch(frames=22, lengths=(22, 13, 9)):
    mel = np.random.default_rng(0).normal(size=(len(lengths), frames, 4)).astype(np.float32)
    return mel, np.array(lengths)


def variables_of(config):
    """Random variables in which everything does something."""
    r = np.random.default_rng(0)

    def draw(path, x):
        value = r.normal(size=x.shape).astype(np.float32)
        if path.endswith(("scale", "var")):
            return 1 + 0.2 * np.abs(value)
        fan_in = x.shape[-1] if path[-3:] in ("/w0", "/w1", "/w2") else np.prod(x.shape[:-1])
        return value / np.sqrt(fan_in) if len(x.shape) > 1 else 0.3 * value

    flat = tree.flatten(shapes(config))
    return tree.unflatten({path: draw(path, x) for path, x in flat.items()})


def run(config, variables, mel, length, **options):
    """The model's results, compiled."""
    apply = jit(lambda v, mel, length: LactCtc(config).apply(v, mel, length, **options))
    return apply(variables, mel, length)


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "block"])
def test_results_do_not_depend_on_padding_or_batch_mates(mode):
    config = dataclasses.replace(SMALL, lact_mode=mode)
    variables = variables_of(config)
    mel, length = batch()
    whole = run(config, variables, mel, length)
    # rows 1 and 2 alone, in a longer bucket, with rubbish in the padding
    longer = np.pad(mel, ((0, 0), (0, 8), (0, 0)), constant_values=7.0)
    longer = np.where(np.arange(30)[:, None] < length[:, None, None], longer, np.nan)[1:]
    other = run(config, variables, longer, length[1:])
    np.testing.assert_array_equal(whole["logit_len"], [11, 7, 5])
    assert other["logits"].shape == (2, 15, 5)
    for row, n in ((1, 7), (2, 5)):
        for a, b in (
            (whole["logits"], other["logits"]),
            (whole["intermediate"][0], other["intermediate"][0]),
        ):
            assert error(b[row - 1, :n], a[row, :n]) < 1e-5
    np.testing.assert_array_equal(whole["updates"][1:], other["updates"])


def test_batch_statistics_and_training_logits_ignore_padding():
    config = dataclasses.replace(SMALL, lact_every=0, conv_kernel=0)
    variables = variables_of(config)
    mel, length = batch()
    longer = np.pad(mel, ((0, 0), (0, 8), (0, 0)), constant_values=3.0)
    outs = [
        run(config, variables, x, length, train=True, mutable=["batch_stats"])
        for x in (mel, longer)
    ]
    np.testing.assert_allclose(outs[0][0]["logits"][0], outs[1][0]["logits"][0, :11], atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(o[1]) for o in outs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_silence_and_empty_rows_give_finite_gradients():
    model, variables = LactCtc(SMALL), variables_of(SMALL)

    def loss(params):
        out = model.apply(
            {**variables, "params": params},
            jnp.zeros((3, 22, 4)),
            jnp.array([22, 5, 0]),
            train=True,
            mutable=["batch_stats"],
        )[0]
        return jnp.sum(out["logits"] ** 2)

    for g in jax.tree.leaves(jit(jax.grad(loss))(variables["params"])):
        assert np.all(np.isfinite(g))


def test_recomputed_blocks_have_the_same_gradients_and_dropout():
    variables, (mel, length) = variables_of(SMALL), batch()

    def gradients(remat):
        model = LactCtc(dataclasses.replace(SMALL, remat=remat, dropout=0.2))

        def loss(params):
            given = {**variables, "params": params}
            settings = dict(rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])
            out = model.apply(given, mel, length, train=True, **settings)[0]
            return jnp.sum(out["logits"] ** 2)

        return tree.flatten(jit(jax.grad(loss))(variables["params"]))

    close(gradients(True), gradients(False), 1e-5)


def test_updates_can_be_switched_off_and_the_branch_removed_with_the_same_parameters():
    variables = variables_of(SMALL)
    mel, length = batch()
    out = {
        kind: run(dataclasses.replace(SMALL, lact_updates=kind), variables, mel, length)
        for kind in ("on", "off", "no_branch")
    }
    assert out["on"]["updates"].tolist() == [2, 1, 1]
    assert out["off"]["updates"].tolist() == out["no_branch"]["updates"].tolist() == [0, 0, 0]
    assert error(out["on"]["logits"], out["off"]["logits"]) > 1e-3
    assert error(out["off"]["logits"], out["no_branch"]["logits"]) > 1e-3
    # the first chunk reads the initial weights either way, up to the convolutions' look-ahead
    np.testing.assert_allclose(out["on"]["logits"][:, :4], out["off"]["logits"][:, :4], atol=1e-5)


def test_without_fast_weights_the_control_has_no_such_parameters():
    config = dataclasses.replace(SMALL, lact_every=0)
    names = tree.flatten(shapes(config)["params"])
    assert not [n for n in names if "/w1" in n or "lr_proj" in n]
    every_second = tree.flatten(shapes(dataclasses.replace(SMALL, lact_every=2))["params"])
    assert [n for n in every_second if n.endswith("/w1")] == ["model/layers_1/attn/w1"]


def test_configurations_that_never_update_are_refused_unless_reference():
    short = dataclasses.replace(SMALL, lact_mode="causal", lact_chunk_size=100)
    with pytest.raises(ValueError, match="never be updated.*lact_chunk_size < 100"):
        lact.check_updates(short, 200)
    lact.check_updates(short, 202)
    lact.check_updates(dataclasses.replace(short, lact_mode="reference"), 200)
    lact.check_updates(dataclasses.replace(short, lact_mode="bidirectional"), 200)
    lact.check_updates(dataclasses.replace(short, lact_every=0), 200)
    assert lact.num_updates(short, jnp.array([200, 201, 402])).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(lact_mode="casual"), "lact_mode must be one of"),
        (dict(hidden_size=100, num_attn_heads=3), "not a multiple of num_attn_heads 3"),
        (dict(subsampling=4, audio_encoder_layers=1), "one convolution per factor of 2"),
        (dict(intermediate_ctc=(12,)), "between 1 and"),
        (dict(ttt_loss_type="l2"), "ttt_loss_type must be one of"),
    ],
)
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        LactConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        BASE,
        IMPROVED,
        dict(hidden_size=16, num_attn_heads=2, lact_every=0, conv_kernel=3),
        dict(
            hidden_size=16, num_attn_heads=2, qkv_bias=True, use_momentum=False,
            learnable_ttt_scale=False, intermediate_ctc=(1, 2), self_conditioning=True,
        ),
    ],
)  # fmt: skip
def test_sharding_covers_every_parameter_and_has_no_dead_rule(fields):
    config = LactConfig(**fields)
    params = tree.flatten(shapes(config)["params"])
    axes = tree.match(lact.sharding(config), params)
    assert all(len(axes[k]) in (0, len(params[k].shape)) for k in params)


def test_fast_weights_are_carried_from_segment_to_segment():
    # attention of window 1 and no look-ahead: only the fast weights connect the frames
    config = dataclasses.replace(
        SMALL, window_size=1, conv_kernel=0, positions="none", ttt_nope=True, subsampling=1,
        audio_encoder_layers=1, use_muon=False,
    )  # fmt: skip
    variables = variables_of(config)
    mel, _ = batch()
    mel[:, 11:13] = 0  # the width-3 convolution sees the same neighbours, zeros, at the cut

    @jit
    def segment(part, stream):
        length = jnp.full(3, part.shape[1])
        return LactCtc(config).apply(variables, part, length, stream=stream)

    empty = lact.stream_state(config, 3)
    whole = segment(mel[:, :20], empty)
    first = segment(mel[:, :12], empty)
    second = segment(mel[:, 12:20], first["stream"])
    both = np.concatenate([first["logits"], second["logits"]], axis=1)
    np.testing.assert_allclose(both, whole["logits"], atol=1e-5)
    streams = ({**out["stream"], "fresh": None} for out in (second, whole))
    leaves = (dict(enumerate(jax.tree.leaves(stream))) for stream in streams)
    close(*leaves, 1e-5)
    anew = segment(mel[:, 12:20], {**first["stream"], "fresh": np.array([True, False, True])})
    for row, fresh in enumerate((True, False, True)):
        changed = error(anew["logits"][row], second["logits"][row]) > 1e-3
        assert changed == fresh


def test_sixteen_bit_model_is_near_the_f32_one():
    variables = variables_of(SMALL)
    config = dataclasses.replace(SMALL, use_muon=False)
    want = run(config, variables, *batch())["logits"]
    got = run(dataclasses.replace(config, dtype="bfloat16"), variables, *batch())["logits"]
    assert got.dtype == jnp.float32 and error(got, want) < 0.05


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_as_a_product_equals_a_loop(stride):
    mel, _ = batch(frames=7)
    layer = lact.Conv(3, stride, SMALL)
    variables = layer.init(jax.random.key(0), mel)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    padded = np.pad(mel, ((0, 0), (1, 2), (0, 0)))
    want = np.stack([
        sum(padded[:, t + i] @ kernel[i] for i in range(3)) + bias for t in range(0, 7, stride)
    ], axis=1)  # fmt: skip
    np.testing.assert_allclose(layer.apply(variables, mel), want, atol=1e-5)


def test_dropout_keeps_the_mean_and_the_asked_share():
    x = jnp.ones((50, 40, 30))
    y = lact.Dropout(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    assert abs(float(jnp.mean(y == 0)) - 0.3) < 0.01 and abs(float(jnp.mean(y)) - 1) < 0.02
    again = lact.Dropout(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(1)})
    assert 0.3 < float(jnp.mean(y != again)) < 0.5  # 2 * 0.3 * 0.7 of independent masks
    assert lact.Dropout(0.3).apply({}, x, False) is x
