"""Validation while a model trains."""

import types

import jax
import numpy as np
import pytest

from experiments.train import train
from jasr import checkpoint, sharding, text
from jasr.data import AudioText, DataConfig, DataError, buckets
from jasr.seam import Item
from jasr.training import validation, validators
from tests import tiny


def test_validation_normalises_references_as_the_tokenizer_does():
    """A cased reference and a perfect hypothesis make no error."""
    tokenizer = text.CharTokenizer(("<blank>", *" foursix"), "lower")
    tokens = np.array([tokenizer.encode("four six")] * 8)

    def predict(variables, batch):
        rows = len(batch["index"])
        return {
            "tokens": jax.numpy.asarray(tokens[:rows]),
            "token_len": jax.numpy.full(rows, tokens.shape[1]),
            "updates": jax.numpy.ones(rows),
        }

    chosen = {"wer": validators.transcripts(tokenizer, tokenizer.decode, predict, ("updates",))}
    found, said = measured(chosen, {"": one_row("FOUR, six!")})
    assert found == {"val_wer": 0, "val_cer": 0, "val_updates": 1}
    assert said == ["True: four six\nPred: four six", "WER: 0.00%"]


def one_row(text):
    """A set of one utterance in a batch of eight rows."""
    batch = {"index": np.array([0, *[-1] * 7]), "value": np.full(8, len(text), np.float32)}
    item = Item("a", (), {"text": text})
    return types.SimpleNamespace(item=lambda i: item, iterate=lambda *_: [(0, batch)])


def measured(chosen, sets):
    """What `validation.validate` gives on all devices."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    programs = {name: {0: jax.jit(validation.program(chosen))} for name in sets}
    return validation.validate(chosen, programs, sets, mesh, {}, jax.random.key(0))


def test_a_metric_is_the_mean_of_the_named_sets_and_each_of_them():
    """The loss is a sum of ratios: values by counts over the rows of a set."""

    def row_losses(variables, batch):
        ones = jax.numpy.ones_like(batch["value"])
        return {"a": (batch["value"], 2 * ones), "b": (ones, ones)}

    chosen = {"loss": validators.loss(row_losses)}
    found, _ = measured(chosen, {"clean": one_row("ab"), "other": one_row("abcd")})
    assert found == {"val_loss/clean": 2, "val_loss/other": 3, "val_loss": 2.5}
    assert set(validation.metric_names(chosen, ("clean", "other"))) == set(found)


def test_sources_of_validation_may_have_names(tmp_path):
    sets = validation.sets_of
    assert sets(()) == {} and sets("a.jsonl") == {"": ("a.jsonl",)}
    assert sets(("a.jsonl", "b.jsonl")) == {"": ("a.jsonl", "b.jsonl")}
    named = {"clean": ("a.jsonl", "c.jsonl"), "other": ("b.jsonl",)}
    assert sets(("clean=a.jsonl", "other=b.jsonl", "clean=c.jsonl")) == named
    (tmp_path / "x=y.jsonl").touch()
    assert sets(str(tmp_path / "x=y.jsonl")) == {"": (str(tmp_path / "x=y.jsonl"),)}
    with pytest.raises(DataError, match="every source a name or none"):
        sets(("clean=a.jsonl", "b.jsonl"))


def test_batches_hold_as_much_audio_as_a_micro_batch_of_training():
    rate = 8000
    sources = DataConfig(sample_rate=rate, bucket_batch_size=(8,), bucket_duration_bins=(4.0,))
    shapes, layout = [(4, 8 * rate, 9), (8, 4 * rate, 9)], AudioText(sources, rate, list)
    bounded = validation.bounded(sources, layout, shapes, 2, ways=2)
    sizes = np.array([[s * rate, 9] for s in (1, 4, 5, 600)])
    assert buckets.batch_sizes(bounded, layout, sizes, evaluation=True) == [16, 4, 2, 2]
    assert bounded.num_buckets == 2


def test_a_step_whose_validation_fails_is_saved(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(validation, "validate", fail)
    config = tiny.get_config()
    with config.unlocked():
        config.train.update(steps=2, eval_every=1)
    with pytest.raises(MemoryError):
        train(config, tmp_path)
    assert checkpoint.load_meta(tmp_path)["step"] == 1
