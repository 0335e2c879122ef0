"""A .nemo model of two heads with a larger vocabulary, through encoder and decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.decoding.transducer import Steps, greedy
from jasr.models.fastconformer.encoder import FastConformer, FastConformerConfig
from jasr.systems.fastconformer import nemo
from jasr.systems.fastconformer.transducer import Joint, JointConfig, Prediction, PredictionConfig
from jasr.text.vocab.expand import expand
from jasr.text.vocab.merge import merge
from jasr.text.vocab.train import train


@pytest.fixture(scope="module")
def read(shared_dir):
    return nemo.read(shared_dir / "goldens" / "nemo" / "tiny_hybrid_tdt.nemo")


@pytest.fixture(scope="module")
def encoded(read, shared_dir):
    """(f32[2, T, D], lengths) of the goldens' two utterances."""
    with np.load(shared_dir / "goldens" / "nemo" / "tiny_ctc.npz") as f:
        mel, mel_len = f["mel"], f["mel_len"]
    if mel.shape[1] == read.config["encoder"]["feat_in"]:
        mel = mel.transpose(0, 2, 1)
    encoder = FastConformer(FastConformerConfig(**read.config["encoder"]))
    variables = {name: leaves["encoder"] for name, leaves in read.variables.items()}
    return jax.jit(encoder.apply)(variables, jnp.asarray(mel), jnp.asarray(mel_len, jnp.int32))


@pytest.fixture(scope="module")
def merged(read, folder):
    """(old model, merged model)."""
    old = nemo.sentencepiece(read)
    new = train((folder / "corpus_new.txt").read_text(encoding="utf-8").splitlines(), 72)
    return old, merge(old, new).model


def decode(read, params, encoded, size):
    """Greedy TDT of `encoded` by parameters for `size` pieces."""
    decoder, joint = (dict(read.config[name]) for name in ("decoder", "joint"))
    prediction = Prediction(PredictionConfig(**decoder | {"vocab_size": size}))
    joint = Joint(JointConfig(**joint | {"num_classes": size}))
    ours = {"params": params["decoder"]}, {"params": params["joint"]}

    def predict(token, state):
        out, state = prediction.apply(ours[0], token, state, method="step")
        return joint.apply(ours[1], out, method="prediction_part"), state

    steps = Steps(
        predict=predict,
        initial_state=prediction.initial_state,
        output=lambda f, g: joint.apply(ours[1], f + g, method="output"),
    )
    projected = joint.apply(ours[1], encoded[0], method="encoder_part")
    durations = tuple(read.config["loss"]["durations"])
    run = jax.jit(lambda f, n: greedy(f, n, steps, blank=size, durations=durations))
    return {k: np.asarray(v) for k, v in run(projected, encoded[1]).items()}


def test_transcripts_of_a_nemo_model_do_not_change(read, encoded, merged, golden):
    params = read.variables["params"]
    texts = [model.texts for model in merged]
    durations = tuple(read.config["loss"]["durations"])
    after = expand(params, ("tdt", "ctc"), *texts, durations=durations)
    was = decode(read, params, encoded, len(texts[0]))
    now = decode(read, after, encoded, len(texts[1]))
    for name in ("tokens", "token_len", "start_frame", "end_frame", "durations"):
        np.testing.assert_array_equal(now[name], was[name], name)
    for row, hypothesis in enumerate(golden["decode_after_transfer"]):
        ids = now["tokens"][row][: now["token_len"][row]].tolist()
        assert ids == hypothesis["ids"]
        assert merged[1].processor.decode(ids).strip() == hypothesis["text"]


def test_ctc_log_probs_of_old_tokens_are_nemos_after_the_transfer(read, encoded, merged, folder):
    texts = [model.texts for model in merged]
    after = expand(
        read.variables["params"],
        ("tdt", "ctc"),
        *texts,
        durations=tuple(read.config["loss"]["durations"]),
    )
    with np.load(folder / "expansion.npz") as f:
        want = f["ctc_log_probs_after_transfer"]
        # NeMo's own new rows, which are random, in the place of ours
        layer = after["ctc_decoder"]["decoder_layers_0"]
        layer["kernel"][0, :, 64:121] = f["new/ctc_decoder.decoder_layers.0.weight"][64:121, :, 0].T
        layer["bias"][64:121] = f["new/ctc_decoder.decoder_layers.0.bias"][64:121]
    logits = encoded[0] @ layer["kernel"][0] + layer["bias"]
    got = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    for row, length in enumerate(np.asarray(encoded[1])):
        np.testing.assert_allclose(got[row, :length], want[row, :length], atol=1e-4)
