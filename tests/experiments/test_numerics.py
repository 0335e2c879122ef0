"""doctor numerics: the first stage that is not finite is named, whatever poisoned it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checks import numerics
from jasr import audio, settings, tree
from jasr.systems import loading
from jasr.systems.lact import original
from jasr.systems.lact.model import LactConfig
from jasr.text import CharTokenizer

SMALL = LactConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attn_heads=2,
    num_lact_heads=2,
    intermediate_size=16,
    n_mels=8,
    audio_feature_dim=8,
    ctc_vocab_size=29,
    max_position_embeddings=64,
    initializer_range=0.0,
)


@pytest.fixture(scope="module")
def model():
    """(task, variables, batch) of a small model of the original's kind."""
    config = original.reference_config(settings.to_dict(SMALL))
    task = loading.build(config, CharTokenizer(original.LIBRISPEECH, "lower"))
    batch = numerics.make_batch(task, numerics.probes(seconds=0.5))
    rng = np.random.default_rng(0)
    flat = tree.flatten(original.shapes(SMALL))
    for path, leaf in flat.items():
        drawn = np.asarray(0.3 * rng.standard_normal(leaf.shape), np.float32)
        flat[path] = drawn + 1 if path.endswith(("scale", "var")) else drawn
    return task, tree.unflatten(flat), batch


@pytest.fixture(scope="module")
def walk(model):
    return numerics.make_walk(model[0])


def poisoned(variables, path, value):
    """The variables with one element (or what lies under it) of a leaf replaced."""
    flat = tree.flatten(variables)
    flat[path] = flat[path].copy()
    flat[path].reshape(-1)[0] = value
    return tree.unflatten(flat)


def test_stages_come_in_the_order_of_computation(model, walk):
    rows = walk(model[1], model[2])
    names = [row.stage for row in rows]
    block = (
        "attn_norm_out",
        "attn/q",
        "attn/attn_out",
        "attn/fast_out",
        "attn/o_proj_out",
        "mlp_out",
    )
    conv = ("mel", "conv_0", "conv_1", "pe")
    want = ["audio", *(f"model/audio_feature_extractor/{name}" for name in conv)]
    want += [f"model/layers_{n}/{name}" for n in (0, 1) for name in block]
    want += ["model/norm_out", "logits", "log_probs", "ctc_loss"]
    assert [name for name in names if name in want] == want
    assert numerics.first_bad(rows) is None
    assert rows[0].shape == model[2]["audio"].shape


@pytest.mark.parametrize(
    ("path", "value", "stage"),
    [
        ("params/model/audio_feature_extractor/conv_layers_0/kernel", np.nan, "conv_0"),
        ("batch_stats/model/audio_feature_extractor/conv_layers_5/var", -1.0, "conv_1"),
        ("params/model/layers_0/mlp/up_proj/kernel", np.inf, "model/layers_0/mlp_out"),
        ("params/model/layers_1/attn_norm/scale", np.nan, "model/layers_1/attn_norm_out"),
        ("params/model/layers_1/attn/qkv/kernel", -np.inf, "model/layers_1/attn/q"),
        ("params/model/layers_1/attn/w1", np.nan, "model/layers_1/attn/delta_norm"),
        ("params/model/layers_1/attn/lr_proj/bias", np.nan, "model/layers_1/attn/eta"),
        ("params/model/norm/scale", np.inf, "model/norm_out"),
        ("params/ctc_head/kernel", np.nan, "logits"),
    ],
)
def test_a_poisoned_weight_is_found_at_its_stage(model, walk, path, value, stage):
    _, variables, batch = model
    bad = numerics.first_bad(walk(poisoned(variables, path, value), batch))
    assert bad.stage.endswith(stage)
    named = numerics.bad_weights(poisoned(variables, path, value))
    assert named == ({} if np.isfinite(value) else {path: 1})


def test_a_bad_recording_is_found_before_the_model(model, walk):
    _, variables, batch = model
    audio = batch["audio"].copy()
    audio[1, 7] = np.nan
    assert numerics.first_bad(walk(variables, {**batch, "audio": audio})).stage == "audio"


def test_silence_and_clipping_train_with_finite_gradients(model):
    task, variables, batch = model
    updating = dataclasses.replace(SMALL, lact_mode="bidirectional", num_hidden_layers=1)
    task = dataclasses.replace(task, model=task.model.clone(config=updating))
    flat = {k: v for k, v in tree.flatten(variables).items() if "/layers_1/" not in k}
    rows = numerics.make_walk(task, train=True, dtype="bfloat16")(tree.unflatten(flat), batch)
    assert numerics.first_bad(rows) is None
    assert rows[-1].stage == "gradient_norm" and rows[-1].max > 0
    assert {row.dtype for row in rows if row.stage.endswith("attn/q")} == {"bfloat16"}


def test_a_row_describes_the_finite_values():
    x = jnp.array([[1.0, 3.0], [np.nan, -np.inf]])
    (row, empty, lost) = numerics.report({"x": x, "y": jnp.zeros((0, 2)), "z": x[1]})
    assert row[:4] == ("x", "float32", (2, 2), 2)
    np.testing.assert_allclose(row[4:], (1, 3, 2, 1))
    assert empty.bad == 0 and lost.bad == 2 and np.isnan(lost.mean)
    assert numerics.first_bad([empty, row, lost]) is row
    shown = numerics.table([row, empty]).splitlines()
    assert shown[1].startswith("! x") and shown[2].startswith("  y")


def test_the_originals_front_end_in_half_precision_gives_minus_infinity_on_silence(model):
    # Its guard, 1e-8, is zero in float16: log(0) on silent frames, and NaN in every hidden state
    # after them. This is why its mixed precision failed from the first step, and why jasr computes
    # log-mel in float32 whatever the model's dtype is.
    assert np.float16(1e-8) == 0 and np.float16(2.0**-24) > 0
    task, _, batch = model
    row = numerics.half_precision_mel(task, batch)
    assert row.stage == "mel" and row.bad > 0
    nemo = dataclasses.replace(task, front_end=dataclasses.replace(audio.NEMO, n_mels=8))
    assert numerics.half_precision_mel(nemo, batch).bad == 0


def test_the_command_names_stage_and_weight_of_a_checkpoint(model, tmp_path, capsys):
    variables = poisoned(model[1], "params/model/layers_1/attn/w1", np.nan)
    original.write_lact(tmp_path, SMALL, variables, list(original.LIBRISPEECH))
    arguments = [f"--checkpoint={tmp_path}", "--dtypes=float32,float16", "--modes=eval"]
    assert numerics.main([*arguments, "--seconds=0.5"]) == 1
    said = capsys.readouterr().out
    assert "weights: params/model/layers_1/attn/w1 has 1 values that are not finite" in said
    first = "the first stage that is not finite is model/layers_1/attn/delta_norm"
    assert f"float32, eval: {first}" in said
    assert "float16, front end only: the first stage that is not finite is mel" in said


def test_the_command_takes_a_recipe_and_recordings(root, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "def get_config(kind):\n"
        f"    model = {settings.to_dict(SMALL)!r}\n"
        "    front_end = {'kind': kind, 'n_mels': 8}\n"
        "    return {'task': 'ctc', 'text': {}, 'model': model, 'front_end': front_end}\n"
    )
    wav = next((root / "tests" / "data").rglob("*.flac"))
    arguments = [f"--config={recipe}:nemo", "--dtypes=float32", "--modes=eval", f"--audio={wav}"]
    assert numerics.main([*arguments, "--model", "dtype=bfloat16", "window_size=0"]) == 0
    said = capsys.readouterr().out
    assert "every stage is finite" in said and "model/layers_1/attn/fast_out" in said
    assert numerics.main([f"--config={recipe}:nemo", "--model", "lact_mod=causal"]) == 2
    assert "did you mean 'lact_mode'" in capsys.readouterr().err
    assert numerics.main([f"--checkpoint={tmp_path / 'none.pt'}"]) == 2
