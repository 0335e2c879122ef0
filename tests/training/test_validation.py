"""Validation while a model trains."""

import types

import jax
import numpy as np
import pytest

from experiments.train import train
from jasr import checkpoint, sharding, text
from jasr.data import DataConfig, buckets
from jasr.training import validation
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

    batch = {"index": np.array([0, -1, -1, -1, -1, -1, -1, -1])}
    batch |= {"audio": np.zeros((8, 5), np.float32), "tokens": np.zeros((8, 2), np.int32)}
    data = types.SimpleNamespace(texts=["FOUR, six!"], iterate=lambda *_: [batch])
    task = types.SimpleNamespace(tokenizer=tokenizer)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    found = validation.evaluate(task, {(8, 5, 2): predict}, data, mesh, {})
    assert found["val_wer"] == 0 and found["val_cer"] == 0
    assert found["sample"] == ("four six", "four six")


def test_batches_hold_as_much_audio_as_a_micro_batch_of_training():
    rate = 8000
    sources = DataConfig(sample_rate=rate, bucket_batch_size=(8,), bucket_duration_bins=(4.0,))
    bounded = validation.bounded(sources, [(4, 8 * rate, 9), (8, 4 * rate, 9)], 2, ways=2)
    lengths = [s * rate for s in (1, 4, 5, 600)]
    assert buckets.batch_sizes(bounded, lengths, evaluation=True) == [16, 4, 2, 2]
    assert bounded.num_buckets == 2


def test_a_step_whose_validation_fails_is_saved(tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(validation, "evaluate", fail)
    config = tiny.get_config()
    with config.unlocked():
        config.train.update(steps=2, eval_every=1)
    with pytest.raises(MemoryError):
        train(config, tmp_path)
    assert checkpoint.load_meta(tmp_path)["step"] == 1
