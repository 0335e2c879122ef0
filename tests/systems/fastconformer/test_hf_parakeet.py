"""Parakeet directories: transformers loads what is written, and gives NeMo's numbers with it."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import text, tree
from jasr.decoding.ctc import ctc_greedy
from jasr.decoding.transducer import Steps, greedy
from jasr.interop import safetensors_file
from jasr.interop.tokenizer_json import TokenizerError
from jasr.losses.ctc import ctc_loss
from jasr.losses.transducer import rnnt_loss, tdt_loss
from jasr.systems import loading
from jasr.systems.fastconformer import hf_parakeet, nemo, nemo_config
from jasr.systems.fastconformer.hf_parakeet import HfError
from jasr.text.sentencepiece_model import Piece
from tests.systems.fastconformer.nemo_models import build, config_of, state_of, tokenizer_of

KINDS = ("ctc", "rnnt", "tdt")


@pytest.fixture(scope="module")
def models(goldens, tmp_path_factory):
    """kind -> a NemoModel of random weights with the prediction network as wide as the joint."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tokenizer_of(goldens, folder)
    made = {}
    for kind in KINDS:
        path = build(
            folder / "a.nemo", config_of(goldens, kind), state_of(goldens, kind), tokenizer
        )
        model = nemo.read(path)
        if kind != "ctc":
            joint = {**model.config["joint"], "joint_hidden": 48}
            config = {**model.config, "joint": joint}
            rng = np.random.default_rng(1)
            variables = jax.tree.map(
                lambda s, rng=rng: rng.uniform(0.1, 0.9, s.shape).astype(np.float32),
                nemo.shapes(nemo_config.Settings(kind, config), 64),
            )
            model = dataclasses.replace(model, config=config, variables=variables)
        made[kind] = model
    return made


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers", minversion="5.0")


def assert_same(got, want):
    got, want = (tree.flatten(x) for x in (got, want))
    assert got.keys() == want.keys()
    for path, array in want.items():
        assert got[path].dtype == array.dtype and got[path].shape == array.shape, path
        assert got[path].tobytes() == array.tobytes(), path


def edit(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        target = content[section] if section else content
        target.pop(name, None) if value is None else target.update({name: value})
    path.write_text(json.dumps(content))


# ---- both ways -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_bit_for_bit(models, tmp_path, kind):
    hf_parakeet.write(tmp_path, models[kind])
    assert hf_parakeet.is_parakeet(tmp_path) and not hf_parakeet.is_parakeet(tmp_path / "x")
    again = hf_parakeet.read(tmp_path)
    assert again.kind == kind
    assert_same(again.variables, models[kind].variables)
    assert again.config == models[kind].config and again.tokenizer == models[kind].tokenizer
    count = "encoder.layers.0.conv.batch_norm.num_batches_tracked"
    assert again.buffers[count] == 7
    nemo.write(tmp_path / "a.nemo", again)  # and on to NeMo
    assert_same(nemo.read(tmp_path / "a.nemo").variables, models[kind].variables)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_written_strictly(transformers, models, tmp_path, kind):
    hf_parakeet.write(tmp_path, models[kind])
    load = getattr(transformers, hf_parakeet.CLASSES[kind]).from_pretrained
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = safetensors_file.read(tmp_path / "model.safetensors")
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert tensor.numpy().tobytes() == np.ascontiguousarray(state[key]).tobytes(), key
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.pad_token_id == 64
    inputs = processor([np.zeros(4000, np.float32)], sampling_rate=16000)
    assert inputs["input_features"].shape == (1, 26, 80)
    loaded.generate(**inputs, **({} if kind == "ctc" else {"max_new_tokens": 5}))


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saved_is_read(transformers, models, tmp_path, kind):
    hf_parakeet.write(tmp_path, models[kind])
    load = getattr(transformers, hf_parakeet.CLASSES[kind]).from_pretrained
    load(tmp_path).save_pretrained(tmp_path / "again")
    transformers.AutoProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.model").exists()
    edit(tmp_path / "again" / "config.json", jasr=None)
    model = hf_parakeet.read(tmp_path / "again")
    assert_same(model.variables, models[kind].variables)
    assert model.config["front_end"] == {**models[kind].config["front_end"], "dither": 0.0}
    ours, theirs = (text.from_dict(m.tokenizer) for m in (models[kind], model))
    for sentence in ("the man", "Is it so?", "we  saw, 'then'"):
        assert theirs.encode(sentence) == ours.encode(sentence)
    assert theirs.decode(ours.encode("the man")) == "the man"


def test_transformers_encodes_and_transcribes_as_nemo(transformers, shared_dir, tmp_path):
    torch = pytest.importorskip("torch")
    folder = shared_dir / "goldens" / "nemo"
    hf_parakeet.write(tmp_path, nemo.read(folder / "tiny_ctc.nemo"))
    loaded = transformers.ParakeetForCTC.from_pretrained(tmp_path).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    texts = json.loads((folder / "tiny_ctc.json").read_text())["transcribe"]
    texts = [t["text"] if isinstance(t, dict) else t for t in texts]
    with np.load(folder / "tiny_ctc.npz") as z:
        mel, length = torch.from_numpy(z["mel"]).transpose(1, 2), torch.from_numpy(z["mel_len"])
        want, want_len = z["encoded"].transpose(0, 2, 1), z["encoded_len"]
        audio = [row[:n] for row, n in zip(z["audio"], z["audio_len"])]
    mask = torch.arange(mel.shape[1])[None] < length[:, None]
    with torch.no_grad():
        got = loaded.encoder(mel, attention_mask=mask).last_hidden_state.numpy()
        ids = loaded.generate(**processor(audio, sampling_rate=16000))
    for row in range(len(want)):
        n = want_len[row]
        np.testing.assert_allclose(got[row, :n], want[row, :n], atol=1e-5)
    assert [t.strip() for t in processor.batch_decode(ids, skip_special_tokens=True)] == texts


# ---- live models ---------------------------------------------------------------------------------

BLANK, DURATIONS = 64, (0, 1, 2, 3, 4)
MEL_LEN = np.array([400, 331], np.int32)
TOKENS, TOKEN_LEN = np.array([[5, 9, 9, 2, 30], [7, 1, 63, 64, 64]]), np.array([5, 3], np.int32)
# Compiled with little optimisation: these programs run once.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def mel():
    frames = np.random.default_rng(0).standard_normal((2, 400, 80), dtype=np.float32)
    return np.where(np.arange(400)[:, None] < MEL_LEN[:, None, None], frames, 0)


def initialised(transformers, model, folder, kind):
    """A model as transformers initialises it, in a directory that has all but weights.

    Its head is made to say blanks, labels and durations, but 0 seldom: `generate` has no limit for
    that. The table's row of the blank is 0, as in all of NeMo's models.
    """
    import torch

    hf_parakeet.write(folder, model)
    cls = getattr(transformers, hf_parakeet.CLASSES[kind])
    torch.manual_seed(0)
    theirs = cls(cls.config_class.from_pretrained(folder)).eval()
    theirs.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    if kind != "ctc":
        with torch.no_grad():
            for module in (theirs.decoder, theirs.joint):
                for p in module.parameters():
                    p.normal_(0, 0.4)
            theirs.decoder.embedding.weight[BLANK] = 0
            # an untrained encoder's frames are nearly the same: only how they differ counts here
            frames = theirs.encoder(torch.tensor(mel())).last_hidden_state.flatten(0, 1)
            project = theirs.encoder_projector
            project.weight *= 2 / (frames @ project.weight.T).std(0).mean()
            project.bias.copy_(-project.weight @ frames.mean(0))
            theirs.joint.head.bias[BLANK] += 8 if kind == "tdt" else 16
            theirs.joint.head.bias[BLANK + 1 : BLANK + 2] -= 10
    theirs.save_pretrained(folder)
    return theirs


def jasrs_side(task, variables):
    """(loss, logits, what was decoded) and the gradients, reduced as transformers does it."""
    kind, run = task.config.kind, task.model.apply
    rows = jnp.where(jnp.asarray(TOKENS) == BLANK, 0, jnp.asarray(TOKENS)), TOKEN_LEN

    def total(params):
        both = {**variables, "params": params}
        x, length = run(both, mel(), MEL_LEN, method="encode")
        if kind == "ctc":
            logits = run(both, x, method="ctc_logits")
            loss = ctc_loss(logits, length, *rows, blank=BLANK)[0]
            return jnp.sum(loss), (logits, ctc_greedy(logits, length, blank=BLANK))
        enc, pred, kernel, bias = parts = run(both, x, rows[0], method="joint_parts")
        logits = jax.nn.relu(enc[:, :, None] + pred[:, None]) @ kernel + bias
        score, durations = rnnt_loss, None
        if kind == "tdt":
            score, durations = functools.partial(tdt_loss, durations=DURATIONS), DURATIONS
        loss = score(*parts, length, *rows, blank=BLANK)[0]
        method = functools.partial(functools.partial, run, both)
        steps = Steps(
            method(method="step"), method(method="initial_state"), method(method="joint_output")
        )
        found = greedy(enc, length, steps, blank=BLANK, durations=durations)
        if kind == "tdt":
            return jnp.mean(loss / TOKEN_LEN), (logits, found)
        return jnp.sum(loss) / TOKEN_LEN.sum(), (logits, found)

    return jit(jax.value_and_grad(total, has_aux=True))(variables["params"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_model_has_the_same_logits_loss_gradients_and_transcripts(
    transformers, models, tmp_path, kind
):
    import torch

    theirs = initialised(transformers, models[kind], tmp_path, kind)
    task, variables, _ = loading.load(tmp_path)
    (loss, (logits, found)), grads = jasrs_side(task, variables)
    mask = torch.arange(400)[None] < torch.tensor(MEL_LEN)[:, None]
    given = dict(input_features=torch.tensor(mel()), attention_mask=mask)
    scored = kind != "rnnt" or importlib.util.find_spec("torchaudio") is not None
    fed = dict(given, labels=torch.tensor(TOKENS)) if scored else dict(given)
    if kind != "ctc":
        # the labels after a start, which is a blank
        before = np.pad(TOKENS, ((0, 0), (1, 0)), constant_values=BLANK)
        fed["decoder_input_ids"] = torch.tensor(before)
        fed["output_attention_mask"] = True
    out = theirs(**fed)
    length = [-(-n // 8) for n in MEL_LEN.tolist()]
    for row, n in enumerate(length):
        want = out.logits[row, :n].detach().numpy()
        last = 1 + TOKEN_LEN[row] if kind != "ctc" else None
        got, want = (x[:, :last] if last else x for x in (np.asarray(logits)[row, :n], want))
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert decoded(theirs, given, length, kind) == ours_decoded(found, kind)
    if not scored:  # their RNN-T loss is torchaudio's
        return
    np.testing.assert_allclose(loss, float(out.loss), rtol=1e-5)
    out.loss.backward()
    with torch.no_grad():  # gradients are read as weights are
        for p in theirs.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    theirs.save_pretrained(tmp_path)
    wanted = tree.flatten(hf_parakeet.read(tmp_path).variables["params"])
    for path, got in tree.flatten(grads).items():
        got, want = np.array(got), np.array(wanted[path])
        if path.endswith("embedding"):
            got[BLANK] = want[BLANK] = 0  # transformers gives the row of zeros a gradient
        limit = 1e-4 * np.abs(want).max() + 1e-6  # biases of keys have none
        np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=path)


def decoded(theirs, given, length, kind):
    """[(ids, first frames)] of transformers' `generate`, with both blanks and labels among it."""
    out = theirs.generate(**given)
    rows = []
    for row, n in enumerate(length):
        if kind == "ctc":
            ids = out[row, :n].numpy()
            begins = np.flatnonzero((np.diff(ids, prepend=-1) != 0) & (ids != BLANK))
            assert 0 < len(begins) < n
        else:
            ids = out.sequences[row].numpy()
            begins = (out.durations.cumsum(1) - out.durations)[row].numpy()
            inside = begins < n
            kept = inside & (ids != BLANK)
            assert 0 < np.sum(kept) < np.sum(inside) - 1  # the first is the start, a blank
            ids, begins = ids[kept], begins[kept]
        rows.append(((ids[begins] if kind == "ctc" else ids).tolist(), begins.tolist()))
    return rows


def ours_decoded(found, kind):
    if kind == "ctc":
        tokens, count, begins = found[:3]
    else:
        tokens, count, begins = (found[k] for k in ("tokens", "token_len", "start_frame"))
    tokens, begins = np.asarray(tokens), np.asarray(begins)
    return [(tokens[r, :n].tolist(), begins[r, :n].tolist()) for r, n in enumerate(count)]


# ---- what does not fit ---------------------------------------------------------------------------


def test_what_transformers_does_not_have_is_listed(models, tmp_path):
    model = models["tdt"]
    config = {
        **model.config,
        "front_end": {**model.config["front_end"], "kind": "nemo_legacy", "pad_to": 16},
        "encoder": {**model.config["encoder"], "conv_norm_type": "layer_norm",
                    "att_context_size": (8, 8), "masked_subsampling": False},
        "joint": {**model.config["joint"], "joint_hidden": 40},
        "loss": {**model.config["loss"], "durations": (0, 1, 2, 4, 8)},
    }  # fmt: skip
    with pytest.raises(HfError) as error:
        hf_parakeet.write(tmp_path / "out", dataclasses.replace(model, config=config))
    for reason in (
        "front_end.kind 'nemo_legacy'",
        "front_end.pad_to 16",
        "encoder.conv_norm_type 'layer_norm'",
        "encoder.att_context_size (8, 8)",
        "encoder.masked_subsampling False",
        "what NeMo before 2.5 computed there (convert --modern_front_end replaces it)",
        "decoder.pred_hidden 48 other than joint.joint_hidden 40",
        "loss.durations (0, 1, 2, 4, 8)",
    ):
        assert reason in str(error.value)
    with pytest.raises(HfError, match="'hybrid', of which convert --branch=transducer"):
        hf_parakeet.write(tmp_path / "out", dataclasses.replace(model, kind="hybrid"))
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing_and_one_that_works_replaces_files(models, tmp_path):
    model = models["ctc"]
    pieces = nemo.sentencepiece(model)
    clash = (*pieces.pieces[:-2], Piece.of("<pad>"), Piece.of("<blank>"))
    tokenizer = text.SentencePieceTokenizer(pieces.with_pieces(clash).to_bytes()).to_dict()
    with pytest.raises(TokenizerError, match="'<blank>'"):
        hf_parakeet.write(tmp_path / "out", dataclasses.replace(model, tokenizer=tokenizer))
    assert not list(tmp_path.iterdir())
    hf_parakeet.write(tmp_path / "out", model)
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    (tmp_path / "out" / "README.md").write_text("of its owner")
    (tmp_path / "out" / "config.json").write_text("{")
    hf_parakeet.write(tmp_path / "out", model)
    assert hf_parakeet.read(tmp_path / "out").kind == "ctc"
    assert (tmp_path / "out" / "README.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "usual"]


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"model_type": "parakeet_encoder"}, "'parakeet_encoder' is not a Parakeet"),
        ("config.json", {"vocab_size": None}, "no vocab_size"),
        ("config.json", {"vocab_size": 66, "pad_token_id": 65}, "the tokenizer has 64 pieces"),
        ("config.json", {"encoder_config": None}, "encoder_config is None, not a mapping"),
        ("config.json", {"encoder_config__hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("config.json", {"encoder_config__convolution_bias": False}, "convolution_bias is False"),
        ("config.json", {"encoder_config__intermediate_size": 100}, "intermediate_size is 100"),
        ("config.json", {"encoder_config__num_hidden_layers": 10**9}, "n_layers is 1000000000"),
        ("config.json", {"encoder_config__num_hidden_layers": 3}, "the weights have 2 layers"),
        ("config.json", {"jasr": {"encoder": 3}}, "jasr.encoder is 3, not a mapping"),
        ("processor_config.json", {"feature_extractor": None}, "preprocessor_config.json cannot"),
        ("processor_config.json", {"feature_extractor__do_normalize": False}, "do_normalize is F"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(models, tmp_path, file, changes, reason):
    hf_parakeet.write(tmp_path, models["ctc"])
    edit(tmp_path / file, **changes)
    with pytest.raises(HfError) as error:
        hf_parakeet.read(tmp_path)
    assert str(tmp_path) in str(error.value) and reason in str(error.value)


def test_weights_in_several_files_are_read_and_only_from_the_directory(models, tmp_path):
    hf_parakeet.write(tmp_path, models["ctc"])
    state = safetensors_file.read(tmp_path / "model.safetensors")
    state = {key: np.array(value) for key, value in state.items()}
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, held in parts.items():
        safetensors_file.write(tmp_path / part, {name: state[name] for name in held})
    weight_map = {name: part for part, held in parts.items() for name in held}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(hf_parakeet.read(tmp_path).variables, models["ctc"].variables)
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "../a.safetensors"}}))
    with pytest.raises(HfError, match="outside of the directory"):
        hf_parakeet.read(tmp_path)
    for weight_map in ([1], {names[0]: 1}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(HfError, match="weight_map is no mapping"):
            hf_parakeet.read(tmp_path)
    index.unlink()
    with pytest.raises(HfError, match="model.safetensors cannot be read"):
        hf_parakeet.read(tmp_path)
