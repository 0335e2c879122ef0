"""Names and shapes: the tables between NeMo's state dicts and our variables.

Parameter paths are NeMo's: `encoder.layers.0.self_attn.linear_q.weight` is
params/encoder/layers_0/self_attn/linear_q/kernel.
"""

import dataclasses

import jax
import numpy as np

from jasr.interop.table import Row, torch_rows
from jasr.models.fastconformer.encoder import FastConformer
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer.model import CtcHead
from jasr.systems.fastconformer.transducer import Joint, JointConfig, Prediction, PredictionConfig

TRANSDUCERS = ("rnnt", "tdt", "hybrid")


def shapes(model, vocab_size):
    """Shapes {"params", "batch_stats"} of a model's variables, without computing anything.

    Args:
      model: nemo_config.Settings. vocab_size: pieces, without blank.
    """
    config = FastConformerConfig(**model.sections["encoder"])
    found = {kind: {"encoder": part} for kind, part in _encoder_shapes(config).items()}
    params = found["params"]
    if model.kind in ("ctc", "hybrid"):
        name = "decoder" if model.kind == "ctc" else "ctc_decoder"
        params[name] = _init(CtcHead(vocab_size + 1), _floats(1, 1, config.out_dim))["params"]
    if model.kind in TRANSDUCERS:
        joint = JointConfig(**model.sections["joint"])
        sides = (_floats(1, 1, size) for size in (joint.encoder_hidden, joint.pred_hidden))
        tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
        prediction = PredictionConfig(**model.sections["decoder"])
        params["decoder"] = _init(Prediction(prediction), tokens)["params"]
        params["joint"] = _init(Joint(joint), *sides)["params"]
    return {"params": params, "batch_stats": found.get("batch_stats", {})}


def _encoder_shapes(config):
    """Those of an encoder's variables. Only its first two layers are traced, which takes a tenth of
    a second each: the others are like the second."""
    few = {"n_layers": min(2, config.n_layers)}
    if config.has_reduction and config.reduction_position > 0:
        few["reduction_position"] = 0
    mel = _floats(1, 16 * config.subsampling_factor, config.feat_in)
    length = jax.ShapeDtypeStruct((1,), np.int32)
    variables = _init(FastConformer(dataclasses.replace(config, **few)), mel, length)
    for part in variables.values():
        for number in range(2, config.n_layers if "layers_1" in part else 0):
            part[f"layers_{number}"] = part["layers_1"]
    return variables


def _init(model, *args):
    return jax.eval_shape(model.init, {"params": jax.random.key(0)}, *args)


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def rows(model, want, joint_index=2):
    """Table from the names of NeMo's state dict to ours.

    Args:
      model: nemo_config.Settings. want: its `shapes`.
      joint_index: where joint_net's linear layer stands, 2 behind a dropout and 1 without.
    """
    found = torch_rows(want, {"joint_net": f"joint_net.{joint_index}"})
    if FastConformerConfig(**model.sections["encoder"]).tied_biases:
        # one parameter under the names of all layers; ours is layer 0's
        source = r"encoder\.layers\.(\d+)\.self_attn\.pos_bias_(u|v)"
        target, copies = r"layers_0/self_attn/pos_bias_\2", model.sections["encoder"]["n_layers"]
        found = [row for row in found if "pos_bias" not in row.source]
        found.append(Row(source, f"params/encoder/{target}", copies=copies))
    unread = r"preprocessor\.featurizer\.(window|fb)|encoder\.pos_enc\.pe"
    if model.kind == "encoder":
        unread += r"|(transf_encoder|transf_decoder|log_softmax|encoder_decoder_proj)\..*"
    return (*found, Row(unread, None))
