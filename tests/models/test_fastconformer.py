"""FastConformer: NeMo's numbers, independence of padding, and its attention against plain loops."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import tree
from jasr.interop import torch_file
from jasr.layers import relative_attention
from jasr.layers.relative_attention import Reach
from jasr.models.fastconformer import encoder, mixers
from jasr.models.fastconformer.encoder import FastConformer, FastConformerConfig, output_lengths
from jasr.models.fastconformer.nemo_sections import read_encoder
from jasr.models.fastconformer.settings import ATTENTION
from tests.layers.fast_weight_goldens import close, error, jit

VARIANTS = (
    "layernorm_conv groupnorm_conv nobias noxscale local_attn local_attn_global1 "
    "limited_context_relpos chunked_limited streaming_causal abs_pos tied_biases striding4 dw4 "
    "kernel31_ff no_subsampling feat_out reduction_mid stacking stacking_norm"
).split()


@pytest.fixture
def variant(goldens, request):
    """name -> (config, arrays, mel [B,T,F], mel_len) of an encoder that NeMo ran."""

    def load(name):
        if name == "batchnorm_default":
            with np.load(goldens / "nemo" / "encoder" / f"{name}.npz") as f:
                z = dict(f)
            section = json.loads(str(z["config"]))
        else:
            folder = request.getfixturevalue("shared_dir") / "goldens" / "nemo"
            with np.load(folder / f"enc_{name}.npz") as f, np.load(folder / "enc_input.npz") as x:
                z = {**f, **x}
            section = json.loads((folder / "enc_variants.json").read_text("utf-8"))[name]
        config = FastConformerConfig(**read_encoder(section, False, []))
        return config, z, z["x"].swapaxes(1, 2), z["x_len"]

    return load


def variables_of_nemo(weights, prefix, tied=False):
    """Variables of {prefix + NeMo's name: array}."""
    params, stats = {}, {}
    for key, x in weights.items():
        if not key.startswith(prefix) or key.endswith("num_batches_tracked"):
            continue
        path = re.sub(r"\.(\d+)(?=\.)", r"_\1", key[len(prefix) :]).replace(".", "/")
        if tied and re.search("layers_[1-9].*pos_bias", path):
            continue
        x = np.asarray(x)
        axes = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}[x.ndim]
        path = path.replace("/running_", "/").removesuffix("weight")
        if path.endswith("/"):
            path += "scale" if x.ndim == 1 else "kernel"
            x = x.transpose(axes)
        (stats if path.endswith(("/mean", "/var")) else params)[path] = jnp.asarray(x)
    return {"params": tree.unflatten(params), "batch_stats": tree.unflatten(stats)}


def shapes(config):
    """Shapes of the variables, without making them."""
    mel = jnp.zeros((1, 64, config.feat_in))
    return jax.eval_shape(lambda: FastConformer(config).init(jax.random.key(0), mel, jnp.ones(1)))


def run(config, variables, mel, length, **options):
    """The encoder's results, compiled."""
    apply = jit(lambda v, mel, length: FastConformer(config).apply(v, mel, length, **options))
    return apply(variables, mel, length)


def stages_of(recorded):
    """{"tap of the goldens": array} of the collection "stages"."""
    names = {}
    for path, (x, *_) in tree.flatten(recorded).items():  # positions come again after a reduction
        path = path.removesuffix("_out") if path != "layers_0/out" else path
        names[re.sub(r"layers_(\d+)/", r"layer\1_", path).replace("_out", "")] = x
    return names


@pytest.mark.parametrize("name", ["batchnorm_default", *VARIANTS])
def test_every_stage_matches_nemo(variant, name):
    config, z, mel, length = variant(name)
    variables = variables_of_nemo(z, "param/", config.tied_biases)
    tree.compare(shapes(config)["params"], variables["params"])
    (out, out_len), recorded = run(config, variables, mel, length, mutable=["stages"])
    np.testing.assert_array_equal(out_len, z["y_len"])
    np.testing.assert_array_equal(output_lengths(config, length, mel.shape[1]), z["y_len"])
    valid = np.arange(out.shape[1]) < z["y_len"][:, None]
    assert error(out[valid], z["y"].swapaxes(1, 2)[valid]) <= 2e-6
    got = stages_of(recorded["stages"])
    want = {key[4:]: x for key, x in z.items() if key.startswith("tap/")}
    want.pop("pos_emb", None)  # [1,2T-1,D] there
    close({stage: got[stage] for stage in want}, want, 2e-6)


def test_training_matches_nemo(variant):
    config, z, mel, length = variant("batchnorm_default")
    fields = [f.name for f in dataclasses.fields(config) if f.name.startswith("dropout")]
    config = dataclasses.replace(config, **dict.fromkeys(fields, 0.0))
    variables = variables_of_nemo(z, "param/")

    def loss(params):
        given = {**variables, "params": params}
        options = dict(train=True, mutable=["batch_stats"])
        (out, _), after = FastConformer(config).apply(given, mel, length, **options)
        return jnp.mean(out**2), (out, after["batch_stats"])

    (value, (out, stats)), grads = jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert error(value, z["train/loss"]) <= 1e-6
    assert error(out, z["train/y"].swapaxes(1, 2)) <= 2e-6
    after = variables_of_nemo(z, "train/buffer/")["batch_stats"]
    close(tree.flatten(stats), tree.flatten(after), 1e-6)
    norms = json.loads(str(z["train/gradnorm"]))
    filled = {"." + k: np.full(z["param/" + k].shape, norm) for k, norm in norms.items()}
    norms = tree.flatten(variables_of_nemo(filled, ".")["params"])
    norms = {k: float(x.ravel()[0]) for k, x in norms.items()}
    got = {k: float(jnp.linalg.norm(x)) for k, x in tree.flatten(grads).items()}
    assert set(got) == set(norms)
    top = max(norms.values())
    for k, want in norms.items():  # some are zero but for rounding: a norm removes a bias
        assert abs(got[k] - want) <= 2e-5 * want + 1e-7 * top, k


@pytest.mark.parametrize("name", ["ctc", "rnnt", "tdt", "hybrid_tdt"])
def test_encoders_of_nemo_models_match(shared_dir, tmp_path, name):
    import tarfile

    folder = shared_dir / "goldens" / "nemo"
    with np.load(folder / f"tiny_{name}.npz") as f, np.load(folder / "tiny_ctc.npz") as audio:
        z = {**f, "mel": audio["mel"]}
    with tarfile.open(folder / f"tiny_{name}.nemo") as archive:
        member = archive.extractfile("./model_weights.ckpt").read()
    (tmp_path / "weights.ckpt").write_bytes(member)
    weights = torch_file.read(tmp_path / "weights.ckpt")
    config = FastConformerConfig(
        n_layers=2,
        d_model=64,
        subsampling="dw_striding",
        subsampling_factor=8,
        subsampling_conv_channels=16,
        ff_expansion_factor=2,
        conv_kernel_size=9,
    )
    variables = variables_of_nemo(weights, "encoder.")
    mel = z["mel"].swapaxes(1, 2)
    (out, out_len), recorded = run(config, variables, mel, z["mel_len"], mutable=["stages"])
    np.testing.assert_array_equal(out_len, z["encoded_len"])
    assert error(out, z["encoded"].swapaxes(1, 2)) <= 2e-6
    want = {key[4:]: x for key, x in z.items() if key.startswith("enc/")}
    want["pos_emb"] = want["pos_emb"][0]
    got = stages_of(recorded["stages"])
    close({stage: got[stage] for stage in want}, want, 2e-6)


# ---- the attention -------------------------------------------------------------------------------


def attention_case(frames=23, heads=2, dim=4, lengths=(23, 15, 0)):
    r = np.random.default_rng(0)
    draw = lambda *shape: r.normal(size=shape).astype(np.float32)  # noqa: E731
    q, k, v = (draw(heads, len(lengths), frames, dim) for _ in range(3))
    weights = draw(6, heads, dim), draw(heads, dim), draw(heads, dim)
    return q, k, v, np.array(lengths), weights


def position(weights, distance):
    """p of a distance (numbers or arrays): any function of it will do; [..., N, H]."""
    a, b, c, d, e, f = weights
    x = np.asarray(distance)[..., None, None]
    return a * np.sin(b + 0.3 * x) + c * np.cos(d + 0.7 * x) + e * np.sin(f + 2.1 * x)


def plainly(q, k, v, lengths, weights, allowed):
    """Relative attention, one query after the other, in f64; `allowed`(i, j) as in NeMo's words."""
    p, u, w = weights
    out = np.zeros(q.shape)
    heads, batch, frames, dim = q.shape
    for n, b in np.ndindex(heads, batch):
        for i in range(lengths[b]):
            keys = [j for j in range(lengths[b]) if allowed(i, j)]
            scores = [
                (q[n, b, i] + u[n]) @ k[n, b, j] + (q[n, b, i] + w[n]) @ position(p, i - j)[n]
                for j in keys
            ]
            scores = np.array(scores, np.float64) / dim**0.5
            share = np.exp(scores - scores.max())
            out[n, b, i] = share @ v[n, b, keys] / share.sum()
    return out


REACHES = {
    "all": (Reach(), lambda i, j: True),
    "left": (Reach(4, -1), lambda i, j: i - j <= 4),
    "window": (Reach(3, 2), lambda i, j: -3 <= j - i <= 2),
    "causal": (Reach(5, 0), lambda i, j: 0 <= i - j <= 5),
    "chunks": (Reach(6, 2, 3), lambda i, j: 0 <= i // 3 - j // 3 <= 2),
    "chunks, all before": (Reach(-1, 2, 3), lambda i, j: i // 3 >= j // 3),
}


@pytest.mark.parametrize("kind", REACHES)
def test_attention_by_blocks_and_in_one_piece_is_the_plain_one(kind, monkeypatch):
    monkeypatch.setattr(relative_attention, "QUERY_BLOCK", 4)
    reach, allowed = REACHES[kind]
    q, k, v, lengths, weights = attention_case()
    want = plainly(q, k, v, lengths, weights, allowed)

    def attend(plan, reach, q, k, v, weights):
        first, last = plan.positions
        p = position(jnp.asarray(weights[0]), np.arange(first, last - 1, -1)).swapaxes(0, 1)
        relative = (p, *weights[1:])
        options = dict(plan=plan, reach=reach, relative=relative)
        return relative_attention.relative_attention(q, k, v, lengths, **options)

    def position(weights, distance):
        a, b, c, d, e, f = weights
        x = distance[..., None, None]
        return a * jnp.sin(b + 0.3 * x) + c * jnp.cos(d + 0.7 * x) + e * jnp.sin(f + 2.1 * x)

    drawn = Reach(*(jnp.asarray(x) for x in reach))
    dense, blocks = (relative_attention.make_plan(23, reach, local) for local in (False, True))
    assert dense.count == 1 and blocks.count in (4, 6)
    windowed = kind in ("window", "causal", "chunks")
    assert (blocks.before >= 0) == windowed
    plans = [(dense, reach), (blocks, reach), (dense, drawn)]
    grads = []
    for plan, reach in plans:
        call = lambda *given, plan=plan, reach=reach: attend(plan, reach, *given)  # noqa: E731
        loss = lambda *given, call=call: jnp.sum(jnp.sin(call(*given)))  # noqa: E731
        assert error(jit(call)(q, k, v, weights), want) <= 1e-6
        grads.append(jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, weights))
    for other in grads[1:]:
        for a, b in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(other), strict=True):
            assert np.all(np.isfinite(a)) and error(b, a) <= 1e-5


def test_shear_turns_distances_into_keys():
    x = np.random.default_rng(0).normal(size=(2, 5, 11)).astype(np.float32)
    want = np.stack([x[:, r, 4 - r : 4 - r + 7] for r in range(5)], axis=1)
    np.testing.assert_array_equal(relative_attention.shear(x, 7), want)
    np.testing.assert_array_equal(relative_attention.shear(x[:, :1], 11), x[:, :1])
    for rows in (1, 2, 5):  # the gradient puts every element back where it was read, and zeros
        y, back = jax.vjp(lambda x, n=12 - rows: relative_attention.shear(x, n), x[:, :rows])
        row, column = np.indices(y.shape[1:])
        want = np.zeros_like(x[:, :rows])
        want[:, row, rows - 1 - row + column] = y
        np.testing.assert_array_equal(back(y)[0], want)


def test_global_frames_read_all_and_are_read_by_all():
    q, k, v, lengths, weights = attention_case(frames=9, lengths=(9, 3))
    own = tuple(x[:, :, ::-1] for x in (q, k, v))
    chosen = np.array([0, 4])  # the second is padding in row 1
    plan = relative_attention.make_plan(9, Reach(1, 1), True)
    p = position(weights[0], np.arange(8, -9, -1)).swapaxes(0, 1)
    relative = (p, *weights[1:])
    got = relative_attention.attention_with_global(
        q, k, v, own, lengths, chosen, plan=plan, reach=Reach(1, 1), relative=relative
    )
    scale = q.shape[-1] ** -0.5
    for n, b in np.ndindex(*q.shape[:2]):
        frames = lengths[b]
        for i in range(frames):
            if i in chosen:
                scores = own[1][n, b, :frames] @ own[0][n, b, i] * scale
                values = own[2][n, b, :frames]
            else:
                globals_ = [g for g in chosen if g < frames]
                near = [j for j in (i - 1, i, i + 1) if 0 <= j < frames]
                scores = [own[1][n, b, g] @ own[0][n, b, i] * scale for g in globals_] + [
                    (
                        (q[n, b, i] + weights[1][n]) @ k[n, b, j]
                        + (q[n, b, i] + weights[2][n]) @ position(weights[0], i - j)[n]
                    )
                    * scale
                    for j in near
                ]
                values = v[n, b, globals_ + near]
            share = np.exp(np.array(scores))
            np.testing.assert_allclose(got[n, b, i], share @ values / share.sum(), atol=1e-5)


def test_local_attention_takes_memory_in_proportion_to_the_frames():
    def temporary(frames, local):
        plan = relative_attention.make_plan(frames, Reach(16, 16), local)
        x = jax.ShapeDtypeStruct((1, 1, frames, 8), jnp.float32)
        p = jnp.zeros((1, plan.positions[0] - plan.positions[1] + 1, 8))

        def loss(x, p):
            options = dict(plan=plan, reach=Reach(16, 16), relative=(p, p[:, 0], p[:, 1]))
            length = jnp.array([frames])
            return jnp.sum(relative_attention.relative_attention(x, x, x, length, **options))

        return jax.jit(jax.grad(loss)).lower(x, p).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096, True) < 2.2 * temporary(2048, True) < 2048 * 2048 * 4


def test_asymmetric_local_attention_is_limited_attention(variant, monkeypatch):
    monkeypatch.setattr(relative_attention, "QUERY_BLOCK", 8)
    config, z, mel, length = variant("batchnorm_default")
    limited = dataclasses.replace(config, att_context_size=(6, 3))
    local = dataclasses.replace(limited, self_attention_model="rel_pos_local_attn")
    variables = variables_of_nemo(z, "param/")
    want, out_len = run(limited, variables, mel, length)
    got, _ = run(local, variables, mel, length)
    valid = np.arange(want.shape[1]) < out_len[:, None]
    np.testing.assert_allclose(got[valid], want[valid], atol=1e-5)
    full, _ = run(config, variables, mel, length)
    assert error(full[valid], want[valid]) > 1e-2


# ---- padding, training, settings -----------------------------------------------------------------

SMALL = FastConformerConfig(
    feat_in=16,
    n_layers=1,
    d_model=16,
    n_heads=2,
    subsampling="dw_striding",
    subsampling_factor=4,
    subsampling_conv_channels=4,
    ff_expansion_factor=2,
    conv_kernel_size=5,
    padding_counts=False,
    dropout=0.0,
    dropout_pre_encoder=0.0,
    dropout_emb=0.0,
)
KINDS = {
    "plain": {},
    "local": dict(
        self_attention_model="rel_pos_local_attn",
        att_context_size=(3, 2),
        global_tokens=2,
        global_tokens_spacing=5,
        global_attn_separate=True,
    ),
    "streaming": dict(
        att_context_size=(4, 1),
        att_context_style="chunked_limited",
        causal_downsampling=True,
        conv_context_size="causal",
        conv_norm_type="layer_norm",
        feat_out=12,
    ),
    "striding": dict(
        subsampling="striding", reduction="striding", reduction_position=0, reduction_factor=2
    ),
    "pooling": dict(
        subsampling="stacking_norm",
        reduction="pooling",
        reduction_position=-1,
        reduction_factor=4,
        conv_norm_type="group_norm4",
    ),
    "adapter": dict(
        subsampling_factor=1,
        self_attention_model="abs_pos",
        conv_norm_type="instance_norm",
        use_bias=False,
    ),
    "tied": dict(untie_biases=False, n_layers=2, subsampling="stacking"),
}


def variables_of(config):
    """Random variables in which everything does something."""
    r = np.random.default_rng(0)

    def draw(path, x):
        value = r.normal(size=x.shape).astype(np.float32)
        if path.endswith(("scale", "var")):
            return 1 + 0.2 * np.abs(value)
        fan_in = float(np.prod(x.shape[:-1]))
        return value / fan_in**0.5 if path.endswith("kernel") else 0.3 * value

    flat = tree.flatten(shapes(config))
    return tree.unflatten({path: draw(path, x) for path, x in flat.items()})


def batch(lengths=(60, 37, 21), frames=60, bins=16):
    mel = np.random.default_rng(0).normal(size=(len(lengths), frames, bins)).astype(np.float32)
    return mel, np.array(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_padding_or_batch_mates(kind, monkeypatch):
    monkeypatch.setattr(relative_attention, "QUERY_BLOCK", 4)
    config = dataclasses.replace(SMALL, **KINDS[kind])
    variables = variables_of(config)
    mel, length = batch()
    whole, whole_len = run(config, variables, mel, length)
    np.testing.assert_array_equal(whole_len, output_lengths(config, length))
    # rows 1 and 2 alone, in a longer bucket, with rubbish in the padding
    longer = np.full((2, 83, 16), np.nan, np.float32)
    for row in (1, 2):
        longer[row - 1, : length[row]] = mel[row, : length[row]]
    other, other_len = run(config, variables, longer, length[1:])
    np.testing.assert_array_equal(whole_len[1:], other_len)
    for row in (1, 2):
        n = whole_len[row]
        np.testing.assert_allclose(whole[row, :n], other[row - 1, :n], atol=1e-5)
    assert np.all(np.isfinite(other))


def test_batch_statistics_ignore_padding_on_request():
    variables = variables_of(SMALL)
    mel, length = batch()
    longer = np.pad(mel, ((0, 1), (0, 24), (0, 0)), constant_values=3.0)

    def outs(config):
        options = dict(train=True, mutable=["batch_stats"])
        short = run(config, variables, mel, length, **options)
        long = run(config, variables, longer, np.append(length, 0), **options)
        mean = [
            tree.flatten(x[1])["batch_stats/layers_0/conv/batch_norm/mean"] for x in (short, long)
        ]
        return short[0][0][0], long[0][0][0, : short[0][0].shape[1]], *mean

    a, b, mean_a, mean_b = outs(SMALL)
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(mean_a, mean_b, atol=1e-6)
    a, b, mean_a, mean_b = outs(dataclasses.replace(SMALL, padding_counts=True))
    assert error(mean_a, mean_b) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_silence_and_empty_rows_give_finite_gradients(kind, monkeypatch):
    monkeypatch.setattr(relative_attention, "QUERY_BLOCK", 4)
    config = dataclasses.replace(SMALL, **KINDS[kind])
    model, variables = FastConformer(config), variables_of(config)

    def loss(params):
        out, _ = model.apply(
            {**variables, "params": params},
            jnp.zeros((3, 40, 16)),
            jnp.array([40, 5, 0]),
            train=True,
            mutable=["batch_stats"],
        )[0]
        return jnp.sum(out**2)

    for g in jax.tree.leaves(jit(jax.grad(loss))(variables["params"])):
        assert np.all(np.isfinite(g))


def test_tied_biases_learn_from_all_layers():
    config = dataclasses.replace(SMALL, n_layers=2, untie_biases=False)
    names = tree.flatten(shapes(config)["params"])
    assert [n for n in names if "pos_bias" in n] == [
        "layers_0/self_attn/pos_bias_u",
        "layers_0/self_attn/pos_bias_v",
    ]
    variables = variables_of(config)
    mel, length = batch()
    tied = variables["params"]
    untied = tree.flatten(tied)
    for name in ("pos_bias_u", "pos_bias_v"):
        untied[f"layers_1/self_attn/{name}"] = untied[f"layers_0/self_attn/{name}"]
    untied = tree.unflatten(untied)

    def gradients(config, params):
        def loss(params):
            given = {**variables, "params": params}
            return jnp.sum(FastConformer(config).apply(given, mel, length)[0] ** 2)

        return jit(jax.grad(loss))(params)

    two = dataclasses.replace(config, untie_biases=True)
    one, both = gradients(config, tied), gradients(two, untied)
    for name in ("pos_bias_u", "pos_bias_v"):
        total = sum(both[n]["self_attn"][name] for n in ("layers_0", "layers_1"))
        assert error(one["layers_0"]["self_attn"][name], total) <= 1e-4


def test_recomputed_layers_have_the_same_gradients_and_dropout():
    mel, length = batch()

    def gradients(remat):
        config = dataclasses.replace(
            SMALL,
            remat=remat,
            dropout=0.2,
            dropout_att=0.2,
            dropout_emb=0.2,
            dropout_pre_encoder=0.2,
            n_layers=2,
            stochastic_depth_drop_prob=0.5,
            att_context_size=((4, 4), (-1, -1)),
            att_context_probs=(0.5, 0.5),
        )
        variables = variables_of(config)

        def loss(params):
            given = {**variables, "params": params}
            settings = dict(rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])
            out, _ = FastConformer(config).apply(given, mel, length, train=True, **settings)[0]
            return jnp.sum(out**2)

        grads = tree.flatten(jit(jax.grad(loss))(variables["params"]))
        # what the softmax or a batch norm cancels has no gradient but rounding
        zero = ("linear_k/bias", "depthwise_conv/bias")
        return {path: x for path, x in grads.items() if not path.endswith(zero)}

    close(gradients(True), gradients(False), 1e-5)


def test_training_skips_layers_and_draws_contexts():
    config = dataclasses.replace(
        SMALL,
        n_layers=2,
        conv_norm_type="layer_norm",
        stochastic_depth_drop_prob=0.5,
        att_context_size=((2, 2), (-1, -1)),
    )
    assert [config.drop_layer(n) for n in (0, 1)] == [0.0, 0.5]
    four = dataclasses.replace(config, n_layers=4, stochastic_depth_drop_prob=0.3)
    np.testing.assert_allclose([four.drop_layer(n) for n in range(4)], [0, 0.1, 0.2, 0.3])
    variables = variables_of(config)
    mel, length = batch()

    @jit
    def both(key):
        options = dict(train=True, rngs={"dropout": key}, mutable=["stages"])
        (out, _), recorded = FastConformer(config).apply(variables, mel, length, **options)
        stages = recorded["stages"]
        return out, stages["layers_0"]["out"][0], stages["layers_1"]["out"][0]

    skipped, seen = 0, []
    for seed in range(40):
        out, first, second = both(jax.random.key(seed))
        skip = np.array_equal(out, first)
        skipped += skip
        if not skip:  # the layer's share is doubled
            np.testing.assert_allclose(out, first + 2 * (second - first), atol=1e-4)
        seen.append(float(first[0, 0, 0]))
    assert 10 <= skipped <= 30
    assert len(set(np.round(seen, 4))) == 2 and 8 <= np.sum(np.isclose(seen, seen[0])) <= 32
    evaluated, _ = run(config, variables, mel, length)
    limited = dataclasses.replace(config, att_context_size=(2, 2))
    np.testing.assert_array_equal(evaluated, run(limited, variables, mel, length)[0])


def test_dropout_keeps_the_mean_of_the_attention():
    x = jnp.ones((1, 64, 16))
    config = dataclasses.replace(SMALL, dropout_att=0.25)
    attention = mixers.Attention(config)
    key = {"dropout": jax.random.key(0)}
    drop = attention.apply({}, True, rngs=key, method="dropout")
    weights = drop(jnp.broadcast_to(x, (64, 64, 16)), 0)
    np.testing.assert_allclose(np.unique(weights), [0, 4 / 3], rtol=1e-6)
    assert abs(float(jnp.mean(weights)) - 1) < 0.02


def test_streaming_encoder_does_not_look_beyond_its_chunk():
    config = dataclasses.replace(SMALL, **KINDS["streaming"])
    variables = variables_of(config)
    mel, length = batch(lengths=(60,))
    changed = mel.copy()
    changed[:, 32:] += 1  # frames 16 and on of the subsampled 8-frame prefix
    a, b = (run(config, variables, x, length)[0] for x in (mel, changed))
    np.testing.assert_allclose(a[:, :8], b[:, :8], atol=1e-6)
    assert error(a[:, 8:], b[:, 8:]) > 1e-3


def test_subsampling_before_2_5_does_not_mask():
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(SMALL, masked_subsampling=False)
    variables = variables_of(config)
    mel, length = batch()
    recorded = run(config, variables, mel, length, mutable=["stages"])[1]["stages"]
    x = torch.tensor(mel)[:, None]
    weights = tree.flatten(variables["params"]["pre_encode"])
    weights = {path: torch.tensor(np.asarray(x)) for path, x in weights.items()}
    for n, (stride, groups) in ((0, (2, 1)), (2, (2, 4)), (3, (1, 1))):
        kernel = weights[f"conv_{n}/kernel"].permute(3, 2, 0, 1)
        pad = 1 if stride == 2 else 0
        bias = weights[f"conv_{n}/bias"]
        x = torch.nn.functional.conv2d(x, kernel, bias, stride, pad, groups=groups)
        x = x if n == 2 else torch.relu(x)
    x = x.transpose(1, 2).flatten(2) @ weights["out/kernel"] + weights["out/bias"]
    assert error(recorded["pre_encode_out"][0], x.numpy()) <= 1e-6


def test_bfloat16_stays_close_and_keeps_parameters_and_statistics_in_f32():
    variables = variables_of(SMALL)
    mel, length = batch()
    want, _ = run(SMALL, variables, mel, length)
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    got, _ = run(config, variables, mel, length)
    assert got.dtype == jnp.bfloat16
    assert np.mean(np.abs(got.astype(np.float32) - want)) < 0.03 * np.std(want)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes(config)))


@pytest.mark.parametrize("kind", KINDS)
def test_sharding_rules_cover_every_parameter_and_none_is_dead(kind):
    config = dataclasses.replace(SMALL, **KINDS[kind])
    flat = tree.flatten({"encoder": shapes(config)["params"]})
    axes = tree.match(encoder.sharding(config), flat, what="sharding rule")
    assert all(len(axes[path]) <= len(flat[path].shape) for path in flat)
    tree.match(encoder.sharding(config, ""), shapes_of(config), what="sharding rule")


class Running(nn.Module):
    """A mixer that adds up the frames before, with settings of its own."""

    width: int

    @nn.compact
    def __call__(self, x, length, scene, biases, train):
        gate = self.param("gate", nn.initializers.ones, (self.width,))
        return jnp.cumsum(x, axis=1) * gate


def test_another_mixer_is_one_row(monkeypatch):
    row = mixers.Mixer(
        module=Running,
        sharding=lambda width, where: [(f"{where}/gate", ("tensor",))],
        scene=lambda encoder, frames, drawn, train: None,
        settings=lambda config: config.d_model,
    )
    assert set(mixers.MIXERS) == set(ATTENTION)
    monkeypatch.setitem(mixers.MIXERS, "abs_pos", row)
    config = dataclasses.replace(SMALL, self_attention_model="abs_pos")
    found = shapes_of(config)
    assert found["layers_0/self_attn/gate"].shape == (SMALL.d_model,)
    assert not [path for path in found if "linear_q" in path]
    tree.match(encoder.sharding(config, ""), found, what="sharding rule")


def shapes_of(config):
    return tree.flatten(shapes(config)["params"])


def test_lengths_are_nemos(shared_dir):
    with np.load(shared_dir / "goldens" / "nemo" / "subsampling_lengths.npz") as z:
        for factor, causal, name in ((8, False, "x8"), (4, False, "x4"), (8, True, "x8_causal")):
            config = dataclasses.replace(
                SMALL, subsampling_factor=factor, causal_downsampling=causal
            )
            np.testing.assert_array_equal(output_lengths(config, z["mel_len"]), z[name])
            assert output_lengths(config, 0) == 0 and output_lengths(config, 17) == z[name][16]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(subsampling="vggnet"), "subsampling must be one of"),
        (dict(d_model=18, n_heads=4), "d_model must be a multiple of n_heads"),
        (dict(conv_norm_type="group_norm3"), "N a divisor of d_model"),
        (dict(conv_kernel_size=8), "conv_kernel_size must be odd"),
        (dict(conv_context_size=(3, 3)), "left \\+ right \\+ 1 = conv_kernel_size"),
        (dict(att_context_style="chunked_limited", att_context_size=(5, 3)), "a multiple of right"),
        (dict(self_attention_model="rel_pos_local_attn"), "limited to both sides"),
        (dict(global_tokens=1), "0 without local attention"),
        (dict(reduction="pooling", reduction_factor=2), "reduction_position must be -1 or the"),
        (dict(dropout=1.0), "dropout must be at least 0"),
        (dict(att_context_probs=(0.5, 0.5)), "one probability per context"),
    ],
)
def test_settings_that_make_no_encoder_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)
