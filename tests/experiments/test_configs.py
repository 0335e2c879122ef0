"""Every recipe builds: shapes of the model, optimizer and sharding rules, without memory."""

import json
import sys

import jax
import numpy as np
import pytest

from configs import lact_an4, lact_librispeech, quickstart
from jasr import settings, sharding, text, tree
from jasr.systems import loading
from jasr.systems.lact.settings import LactConfig
from jasr.training import optim, step
from tests import tiny

RECIPES = [
    (lact_an4, ""), (lact_an4, "short"), (lact_an4, "control"), (quickstart, ""), (tiny, ""),
    *((lact_librispeech, name) for name in ("base", "improved", "large", "improved_reference")),
]  # fmt: skip


def zeros(samples):
    return {
        "audio": np.zeros((1, samples), np.float32), "audio_len": np.zeros(1, np.int32),
        "tokens": np.zeros((1, 8), np.int32), "token_len": np.zeros(1, np.int32),
        "index": np.zeros(1, np.int64),
    }  # fmt: skip


@pytest.mark.parametrize("recipe, arg", RECIPES, ids=lambda x: getattr(x, "__name__", x))
def test_recipe_builds_with_live_rules_only(recipe, arg):
    config = json.loads(recipe.get_config(arg).to_json())
    characters = config["text"]["vocabulary"] or list("abc ")
    task = loading.build(config, text.CharTokenizer((text.BLANK, *characters)))
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), zeros(32000)))
    opt = settings.build(optim.OptimConfig, config["optim"])
    optim.make(opt, shapes["params"], config["train"]["steps"])
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.param_shardings(shapes["params"], mesh, task.sharding)
    assert any(s.spec != () and any(s.spec) for s in tree.flatten(placed).values())


@pytest.mark.parametrize("arg, count", [("base", 88_558_800), ("improved", 311_165_808)])
def test_published_sizes_come_out_exactly(arg, count):
    config = json.loads(lact_librispeech.get_config(arg).to_json())
    tokenizer = text.CharTokenizer((text.BLANK, *config["text"]["vocabulary"]))
    task = loading.build(config, tokenizer)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), zeros(32000)))
    assert tokenizer.vocab_size == 29
    assert tree.count(shapes["params"]) == count


def test_the_quickstart_leaves_two_steps_for_the_notebook_to_average():
    config = quickstart.get_config()
    assert config.train.steps // config.train.eval_every >= 2 <= config.checkpoint.keep_latest


@pytest.mark.parametrize("recipe", [lact_an4, lact_librispeech, quickstart])
def test_unknown_variant_is_named(recipe):
    with pytest.raises(ValueError, match="variant"):
        recipe.get_config("huge")


def build(**changes):
    config = json.loads(tiny.get_config().to_json())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return loading.build(config, text.CharTokenizer((text.BLANK, "a")))


def test_the_models_fields_about_audio_are_those_of_the_front_end():
    model = build(front_end__sample_rate=8000, front_end__hop=80, front_end__n_fft=0).config
    assert (model.sample_rate, model.hop_length, model.n_fft) == (8000, 80, 512)
    with pytest.raises(ValueError, match="config.model.hop_length 200 .*config.front_end.hop 160"):
        build(model__hop_length=200)


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("model", "dropout", 1.0), ("model", "num_attn_heads", 0), ("model", "use_ctc", False),
        ("train", "save_every", -1), ("train", "steps", 0),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(section, name, value):
    cls = {"model": LactConfig, "train": step.RunConfig}[section]
    with pytest.raises(ValueError, match=name):
        settings.build(cls, {name: value}, section)


def test_a_missing_tensorboard_writer_is_named_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="config.train.tensorboard .* pip install tensorboardX"):
        step.RunConfig(tensorboard=True)
