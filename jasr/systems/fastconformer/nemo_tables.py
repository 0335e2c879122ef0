"""Names and shapes: the tables between NeMo's state dicts and our variables.

Parameter paths are NeMo's: `encoder.layers.0.self_attn.linear_q.weight` is
params/encoder/layers_0/self_attn/linear_q/kernel.
"""

import dataclasses

import jax
import numpy as np

from jasr.interop.table import Row
from jasr.models.fastconformer.encoder import FastConformer
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer.transducer import Joint, JointConfig, Prediction, PredictionConfig

TRANSDUCERS = ("rnnt", "tdt", "hybrid")


def shapes(model, vocab_size):
    """Shapes {"params", "batch_stats"} of a model's variables, without computing anything.

    Args:
      model: nemo_config.Settings. vocab_size: pieces, without blank.
    """
    params, batch_stats = {}, {}
    config = FastConformerConfig(**model.sections["encoder"])
    encoder = _encoder_shapes(config)
    params["encoder"] = encoder["params"]
    if "batch_stats" in encoder:
        batch_stats["encoder"] = encoder["batch_stats"]
    size = vocab_size + 1
    kernel, bias = _shape(1, config.out_dim, size), _shape(size)
    head = {"decoder_layers_0": {"kernel": kernel, "bias": bias}}
    if model.kind == "ctc":
        params["decoder"] = head
    if model.kind == "hybrid":
        params["ctc_decoder"] = head
    if model.kind in TRANSDUCERS:
        prediction = PredictionConfig(**model.sections["decoder"])
        joint = JointConfig(**model.sections["joint"])
        tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
        frames = jax.ShapeDtypeStruct((1, 1, joint.encoder_hidden), np.float32)
        outputs = jax.ShapeDtypeStruct((1, 1, joint.pred_hidden), np.float32)
        params["decoder"] = _init(Prediction(prediction), tokens)["params"]
        params["joint"] = _init(Joint(joint), frames, outputs)["params"]
    return {"params": params, "batch_stats": batch_stats}


def _encoder_shapes(config):
    """Those of an encoder's variables. Only its first two layers are traced, which takes a tenth of
    a second each: the others are like the second."""
    few = {"n_layers": min(2, config.n_layers)}
    if config.has_reduction and config.reduction_position > 0:
        few["reduction_position"] = 0
    mel = jax.ShapeDtypeStruct((1, 16 * config.subsampling_factor, config.feat_in), np.float32)
    length = jax.ShapeDtypeStruct((1,), np.int32)
    variables = _init(FastConformer(dataclasses.replace(config, **few)), mel, length)
    for part in variables.values():
        for number in range(2, config.n_layers if "layers_1" in part else 0):
            part[f"layers_{number}"] = part["layers_1"]
    return variables


def _init(model, *args):
    return jax.eval_shape(model.init, {"params": jax.random.key(0)}, *args)


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def encoder_rows(config, source="encoder", target="encoder"):
    """Table of a ConformerEncoder's names.

    Args:
      config: FastConformerConfig.
      source, target: where the encoder stands in the state dict, and in our tree.
    """
    source, params, stats = source.replace(".", r"\."), f"params/{target}", f"batch_stats/{target}"
    pre, to = rf"{source}\.pre_encode", f"{params}/pre_encode"
    less, to_less = rf"{source}\.(reduction_subsampling)\.(reduction_enc)", rf"{params}/\1/\2"
    layer, to_layer = rf"{source}\.layers\.(\d+)", rf"{params}/layers_\1"
    norms = "feed_forward1|self_att|conv|feed_forward2|out"
    linears = "linear_q|linear_k|linear_v|linear_out|linear_pos|global_q|global_k|global_v"
    convs = "pointwise_conv1|depthwise_conv|pointwise_conv2"
    biases = Row(rf"{layer}\.self_attn\.pos_bias_(u|v)", rf"{to_layer}/self_attn/pos_bias_\2")
    if config.tied_biases:  # one parameter under the names of all layers; ours is layer 0's
        only = rf"{params}/layers_0/self_attn/pos_bias_\2"
        biases = biases._replace(target=only, copies=config.n_layers)
    return (
        Row(rf"{pre}\.weight", f"{to}/kernel", "linear"),
        Row(rf"{pre}\.bias", f"{to}/bias"),
        Row(rf"{pre}\.conv\.(\d+)\.weight", rf"{to}/conv_\1/kernel", "conv2d"),
        Row(rf"{pre}\.conv\.(\d+)\.bias", rf"{to}/conv_\1/bias"),
        Row(rf"{pre}\.(out|proj_out)\.weight", rf"{to}/\1/kernel", "linear"),
        Row(rf"{pre}\.(out|proj_out|pre_norm)\.bias", rf"{to}/\1/bias"),
        Row(rf"{pre}\.pre_norm\.weight", f"{to}/pre_norm/scale"),
        Row(rf"{less}\.conv\.(\d+)\.weight", rf"{to_less}/conv_\3/kernel", "conv2d"),
        Row(rf"{less}\.conv\.(\d+)\.bias", rf"{to_less}/conv_\3/bias"),
        Row(rf"{less}\.out\.weight", rf"{to_less}/out/kernel", "linear"),
        Row(rf"{less}\.out\.bias", rf"{to_less}/out/bias"),
        Row(rf"{layer}\.norm_({norms})\.weight", rf"{to_layer}/norm_\2/scale"),
        Row(rf"{layer}\.norm_({norms})\.bias", rf"{to_layer}/norm_\2/bias"),
        Row(
            rf"{layer}\.(feed_forward1|feed_forward2)\.(linear1|linear2)\.weight",
            rf"{to_layer}/\2/\3/kernel",
            "linear",
        ),
        Row(
            rf"{layer}\.(feed_forward1|feed_forward2)\.(linear1|linear2)\.bias",
            rf"{to_layer}/\2/\3/bias",
        ),
        Row(
            rf"{layer}\.self_attn\.({linears})\.weight",
            rf"{to_layer}/self_attn/\2/kernel",
            "linear",
        ),
        Row(rf"{layer}\.self_attn\.({linears})\.bias", rf"{to_layer}/self_attn/\2/bias"),
        biases,
        Row(rf"{layer}\.conv\.({convs})\.weight", rf"{to_layer}/conv/\2/kernel", "conv1d"),
        Row(rf"{layer}\.conv\.({convs})\.bias", rf"{to_layer}/conv/\2/bias"),
        Row(rf"{layer}\.conv\.batch_norm\.weight", rf"{to_layer}/conv/batch_norm/scale"),
        Row(rf"{layer}\.conv\.batch_norm\.bias", rf"{to_layer}/conv/batch_norm/bias"),
        Row(
            rf"{layer}\.conv\.batch_norm\.running_(mean|var)",
            rf"{stats}/layers_\1/conv/batch_norm/\2",
        ),
        Row(rf"{layer}\.conv\.batch_norm\.num_batches_tracked", None),
        Row(rf"{source}\.pos_enc\.pe", None),
        Row(rf"{source}\.out_proj\.weight", f"{params}/out_proj/kernel", "linear"),
        Row(rf"{source}\.out_proj\.bias", f"{params}/out_proj/bias"),
    )


def rows(model, joint_index=2):
    """Table from the names of NeMo's state dict to ours, for nemo_config.Settings.

    joint_index: where joint_net's linear layer stands, 2 behind a dropout and 1 without.
    """
    encoder = encoder_rows(FastConformerConfig(**model.sections["encoder"]))
    featurizer = Row(r"preprocessor\.featurizer\.(window|fb)", None)
    if model.kind == "encoder":
        rest = r"(transf_encoder|transf_decoder|log_softmax|encoder_decoder_proj)\..*"
        return (*encoder, featurizer, Row(rest, None))
    heads = []
    if model.kind in ("ctc", "hybrid"):
        name = "decoder" if model.kind == "ctc" else "ctc_decoder"
        source, target = rf"{name}\.decoder_layers\.0", f"params/{name}/decoder_layers_0"
        heads += [
            Row(rf"{source}\.weight", f"{target}/kernel", "conv1d"),
            Row(rf"{source}\.bias", f"{target}/bias"),
        ]
    if model.kind in TRANSDUCERS:
        source, target = r"decoder\.prediction", "params/decoder/prediction"
        net = rf"joint\.joint_net\.{joint_index}"
        heads += [
            Row(rf"{source}\.embed\.weight", f"{target}/embed/embedding"),
            Row(rf"{source}\.dec_rnn\.lstm\.(\w+_\w+_l\d+)", rf"{target}/dec_rnn/lstm/\1"),
            Row(r"joint\.(enc|pred)\.weight", r"params/joint/\1/kernel", "linear"),
            Row(r"joint\.(enc|pred)\.bias", r"params/joint/\1/bias"),
            Row(rf"{net}\.weight", "params/joint/joint_net/kernel", "linear"),
            Row(rf"{net}\.bias", "params/joint/joint_net/bias"),
        ]
    return (*encoder, featurizer, *heads)
