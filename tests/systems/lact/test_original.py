"""Checkpoints of the original LaCT ASR: imported they give its logits, exported they come back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jasr import checkpoint, settings, tree
from jasr.interop import table, torch_file
from jasr.systems import loading, source
from jasr.systems.lact import original
from jasr.systems.lact.model import BASE, IMPROVED, LactConfig, LactCtc
from jasr.systems.lact.original import LactFileError
from jasr.text import CharTokenizer
from jasr.training import start
from tests.arrays import golden_in

LETTERS = (original.BLANK, *" etaonih")  # nine, as the goldens' CTC head


@pytest.fixture
def golden(request, goldens):
    """Loader of a lact_asr golden: the committed one, else the shared one (skips without)."""
    load = golden_in(goldens, request)
    return lambda name: load(f"lact_asr_{name}")


def config_of(z):
    """The original's config.json of a golden's toy model."""
    chunk = int(z["chunk"])
    return {
        "model_type": "lact_asr",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "n_mels": 8,
        "audio_feature_dim": 80,  # the original ignores it
        "ctc_vocab_size": 32,  # and overrides this one by the data
        "hidden_ratio": None,
        "intermediate_size": 64,
        "audio_encoder_layers": int(z["conv_layers"]),
        "num_attn_heads": int(z["num_attn_heads"]),
        "num_lact_heads": int(z["num_lact_heads"]),
        "attn_qk_norm": bool(z["attn_qk_norm"]),
        "ttt_prenorm": bool(z.get("ttt_prenorm", 0)),
        "w0_w2_low_rank": int(z.get("w0_w2_low_rank", -1)),
        "lact_chunk_size": chunk,
        "window_size": chunk,
        "rope_theta": 500000.0,
        "use_muon": True,
        "max_position_embeddings": 64,
        "fuse_norm": True,
        "dtype": None,
        "_training_notes": {"description": "a note"},
    }


def state_dict(z):
    state = {key[2:]: value for key, value in z.items() if key[:2] in ("p:", "b:")}
    bn = [key.removesuffix("running_var") for key in state if key.endswith("running_var")]
    state |= {f"{key}num_batches_tracked": np.array(7) for key in bn}
    state["model.audio_feature_extractor.positional_encoding.pe"] = np.zeros((1, 64, 32), "f4")
    return state


@pytest.fixture
def run(tmp_path, golden):
    """A run directory of the original, from a golden."""

    def make(name="prenorm_lowrank"):
        z = golden(name)
        saved = {"global_step": 9, "model_state_dict": state_dict(z), "config": config_of(z)}
        torch_file.write(tmp_path / "best_model.pt", saved)
        (tmp_path / "config.json").write_text(json.dumps(config_of(z)))
        original.write_vocabulary(tmp_path / "vocab.txt", LETTERS)
        return tmp_path, z

    return make


def logits(config, variables, z):
    mel = z["mel"].transpose(0, 2, 1)
    lengths = z["input_lengths"].astype(np.int32)
    return jax.jit(LactCtc(config).apply)(variables, mel, lengths)["logits"]


@pytest.mark.parametrize("name", ["prenorm_lowrank", "updates", "noupdate"])
def test_an_imported_model_gives_the_originals_logits(run, name):
    path, z = run(name)
    config, variables, vocabulary = original.read_lact(path)
    assert vocabulary == list(LETTERS) and config.ctc_vocab_size == 9
    # the original's convolutions read the padding, which the golden fills with noise
    config = dataclasses.replace(config, batch_norm="reference")
    error = np.abs(logits(config, variables, z) - z["logits_eval"]).max()
    assert error <= 1e-4 * np.abs(z["logits_eval"]).max()


def test_what_torch_saved_gives_the_same_as_our_writer(run):
    torch = pytest.importorskip("torch")
    path, z = run()
    _, want, _ = original.read_lact(path)
    state = {f"module.{k}": torch.from_numpy(v.copy()) for k, v in state_dict(z).items()}
    torch.save({"state_dict": state}, path / "best_model.pt")  # settings from config.json
    config, got, _ = original.read_lact(path / "best_model.pt")
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
    torch.save(state, path / "bare.pt")
    assert original.read_weights(path / "bare.pt")[0] == config


def test_export_and_import_are_exact_and_the_names_are_the_originals(run, tmp_path):
    path, z = run()
    config, variables, vocabulary = original.read_lact(path)
    written = original.write_lact(tmp_path / "out", config, variables, vocabulary, step=5)
    again = original.read_lact(tmp_path / "out")
    assert again[0] == config and again[2] == vocabulary
    for got, want in zip(jax.tree.leaves(again[1]), jax.tree.leaves(variables), strict=True):
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes()
    state = torch_file.read(written)["model_state_dict"]
    mel = "model.audio_feature_extractor.mel_extractor.mel_spectrogram"
    buffers = {f"{mel}.spectrogram.window", f"{mel}.mel_scale.fb"}
    assert state.keys() == state_dict(z).keys() | buffers
    for key, value in z.items():
        if key[:2] in ("p:", "b:"):
            assert state[key[2:]].tobytes() == value.tobytes(), key


def test_exported_files_load_in_torch(run, tmp_path):
    torch = pytest.importorskip("torch")
    path, z = run()
    written = original.write_lact(tmp_path / "out", *original.read_lact(path))
    state = torch.load(written, weights_only=True)["model_state_dict"]
    for key, value in z.items():
        if key[:2] in ("p:", "b:"):
            assert torch.equal(state[key[2:]], torch.from_numpy(value)), key


def test_exported_buffers_are_the_originals(shared_dir):
    with np.load(shared_dir / "goldens/fast_weights/logmel_frontend.npz") as z:
        buffers = original._buffers(LactConfig(hidden_size=24, max_position_embeddings=4))
        mel = "model.audio_feature_extractor.mel_extractor.mel_spectrogram"
        np.testing.assert_allclose(buffers[f"{mel}.mel_scale.fb"], z["mel_fb"], atol=2e-5)
        np.testing.assert_allclose(buffers[f"{mel}.spectrogram.window"], z["window"], atol=1e-6)


def test_weights_that_do_not_fit_are_all_listed(run):
    path, z = run()
    state = state_dict(z)
    del state["model.norm.weight"]
    state["model.layers.0.attn.extra.weight"] = np.zeros((1, 1), "f4")
    torch_file.write(path / "best_model.pt", {"model_state_dict": state})
    with pytest.raises(table.TableError) as error:
        original.read_lact(path)
    for line in (
        "best_model.pt",
        "- params/model/norm/scale",
        "+ model.layers.0.attn.extra.weight",
    ):
        assert line in str(error.value)


def test_the_original_cannot_hold_what_is_ours(run, tmp_path):
    path, _ = run()
    config, variables, vocabulary = original.read_lact(path)
    ours = LactConfig(**{**settings.to_dict(config), "lact_every": 2, "lact_mode": "bidirectional"})
    with pytest.raises(LactFileError, match="lact_every.*lact_mode"):
        original.write_lact(tmp_path / "out", ours, variables, vocabulary)
    with pytest.raises(LactFileError, match="8 characters for a CTC head of 9"):
        original.write_lact(tmp_path / "out", config, variables, vocabulary[1:])
    del variables["params"]["ctc_head"]
    with pytest.raises(tree.TreeError, match="- params/ctc_head/kernel"):
        original.write_lact(tmp_path / "out", config, variables, vocabulary)
    assert not (tmp_path / "out").exists()


# ---- settings ------------------------------------------------------------------------------------


def test_settings_of_the_original_become_ours():
    base = {**BASE, "ctc_vocab_size": 29}
    shipped = original.export_config(LactConfig(**base)) | {"dtype": None, "vocab_size": 32}
    shipped |= {"intermediate_size": None, "rope_theta": 1000000, "inter_multi": 1}
    assert original.parse_config(shipped, vocab_size=29) == LactConfig(**base)
    improved = LactConfig(**IMPROVED)
    assert original.export_config(improved)["hidden_ratio"] is None
    assert original.parse_config(original.export_config(improved)) == improved
    assert original.parse_config({"window_size": None}).window_size == 0
    causal = LactConfig(lact_mode="causal", lact_chunk_size=128, intermediate_ctc=(3, 6))
    assert original.export_config(causal)["jasr"] == {
        "lact_mode": "causal",
        "intermediate_ctc": (3, 6),
    }
    assert original.parse_config(json.loads(json.dumps(original.export_config(causal)))) == causal
    with pytest.raises(LactFileError, match="jointly"):
        original.parse_config({"use_fused_kernel": True, "use_muon": True})
    with pytest.raises(settings.SettingsError, match="x.json.hidden_size must be int"):
        original.parse_config({"hidden_size": "large"}, "x.json")


def test_the_runs_config_has_the_originals_front_end():
    from jasr import audio
    from jasr.systems.lact.task import CtcTask
    from jasr.text import CharTokenizer

    config = original.reference_config(settings.to_dict(LactConfig()))
    task = CtcTask.build(config, CharTokenizer(original.LIBRISPEECH, "lower"), 1)
    assert task.front_end == audio.HTK and task.config.ctc_vocab_size == 29


def test_a_run_that_reads_the_originals_weights_otherwise_is_refused(run):
    path, _ = run()
    origin = source.resolve(path)
    assert origin["path"] == str(path / "best_model.pt")
    config = original.load_meta(path)["config"]
    paths = tree.flatten(original.shapes(original.read_weights(path)[0])["params"])

    def check(letters=LETTERS, given=(), **model):
        ours = config | {"model": {**config["model"], **model}}
        task = loading.build(ours, CharTokenizer(letters, "lower"))
        start.check_source(origin, start.InitConfig(**dict(given)), task, paths, ours)

    check(dropout=0.1, batch_norm="reference")
    with pytest.raises(start.StartError, match=r"model.rope_theta \(500000.0 -> 10000.0\)"):
        check(rope_theta=1e4)
    reordered = (LETTERS[0], *LETTERS[:0:-1])
    for drop in ({}, {"drop": ("model/norm/.*",)}):
        with pytest.raises(start.StartError, match="tokenizer.vocabulary"):
            check(reordered, drop)
    (path / "vocab.txt").unlink()
    with pytest.raises(LactFileError, match="no vocabulary"):
        check()
    check(reordered, {"drop": ("ctc_head/.*",)})
    (path / "best_model.pt").write_bytes((path / "best_model.pt").read_bytes() + b" ")
    with pytest.raises(checkpoint.CheckpointError, match="checksum changed"):
        source.leaves(origin)


# ---- files ---------------------------------------------------------------------------------------


def test_the_space_is_a_line_of_one_space(tmp_path):
    path = tmp_path / "vocab.txt"
    original.write_vocabulary(path, original.LIBRISPEECH)
    assert path.read_bytes().startswith(b"<blank>\n \ne\nt\n")
    assert original.read_vocabulary(path, 29) == list(original.LIBRISPEECH)
    path.write_bytes(b"\xef\xbb\xbf<blank>\r\n \r\ne\r\n")
    assert original.read_vocabulary(path) == [original.BLANK, " ", "e"]
    path.write_bytes(b"<blank>\n\ne\n")  # trimmed by an editor
    assert original.read_vocabulary(path) == [original.BLANK, " ", "e"]
    (tmp_path / "vocab.json").write_text(json.dumps({" ": 1, original.BLANK: 0, "e": 2}))
    assert original.read_vocabulary(tmp_path / "vocab.json") == [original.BLANK, " ", "e"]


def test_a_vocabulary_of_another_length_is_refused(run):
    path, _ = run()
    (path / "vocab.txt").write_text("".join(f"{c}\n" for c in LETTERS if c != " "))
    with pytest.raises(LactFileError, match=r"vocab.txt has 8 entries.*9 rows.*space is missing"):
        original.read_lact(path)
    for text, message in (("a\nb\n", "no <blank>"), ("<blank>\na\na\n", r"once: \['a'\]")):
        (path / "vocab.txt").write_text(text)
        with pytest.raises(LactFileError, match=message):
            original.read_lact(path)
    original.write_vocabulary(path / "vocab.txt", LETTERS[::-1])
    with pytest.raises(LactFileError, match="<blank> is token 8.*ctc_blank_id is 0"):
        original.read_lact(path)
    (path / "vocab.txt").unlink()
    with pytest.raises(LactFileError, match="no vocabulary.*lact.LIBRISPEECH"):
        original.read_lact(path)
    assert original.read_weights(path)[0].ctc_vocab_size == 9


def test_a_directory_is_recognised_and_its_best_file_taken(tmp_path):
    assert not original.is_lact(tmp_path) and not original.is_lact(tmp_path / "none")
    for name in ("checkpoint-step-90.pt", "checkpoint-step-500.pt"):
        (tmp_path / name).touch()
    assert original.is_lact(tmp_path) and original.is_lact(tmp_path / name)
    assert original.find_weights(tmp_path).name == "checkpoint-step-500.pt"
    for name in ("latest_checkpoint.pt", "best_model.pt"):
        (tmp_path / name).touch()
        assert original.find_weights(tmp_path).name == name
    with pytest.raises(torch_file.TorchFileError, match="best_model.pt: the file is empty"):
        original.read_lact(tmp_path)
    with pytest.raises(LactFileError, match="no such file"):
        original.read_lact(tmp_path / "none.pt")


def test_missing_settings_and_foreign_files_are_named(run):
    path, z = run()
    torch_file.write(path / "best_model.pt", state_dict(z))
    (path / "config.json").write_text("{")
    with pytest.raises(LactFileError, match="config.json is not JSON"):
        original.read_lact(path)
    for text, what in (("[1]", "it"), ("null", "it"), ('{"jasr": [1]}', '"jasr"')):
        (path / "config.json").write_text(text)
        with pytest.raises(LactFileError, match=f"config.json: {what} is no mapping of settings"):
            original.read_lact(path)
    (path / "config.json").unlink()
    with pytest.raises(LactFileError, match="holds no settings and .*config.json cannot be read"):
        original.read_lact(path)
    torch_file.write(path / "best_model.pt", {"encoder.weight": np.zeros((2, 2), "f4")})
    with pytest.raises(LactFileError, match="no ctc_head.weight"):
        original.read_lact(path)
    torch_file.write(path / "best_model.pt", [1, 2])
    with pytest.raises(LactFileError, match="neither a state_dict"):
        original.read_lact(path)
