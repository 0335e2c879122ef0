import types

import jax
import numpy as np

from jasr import evaluation, sharding, text


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
    found = evaluation.evaluate(task, {(8, 5, 2): predict}, data, mesh, {})
    assert found["val_wer"] == 0 and found["val_cer"] == 0
    assert found["sample"] == ("four six", "four six")
