"""NeMo's models: every weight under its name, hostile files refused, written files read alike."""

import dataclasses
import json
import mmap
import os
import pickle
import tarfile
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from jasr import settings, text, tree
from jasr.interop import nemo_archive, plain_yaml, table, torch_file
from jasr.models.fastconformer.encoder import FastConformer
from jasr.models.fastconformer.nemo_sections import read_encoder
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer import nemo, nemo_config, nemo_tables
from jasr.systems.fastconformer.nemo import NemoError
from jasr.systems.fastconformer.transducer import Joint, JointConfig, Prediction, PredictionConfig
from jasr.text import sentencepiece_model
from tests.systems.fastconformer.nemo_models import (
    KINDS,
    build,
    config_of,
    folder,
    plain,
    state_of,
    tokenizer_of,
)

WRITTEN = [name for name in KINDS if name != "canary"]


@pytest.fixture
def tokenizer(goldens, tmp_path):
    return tokenizer_of(goldens, tmp_path)


@pytest.fixture
def make(goldens, tmp_path, tokenizer):
    """(name, changes of the config, changes of the weights) -> path of a .nemo of random weights.

    A change of None takes the entry away; a key "a.b" is the config's config["a"]["b"].
    """

    def built(name="ctc", config=(), state=()):
        said, weights = config_of(goldens, name), state_of(goldens, name)
        for key, value in dict(config).items():
            *sections, last = key.split(".")
            section = said
            for part in sections:
                section = section[part]
            section.pop(last, None) if value is None else section.update({last: value})
        weights |= dict(state)
        weights = {key: value for key, value in weights.items() if value is not None}
        return build(tmp_path / "made.nemo", said, weights, None if name == "canary" else tokenizer)

    return built


def weights_of(path):
    with nemo_archive.opened(path) as archive:
        start, size = archive.member(nemo_archive.WEIGHTS)
        state = torch_file.read(archive.tar, start=start, size=size)
        return {key: np.array(value) for key, value in state.items()}


def assert_same(got, want):
    got, want = (tree.flatten(x) for x in (got, want))
    assert got.keys() == want.keys()
    for path, array in want.items():
        assert got[path].dtype == array.dtype and got[path].shape == array.shape, path
        assert got[path].tobytes() == array.tobytes(), path


def refused(path, *reasons, **options):
    with pytest.raises(NemoError) as error:
        nemo.read(path, **options)
    message = str(error.value)
    assert str(path) in message
    for reason in reasons:
        assert reason in message, message
    return message


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_weight_arrives_under_its_name_and_axes(make, goldens, name):
    model, state = nemo.read(make(name)), state_of(goldens, name)
    assert model.kind == KINDS[name]
    params = tree.flatten(model.variables["params"])
    stats = tree.flatten(model.variables["batch_stats"])

    def same(path, key, *axes):
        np.testing.assert_array_equal(
            params[path], state[key].transpose(axes) if axes else state[key]
        )

    same("encoder/pre_encode/conv_3/kernel", "encoder.pre_encode.conv.3.weight", 2, 3, 1, 0)
    same("encoder/pre_encode/out/kernel", "encoder.pre_encode.out.weight", 1, 0)
    layer, ours = "encoder.layers.1", "encoder/layers_1"
    same(f"{ours}/self_attn/linear_q/kernel", f"{layer}.self_attn.linear_q.weight", 1, 0)
    same(f"{ours}/self_attn/pos_bias_u", f"{layer}.self_attn.pos_bias_u")
    same(f"{ours}/conv/depthwise_conv/kernel", f"{layer}.conv.depthwise_conv.weight", 2, 1, 0)
    same(f"{ours}/conv/batch_norm/scale", f"{layer}.conv.batch_norm.weight")
    same(f"{ours}/norm_self_att/bias", f"{layer}.norm_self_att.bias")
    variance = state[f"{layer}.conv.batch_norm.running_var"]
    np.testing.assert_array_equal(stats[f"{ours}/conv/batch_norm/var"], variance)
    if model.kind in ("ctc", "hybrid"):
        head = "decoder" if model.kind == "ctc" else "ctc_decoder"
        same(f"{head}/decoder_layers_0/kernel", f"{head}.decoder_layers.0.weight", 2, 1, 0)
    if model.kind in ("rnnt", "tdt", "hybrid"):
        lstm = "decoder.prediction.dec_rnn.lstm.weight_hh_l0"
        same(lstm.replace(".", "/"), lstm)
        same("decoder/prediction/embed/embedding", "decoder.prediction.embed.weight")
        same("joint/joint_net/kernel", "joint.joint_net.2.weight", 1, 0)
    used = len(params) + len(stats)
    dropped = sum(k.startswith(("transf_", "log_softmax")) for k in state) + len(model.buffers)
    assert used + dropped == len(state)
    assert all(array.dtype == np.float32 for array in (params | stats).values())


@pytest.mark.parametrize("name", KINDS)
def test_the_models_run_on_what_was_read(make, name):
    model = nemo.read(make(name))
    params, stats = model.variables["params"], model.variables["batch_stats"]
    encoder = FastConformer(FastConformerConfig(**model.config["encoder"]))
    mel, length = np.zeros((1, 16, 80), np.float32), np.array([16], np.int32)
    out, _ = jax.eval_shape(
        encoder.apply, {"params": params["encoder"], "batch_stats": stats["encoder"]}, mel, length
    )
    assert out.shape == (1, 2, 64)
    if "joint" in model.config:
        decoder = Prediction(PredictionConfig(**model.config["decoder"]))
        joint = Joint(JointConfig(**model.config["joint"]))
        g = jax.eval_shape(decoder.apply, {"params": params["decoder"]}, np.zeros((1, 3), np.int32))
        logits = jax.eval_shape(joint.apply, {"params": params["joint"]}, out, g)
        assert logits.shape == (1, 2, 4, 65 + len(model.config["loss"].get("durations", ())))


@pytest.mark.parametrize("packed", [True, False])
def test_nemos_own_archive_is_read_plain_and_gzipped(goldens, tmp_path, packed):
    path = folder(goldens) / "tiny_ctc_gzip.nemo" if packed else plain(goldens, tmp_path)
    model = nemo.read(path)
    assert model.kind == "ctc" and model.config["front_end"]["n_mels"] == 40
    assert model.config["front_end"]["kind"] == "nemo" and model.config["encoder"]["d_model"] == 32
    pieces = text.from_dict(model.tokenizer)
    assert pieces.vocab_size == 65 and pieces.decode(pieces.encode("the man")) == "the man"
    state = weights_of(path)
    kernel = model.variables["params"]["decoder"]["decoder_layers_0"]["kernel"]
    np.testing.assert_array_equal(
        kernel, state["decoder.decoder_layers.0.weight"].transpose(2, 1, 0)
    )
    assert model.nemo_config["target"].endswith("EncDecCTCModelBPE")


@pytest.mark.parametrize("name", [*KINDS, "base"])
def test_the_shared_goldens_are_read_and_come_back_bit_for_bit(shared_dir, tmp_path, name):
    path = shared_dir / "goldens" / "nemo" / f"tiny_{name}.nemo"
    if name == "base":
        path = path.parent / "averaging" / "base.nemo"
    model = nemo.read(path)
    if name in WRITTEN:
        nemo.write(tmp_path / "a.nemo", model)
        assert_same(weights_of(tmp_path / "a.nemo"), weights_of(path))
        again = nemo.read(tmp_path / "a.nemo")
        assert again.config == model.config and again.tokenizer == model.tokenizer


def test_weights_alone_take_config_and_tokenizer_from_another_file(shared_dir):
    averaging = shared_dir / "goldens" / "nemo" / "averaging"
    (path,) = averaging.glob("step=14000*.ckpt")
    refused(path, "weights without a config", "like=")
    model = nemo.read(path, like=averaging / "base.nemo")
    assert model.tokenizer is not None
    bias = model.variables["params"]["decoder"]["decoder_layers_0"]["bias"]
    state = torch_file.read(path)["state_dict"]
    np.testing.assert_array_equal(bias, state["decoder.decoder_layers.0.bias"])
    (last,) = averaging.glob("*-last.ckpt")  # the goldens' bogus one
    refused(last, "- params/encoder/", like=averaging / "base.nemo")


def test_the_encoders_of_all_variants_fit(shared_dir):
    nemo_goldens = shared_dir / "goldens" / "nemo"
    variants = json.loads((nemo_goldens / "enc_variants.json").read_text())
    assert len(variants) > 15
    for name, variant in variants.items():
        config = FastConformerConfig(**read_encoder(variant.get("config", variant), False, []))
        if not (nemo_goldens / f"enc_{name}.npz").exists():
            continue
        with np.load(nemo_goldens / f"enc_{name}.npz") as z:
            state = {f"encoder.{k[6:]}": z[k] for k in z if k.startswith("param/")}
        init = FastConformer(config).init
        mel, length = np.zeros((1, 64, config.feat_in), np.float32), np.array([64], np.int32)
        want = jax.eval_shape(init, {"params": jax.random.key(0)}, mel, length)
        want = {key: {"encoder": want[key]} for key in ("params", "batch_stats") if key in want}
        sections = {"encoder": settings.to_dict(config)}
        rows = nemo_tables.rows(nemo_config.Settings("encoder", sections), want)
        got = table.convert(rows, state, want, what=name)
        back = table.invert(rows, got)
        for key, array in back.items():
            np.testing.assert_array_equal(array, state[key])
        lost = state.keys() - back.keys()
        assert all(k.endswith("num_batches_tracked") or ".pos_bias_" in k for k in lost), lost


def test_weights_of_half_precision_become_f32(make, goldens):
    state = state_of(goldens, "tdt")
    for dtype in (ml_dtypes.bfloat16, np.float16):
        half = {k: v.astype(dtype) for k, v in state.items() if v.dtype == np.float32}
        model = nemo.read(make("tdt", state=half))  # filters and window are rounded too
        kernel = model.variables["params"]["joint"]["joint_net"]["kernel"]
        want = half["joint.joint_net.2.weight"].astype(np.float32).T
        assert kernel.dtype == np.float32 and np.array_equal(kernel, want)


def test_without_dropout_the_joint_networks_last_layer_is_the_second(make, goldens, tmp_path):
    state = state_of(goldens, "tdt")
    moved = {f"joint.joint_net.{n}.{x}": state[f"joint.joint_net.2.{x}"] if n == 1 else None
             for n in (1, 2) for x in ("weight", "bias")}  # fmt: skip
    path = make("tdt", {"joint.jointnet.dropout": 0.0}, moved)
    model = nemo.read(path)
    nemo.write(tmp_path / "a.nemo", model)
    assert_same(weights_of(tmp_path / "a.nemo"), weights_of(path))


def test_a_config_with_aux_ctc_needs_no_ctc_weights_if_the_class_has_none(make, goldens):
    aux = config_of(goldens, "hybrid_tdt")["aux_ctc"]
    assert nemo.read(make("tdt", {"aux_ctc": aux})).kind == "tdt"  # Parakeet TDT 0.6b
    head = "ctc_decoder.decoder_layers.0.weight"
    message = refused(make("tdt", {"aux_ctc": aux}, {head: np.zeros((65, 64, 1), np.float32)}))
    assert f"+ {head} (65, 64, 1): no row" in message


def test_biases_that_layers_share_are_read_once_and_written_for_each(make, goldens, tmp_path):
    state = state_of(goldens, "ctc")
    name = "encoder.layers.{}.self_attn.pos_bias_{}"
    shared = {name.format(1, x): state[name.format(0, x)] for x in "uv"}
    path = make("ctc", {"encoder.untie_biases": False}, shared)
    model = nemo.read(path)
    assert "pos_bias_u" not in model.variables["params"]["encoder"]["layers_1"]["self_attn"]
    nemo.write(tmp_path / "a.nemo", model)
    assert_same(weights_of(tmp_path / "a.nemo"), weights_of(path))
    refused(
        make("ctc", {"encoder.untie_biases": False}), "layer 1 has its own self_attn.pos_bias_u"
    )


def test_references_of_old_files_are_resolved(make):
    for root in ("", "model."):
        references = {
            "encoder.feat_in": f"${{{root}preprocessor.features}}",
            "decoder.feat_in": f"${{{root}encoder.d_model}}",
            "encoder.n_heads": "${.n_layers_}",
            "encoder.d_model": f"${{{root}model_defaults.enc_hidden}}",
            "train_ds.manifest_filepath": "${oc.env:HOME}",  # not read, so not complained of
        }
        path = make("ctc", {**references, "encoder.n_heads": 4})
        assert nemo.read(path).config["encoder"]["d_model"] == 64
    refused(
        make("ctc", {"encoder.d_model": "${nowhere.at_all}", "encoder.n_heads": "${oc.env:N}"}),
        "encoder.d_model: ${nowhere.at_all} leads nowhere",
        "encoder.n_heads: ${oc.env:N} calls a function",
    )
    refused(make("ctc", {"preprocessor": None}), "no section 'preprocessor'")


def test_the_version_of_the_file_decides_how_its_front_end_and_subsampling_pad(make):
    for version, old in {"2.4.0": True, "2.5.0rc1": False, "1.23.0": True, None: True}.items():
        model = nemo.read(make("ctc", {"nemo_version": version}))
        assert model.config["front_end"]["kind"] == ("nemo_legacy" if old else "nemo")
        assert model.config["encoder"]["masked_subsampling"] is not old


def test_reading_takes_the_memory_of_the_result_and_a_few_tensors(goldens, tmp_path):
    config = plain_yaml.load((folder(goldens) / "tiny_ctc.yaml").read_bytes())
    config["encoder"] |= {"d_model": 256, "ff_expansion_factor": 8, "n_layers": 4}
    settings = nemo.nemo_config.parse(config)[0]
    shapes = nemo.shapes(settings, 64)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    state = table.invert(nemo.rows(settings, shapes), zeros)
    path = build(tmp_path / "a.nemo", config, state, tokenizer_of(goldens, tmp_path))
    size = sum(x.nbytes for x in state.values())
    largest = max(x.nbytes for x in state.values())
    assert size > 20e6
    nemo.read(path)  # what is compiled and cached
    tracemalloc.start()
    model = nemo.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not any(is_mapped(leaf) for leaf in jax.tree.leaves(model.variables))
    assert peak < size + 3 * largest + 2e6
    if jax.default_backend() == "cpu":  # on the device without another copy
        kernel = model.variables["params"]["encoder"]["pre_encode"]["out"]["kernel"]
        assert jax.device_put(kernel).unsafe_buffer_pointer() == kernel.ctypes.data


def is_mapped(array):
    """Whether an array's memory is a file's."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return isinstance(array, mmap.mmap)


@pytest.mark.parametrize("changes", [{}, {"reduction": "striding", "reduction_position": 2}])
def test_shapes_of_deep_encoders_are_those_of_the_model_itself(changes):
    config = FastConformerConfig(
        n_layers=4, d_model=16, n_heads=2, untie_biases=False, reduction_factor=2, **changes
    )
    mel, length = np.zeros((1, 64, 80), np.float32), np.array([64], np.int32)
    want = jax.eval_shape(FastConformer(config).init, jax.random.key(0), mel, length)
    sections = {"encoder": dataclasses.asdict(config)}
    got = nemo.shapes(nemo.nemo_config.Settings("encoder", sections), 1)
    tree.compare(want["params"], got["params"]["encoder"], what="shapes")
    tree.compare(want["batch_stats"], got["batch_stats"]["encoder"], what="shapes")


# ---- checkpoints ---------------------------------------------------------------------------------


def lightning(path, goldens, state):
    """A .ckpt as Lightning writes it, its config pickled by OmegaConf 2.4 itself."""
    config = (folder(goldens) / "omegaconf_hyper_parameters.pkl").read_bytes()
    torch_file.write(path, {"epoch": 3, "state_dict": state})
    with torch_file.zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    both = bytearray(b"\x80\x02}(X\x0a\x00\x00\x00state_dict")
    torch_file._emit(both, state, {}, {np.dtype(v): k for k, v in torch_file.DTYPES.items()}, "")
    # the config's own pickle, between its PROTO and STOP, is {"hparams_name", "hyper_parameters"}
    start = config.index(b"X\x10\x00\x00\x00hyper_parameters")
    name_end = config.index(b"c", start + 21)
    both += b"X\x10\x00\x00\x00hyper_parameters" + config[name_end:-2] + b"u."
    members["archive/data.pkl"] = bytes(both)
    with torch_file.zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_the_config_inside_a_lightning_checkpoint_is_used(goldens, tmp_path):
    state = state_of(goldens, "ctc")
    model = nemo.read(lightning(tmp_path / "a.ckpt", goldens, state))
    assert model.kind == "ctc" and model.tokenizer is None
    assert model.config["encoder"]["feat_in"] == 80  # "${preprocessor.features}" in the pickle
    bias = model.variables["params"]["decoder"]["decoder_layers_0"]["bias"]
    np.testing.assert_array_equal(bias, state["decoder.decoder_layers.0.bias"])
    with pytest.raises(NemoError, match="needs a SentencePiece tokenizer"):
        nemo.write(tmp_path / "a.nemo", model)


def test_omegaconf_objects_become_what_they_hold(goldens):
    data = (folder(goldens) / "omegaconf_hyper_parameters.pkl").read_bytes()
    read = plain_yaml.plain(nemo.torch_file.pickles.loads(data, opaque=torch_file.OPAQUE))
    want = config_of(goldens, "ctc")
    got = read["hyper_parameters"]
    assert got["preprocessor"] == want["preprocessor"] and got["target"] == want["target"]
    assert got["encoder"] == {**want["encoder"], "feat_in": "${preprocessor.features}"}
    assert got["train_ds"]["manifest_filepath"] == "???"


def test_bare_weights_take_a_recipes_config(goldens, tmp_path):
    state = state_of(goldens, "tdt")
    torch_file.write(tmp_path / "a.pt", state)
    config = config_of(goldens, "tdt")
    del config["decoder"]["vocab_size"], config["joint"]["num_classes"]
    (tmp_path / "recipe.yaml").write_bytes(plain_yaml.dump({"name": "x", "model": config}))
    model = nemo.read(tmp_path / "a.pt", like=tmp_path / "recipe.yaml")
    assert model.kind == "tdt" and model.config["joint"]["num_classes"] == 64


# ---- what does not fit ---------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_in_one_error(make):
    fb = np.zeros((1, 80, 257), np.float32)
    bias = "encoder.layers.1.conv.depthwise_conv.bias"
    path = make(
        "ctc",
        {"encoder.n_layers": 3},
        {
            "preprocessor.featurizer.fb": fb,
            "preprocessor.featurizer.window": np.zeros(320, np.float32),
            "decoder.decoder_layers.0.bias": np.zeros(70, np.float32),
            "decoder.extra": np.zeros(2, np.float32),
            bias: None,
        },
    )
    refused(
        path,
        "encoder.n_layers of the config is 3, the weights have 2 layers",
        "preprocessor.featurizer.window (320,), but the config's front end has (400,)",
        "preprocessor.featurizer.fb differs from the config's front end by 0.0",
        "the tokenizer has 64 pieces, the head 69",
        "decoder.vocabulary of the config has 64 pieces, the head 69",
        "+ decoder.extra (2,): no row",
        "~ decoder.decoder_layers.0.weight (65, 64, 1)",
        "- params/encoder/layers_1/conv/depthwise_conv/bias (64,)",
        "- params/encoder/layers_2/norm_out/scale (64,)",
    )


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("ctc", {"target": "nemo.x.EncDecCTCModel"}, "EncDecCTCModel; known are EncDecC"),
        ("ctc", {"target": None}, "target is nothing"),
        ("ctc", {"encoder": None}, "no section 'encoder'"),
        ("ctc", {"encoder.foo": 1}, "encoder.foo is 1"),
        ("ctc", {"encoder._target_": "nemo.RNNEncoder"}, "RNNEncoder"),
        ("ctc", {"preprocessor.foo": 1}, "preprocessor.foo is 1, which is not known"),
        ("ctc", {"preprocessor._target_": "nemo.AudioToMFCCPreprocessor"}, "MFCC"),
        ("ctc", {"preprocessor.window": "kaiser"}, "preprocessor.window is 'kaiser', must be"),
        ("ctc", {"decoder._target_": "nemo.LSTMDecoder"}, "LSTMDecoder'; known is ConvASRDecoder"),
        ("ctc", {"encoder.n_layers": 10**9}, "encoder.n_layers is 1000000000"),
        ("ctc", {"encoder.conv_kernel_size": 10**9 + 1}, "conv_kernel_size is"),
        ("ctc", {"preprocessor.n_fft": 1 << 40}, "preprocessor.n_fft is"),
        ("ctc", {"encoder.d_model": "wide"}, "encoder.d_model is 'wide', not an integer"),
        ("ctc", {"preprocessor.window_size": 1e308}, "preprocessor.window_size is 1e+308"),
        ("rnnt", {"decoding": 5}, "decoding is 5, not a mapping"),
        ("rnnt", {"decoder._target_": "nemo.StatelessTransducerDecoder"}, "Stateless"),
        ("rnnt", {"decoder.normalization_mode": "layer"}, "decoder.normalization_mode is 'layer'"),
        ("rnnt", {"loss": {"loss_name": "multiblank_rnnt"}}, "loss_name is 'multiblank_rnnt'"),
        ("tdt", {"loss": {"loss_name": "default"}}, "num_extra_outputs is 5, but the loss rnnt"),
        ("tdt", {"joint.jointnet": {"joint_hidden": None}}, "joint.jointnet.joint_hidden is None"),
        ("hybrid_tdt", {"aux_ctc": None}, "no section 'aux_ctc.decoder'"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_known_is_named(make, name, config, reason):
    refused(make(name, config), reason)


def test_a_tokenizer_of_other_pieces_than_the_config_lists_is_named(make, goldens, tokenizer):
    pieces = config_of(goldens, "ctc")["decoder"]["vocabulary"]
    swapped = [pieces[0], pieces[2], pieces[1], *pieces[3:]]
    message = refused(
        make("ctc", {"decoder.vocabulary": swapped}),
        "the tokenizer is not the one of decoder.vocabulary of the config: 2 of 64 pieces differ "
        f"(1: {pieces[2]!r}, the tokenizer's {pieces[1]!r}, 2: {pieces[1]!r}, the",
    )
    assert len(message.splitlines()) == 1
    refused(
        make("hybrid_tdt", {"aux_ctc.decoder.vocabulary": ["no piece"] * 64}),
        "of aux_ctc.decoder.vocabulary of the config: 64 of 64 pieces differ",
        " ...)",
    )
    refused(make("rnnt", {"joint.vocabulary": ["x", *pieces[1:]]}), "joint.vocabulary", "1 of 64")
    model = sentencepiece_model.Model.from_bytes(tokenizer)
    old = ["<unk>", *sentencepiece_model.vocab_txt(model).splitlines()]  # NeMo 1.0's list
    assert old != pieces and any(piece.startswith("##") for piece in old)
    for listed in (old, list(range(64)), None):
        assert nemo.read(make("ctc", {"decoder.vocabulary": listed})).kind == "ctc"


def test_a_tokenizer_that_is_not_there_is_named(goldens, tmp_path, tokenizer):
    state = state_of(goldens, "ctc")
    for section, reason in {
        None: "no tokenizer",
        "wpe": "a tokenizer of type 'wpe'",
        "path": "'/data/tokenizer.model', not a member of the archive",
        "gone": "no 'nemo:1b_tokenizer.model' in it",
    }.items():
        config = config_of(goldens, "ctc")
        config["tokenizer"] = {
            None: None,
            "wpe": {"type": "wpe"},
            "path": {"type": "bpe", "model_path": "/data/tokenizer.model"},
            "gone": {"type": "bpe", "model_path": "nemo:1b_tokenizer.model"},
        }[section]
        refused(build(tmp_path / "a.nemo", config, state), reason)
    config = config_of(goldens, "ctc")
    refused(build(tmp_path / "a.nemo", config, state, b"noise"), "not a SentencePiece model")


# ---- hostile files -------------------------------------------------------------------------------


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_nothing_in_the_weights_or_the_config_is_run(goldens, tmp_path, tokenizer):
    canary = tmp_path / "canary"
    config = config_of(goldens, "ctc")
    path = tmp_path / "a.nemo"
    pickled = pickle.dumps({"encoder.x": Evil(canary)}, 2)
    refused(build(path, config, pickled, tokenizer), "model_weights.ckpt: a bare pickle")
    torch_file.write(tmp_path / "w.pt", {"a": np.zeros(3, np.float32)})
    zipped = tmp_path / "evil.pt"
    with torch_file.zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    data = zipped.read_bytes()
    refused(build(path, config, data, tokenizer), "refused: the pickle asks for 'posix.system'")
    refused(zipped, "refused: the pickle asks for 'posix.system'")
    raw = plain_yaml.dump(config)
    for line in (
        f"x: !!python/object/apply:os.system ['touch {canary}']",
        f"x: !!python/object/new:os.system [touch {canary}]",
        "x: !!python/name:os.system ''",
        "x: !!binary aGVsbG8=",
        "x: !foo 1",
    ):
        refused(build(path, raw + line.encode(), {"a": np.zeros(1)}), "refused: the tag")
    called = {**config, "encoder": {**config["encoder"], "_target_": "os.system"}}
    refused(
        build(path, called, state_of(goldens, "ctc"), tokenizer), "encoder._target_ is 'os.system'"
    )
    assert not canary.exists()


def test_tensors_that_share_memory_are_refused(goldens, tmp_path, tokenizer):
    out = bytearray(b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((")
    for part in ("storage",):
        torch_file._emit(out, part, [], {}, "")
    out += b"ctorch\nFloatStorage\n"
    for part in ("0", "cpu", 6):
        torch_file._emit(out, part, [], {}, "")
    out += b"tQ"
    for part in (0, (1 << 40,), (0,), False):
        torch_file._emit(out, part, [], {}, "")
    out += b"ccollections\nOrderedDict\n)RtRs."
    with torch_file.zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(out))
        archive.writestr("archive/data/0", bytes(24))
    data = (tmp_path / "w.pt").read_bytes()
    path = build(tmp_path / "a.nemo", config_of(goldens, "ctc"), data, tokenizer)
    refused(path, "model_weights.ckpt", "share memory")


def test_archives_without_config_or_weights_are_refused(goldens, tmp_path):
    path = tmp_path / "a.nemo"
    nemo_archive.write(path, {nemo_archive.CONFIG: b"a: 1"})
    refused(path, "no 'model_weights.ckpt' in it; it holds model_config.yaml")
    nemo_archive.write(path, {nemo_archive.WEIGHTS: b"x"})
    refused(path, "no 'model_config.yaml' in it")
    nemo_archive.write(path, {nemo_archive.WEIGHTS: b"x", nemo_archive.CONFIG: b"[1, 2]"})
    refused(path, "model_config.yaml is not a mapping")
    refused(tmp_path / "nothing.nemo", "cannot be read: No such file")
    info = tarfile.TarInfo("../../evil")
    with tarfile.open(path, "w:") as tar:
        tar.addfile(info)
    refused(path, "'../../evil' names a place outside the archive")


def test_a_state_dict_of_other_things_than_arrays_is_refused(goldens, tmp_path):
    torch_file.write(tmp_path / "a.pt", {"state_dict": {"a": 1}})
    refused(tmp_path / "a.pt", "neither a state dict")
    torch_file.write(tmp_path / "a.pt", [1, 2])
    refused(tmp_path / "a.pt", "neither a state dict")
    for saved in ({3: np.zeros(2, np.float32)}, {"state_dict": {(1, 2): np.zeros(2)}}):
        with pytest.raises(NemoError, match="a.pt: neither a state dict"):
            nemo._state_dict(saved, "a.pt")


def test_a_weight_that_only_looks_like_a_shared_bias_is_a_weight_without_a_row(make, goldens):
    state = state_of(goldens, "ctc")
    name = "encoder.layers.{}.self_attn.pos_bias_{}"
    shared = {name.format(1, x): state[name.format(0, x)] for x in "uv"}
    odd = "x.self_attn.pos_bias_u"
    path = make("ctc", {"encoder.untie_biases": False}, {**shared, odd: np.zeros(2, np.float32)})
    assert "has its own" not in refused(path, f"+ {odd} (2,): no row")


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read_back_bit_for_bit(make, tmp_path, name):
    path = make(name)
    model = nemo.read(path)
    nemo.write(tmp_path / "a.nemo", model)
    again = nemo.read(tmp_path / "a.nemo")
    assert_same(again.variables, model.variables)
    assert again.config == model.config and again.tokenizer == model.tokenizer
    assert_same(weights_of(tmp_path / "a.nemo"), weights_of(path))
    written, before = again.nemo_config, model.nemo_config
    assert written["target"] == before["target"] and written["optim"] == before["optim"]
    assert not list(tmp_path.glob(".jasr-*"))


@pytest.mark.parametrize("name", WRITTEN)
def test_torch_loads_what_is_written(make, tmp_path, name):
    torch = pytest.importorskip("torch")
    path = make(name)
    nemo.write(tmp_path / "a.nemo", nemo.read(path))
    with tarfile.open(tmp_path / "a.nemo", "r:") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    state = torch.load(tmp_path / "out" / "model_weights.ckpt", weights_only=True)
    want = weights_of(path)
    assert state.keys() == want.keys()
    for key, array in want.items():
        assert torch.equal(state[key], torch.from_numpy(array)), key
    config = plain_yaml.load((tmp_path / "out" / "model_config.yaml").read_bytes())
    for key in ("model_path", "vocab_path", "spe_tokenizer_vocab"):
        member = config["tokenizer"][key]
        assert member.startswith("nemo:")
        assert (tmp_path / "out" / member.removeprefix("nemo:")).is_file()
        prefix, _, rest = member.removeprefix("nemo:").partition("_")
        assert len(prefix) == 32 and rest in ("tokenizer.model", "vocab.txt", "tokenizer.vocab")


def test_a_model_that_never_was_nemos_is_written_with_its_buffers(make, goldens, tmp_path):
    model = nemo.read(make("tdt"))
    ours = dataclasses.replace(model, nemo_config={}, buffers={})
    nemo.write(tmp_path / "a.nemo", ours)
    again = nemo.read(tmp_path / "a.nemo")
    assert_same(again.variables, model.variables)
    assert again.config == model.config and again.kind == "tdt"
    sizes = {"enc_hidden": 64, "pred_hidden": 48, "joint_hidden": 40}
    assert again.nemo_config["model_defaults"] == sizes  # NeMo's constructor reads them
    state, want = weights_of(tmp_path / "a.nemo"), state_of(goldens, "tdt")
    assert state.keys() == want.keys()
    for key in ("preprocessor.featurizer.window", "preprocessor.featurizer.fb"):
        assert state[key].shape == want[key].shape
        np.testing.assert_allclose(state[key], want[key], atol=1e-6)
    assert state["encoder.layers.0.conv.batch_norm.num_batches_tracked"] == 0


def test_each_branch_of_a_hybrid_is_a_model_of_its_own(make, tmp_path):
    hybrid = nemo.read(make("hybrid_tdt"))
    for kind, head in (("ctc", "ctc_decoder"), ("tdt", "joint")):
        model = nemo.branch(hybrid, kind)
        nemo.write(tmp_path / "a.nemo", model)
        again = nemo.read(tmp_path / "a.nemo")
        assert again.kind == kind
        assert_same(again.variables, model.variables)
        ours = "decoder" if kind == "ctc" else head
        assert_same(again.variables["params"][ours], hybrid.variables["params"][head])
    with pytest.raises(NemoError, match="no branch 'rnnt'"):
        nemo.branch(hybrid, "rnnt")


def test_what_nemo_does_not_have_is_not_written(make, tmp_path):
    path = tmp_path / "a.nemo"
    with pytest.raises(NemoError, match="kind 'encoder' is not written|needs a SentencePiece"):
        nemo.write(path, nemo.read(make("canary")))
    model = nemo.read(make("ctc", {"decoding.greedy": {"ngram_lm_model": "nemo:0c_lm.arpa"}}))
    with pytest.raises(NemoError, match="'nemo:0c_lm.arpa' in decoding.greedy.ngram_lm_model"):
        nemo.write(path, model)
    model = nemo.read(make("ctc"))
    params = tree.unflatten({**tree.flatten(model.variables), "params/new/kernel": np.zeros(2)})
    with pytest.raises(NemoError, match=r"\+ params/new/kernel"):
        nemo.write(path, dataclasses.replace(model, variables=params))
    front_end = {**model.config["front_end"], "kind": "htk"}
    for change in (front_end, {**front_end, "kind": "nemo_legacy"}):
        with pytest.raises(NemoError, match="htk|neither"):
            nemo.write(
                path, dataclasses.replace(model, config={**model.config, "front_end": change})
            )
    assert not path.exists()
