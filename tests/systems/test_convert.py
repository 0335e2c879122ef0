"""convert: weights with --like, one head of a hybrid, older front ends, and what it refuses."""

import ml_dtypes
import numpy as np
import pytest

from experiments import convert, evaluate, expand_vocab, transcribe
from jasr import tree
from jasr.interop import nemo_archive, torch_file
from jasr.systems import loading
from jasr.systems.fastconformer import nemo, original
from tests.systems.fastconformer import nemo_models


@pytest.fixture
def archive(goldens, tmp_path):
    return nemo_models.plain(goldens, tmp_path)


@pytest.fixture
def state(archive):
    with nemo_archive.opened(archive) as opened:
        start, size = opened.member(nemo_archive.WEIGHTS)
        saved = torch_file.read(opened.tar, start=start, size=size)
        return {key: np.array(value) for key, value in saved.items()}


def made(goldens, tmp_path, name, **changes):
    """Path of a .nemo of random weights."""
    tokenizer = nemo_models.tokenizer_of(goldens, tmp_path)
    config = {**nemo_models.config_of(goldens, name), **changes}
    path = tmp_path / "made.nemo"
    return nemo_models.build(path, config, nemo_models.state_of(goldens, name), tokenizer)


def run(*args):
    return convert.main(list(map(str, args)))


def refused(capsys, *args):
    """What convert's parser says."""
    with pytest.raises(SystemExit):
        run(*args)
    return capsys.readouterr().err


def assert_same(got, want):
    got, want = tree.flatten(got), tree.flatten(want)
    assert got.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(got[path], array)


def test_weights_alone_become_a_model_with_the_nemo_that_like_names(
    archive, state, tmp_path, capsys
):
    ckpt, like = tmp_path / "step=3.ckpt", f"--like={archive}"
    bias = state["decoder.decoder_layers.0.bias"] + 1
    torch_file.write(ckpt, {"state_dict": {**state, "decoder.decoder_layers.0.bias": bias}})
    assert run(ckpt, tmp_path / "run") == 1
    assert "weights without a config" in (said := capsys.readouterr().err) and "--like=" in said
    assert run(ckpt, tmp_path / "run", like) == 0
    assert run(ckpt, tmp_path / "tuned.nemo", like) == 0
    tuned, base = nemo.read(tmp_path / "tuned.nemo"), nemo.read(archive)
    assert tuned.tokenizer == base.tokenizer and tuned.config == base.config
    np.testing.assert_array_equal(
        tuned.variables["params"]["decoder"]["decoder_layers_0"]["bias"], bias
    )
    assert_same(loading.load(tmp_path / "run")[1], tuned.variables)


def test_a_checkpoint_with_a_config_still_lacks_its_tokenizer(archive, state):
    model = nemo.from_state(state, nemo.read(archive).nemo_config)
    with pytest.raises(nemo.NemoError, match="has no tokenizer.*--like=model.nemo of convert"):
        original.meta_of(model, "a.ckpt")


def test_every_command_takes_like(archive, state, tmp_path, capsys):
    ckpt = tmp_path / "a.ckpt"
    torch_file.write(ckpt, state)
    given = [f"--checkpoint={ckpt}", f"--like={tmp_path / 'gone.nemo'}"]
    (tmp_path / "a.wav").touch()
    for command, args in (
        (transcribe, [str(tmp_path / "a.wav")]),
        (evaluate, ["--manifest=x.jsonl"]),
        (expand_vocab, ["--tokenizer=x.model", f"--output={tmp_path / 'out'}"]),
    ):
        assert command.main([*given, *args]) == 1
        assert "gone.nemo cannot be read: No such file" in capsys.readouterr().err
    assert run(archive, tmp_path / "x", f"--like={archive}") == 1
    assert "has its own config; --like is for a .ckpt" in capsys.readouterr().err


def test_one_head_of_a_hybrid_is_exported(goldens, tmp_path, capsys):
    path = made(goldens, tmp_path, "hybrid_tdt")
    assert run(path, tmp_path / "x_hf") == 1
    assert "--branch=transducer or --branch=ctc" in capsys.readouterr().err
    assert run(path, tmp_path / "x_hf", "--branch=ctc") == 0
    assert capsys.readouterr().out.endswith("x_hf: ctc\n")
    assert run(path, tmp_path / "x.nemo", "--branch=transducer") == 0
    params = nemo.read(path).variables["params"]
    head = nemo.read(tmp_path / "x.nemo")
    assert head.kind == "tdt" and "ctc_decoder" not in head.variables["params"]
    assert_same(head.variables["params"]["joint"], params["joint"])
    head = loading.load(str(tmp_path / "x_hf"))[1]["params"]
    assert_same(head["decoder"], params["ctc_decoder"])
    assert run(tmp_path / "x_hf", tmp_path / "y.nemo", "--branch=transducer") == 1
    assert "kind 'ctc' has no branch 'transducer'" in capsys.readouterr().err
    assert "other formats" in refused(capsys, path, tmp_path / "run", "--branch=ctc")


def test_an_older_front_end_is_replaced_where_asked(goldens, tmp_path, capsys):
    path = made(goldens, tmp_path, "ctc", nemo_version="2.4.0")
    assert run(path, tmp_path / "x_hf") == 1
    assert "convert --modern_front_end" in capsys.readouterr().err
    assert run(path, tmp_path / "x_hf", "--modern_front_end") == 0
    said = capsys.readouterr().err
    assert "front_end.kind 'nemo_legacy' -> 'nemo'" in said
    assert "encoder.masked_subsampling False -> True" in said
    assert run(path, tmp_path / "new.nemo", "--modern_front_end") == 0
    new, old = nemo.read(tmp_path / "new.nemo"), nemo.read(path)
    assert new.config["front_end"] == {**old.config["front_end"], "kind": "nemo"}
    assert new.config["encoder"]["masked_subsampling"] is True
    assert_same(new.variables, old.variables)
    assert original.exported(new, modern_front_end=True)[1] == [
        "front end and subsampling are those of NeMo 2.5 already"
    ]


def test_other_precisions_are_noted(archive, state, recwarn):
    config = nemo.read(archive).nemo_config
    assert not recwarn.list
    key = "decoder.decoder_layers.0.bias"
    for dtype, more in ((ml_dtypes.bfloat16, ""), (np.float64, ": 1 of 2 tensors lose digits")):
        other = "encoder.layers.0.norm_out.bias"
        wide = np.full(state[key].shape, 1 / 3)  # no float32
        changed = {key: wide.astype(dtype), other: np.zeros_like(state[other], dtype)}
        with pytest.warns(UserWarning) as noted:
            nemo.from_state({**state, **changed}, config)
        name = np.dtype(dtype).name
        assert [str(w.message) for w in noted] == [
            f"weights of {name} become float32, here and in what is written from them{more}"
        ]


def test_what_convert_cannot_do_is_said_before_it_does_anything(archive, tmp_path, capsys):
    for option in ("--step=7", "--item=ema"):
        assert run(archive, tmp_path / "run", option) == 1
        assert "neither steps nor items" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    assert "full holds files that are no run" in refused(capsys, archive, full)
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]
    assert run(archive, tmp_path / "none" / "x.nemo") == 1
    said = capsys.readouterr().err
    assert "x.nemo cannot be written: there is no folder" in said and "cannot be read" not in said
