"""NeMo's models through the commands: transcribe, convert, expand, train, and back to .nemo."""

import json

import numpy as np
import pytest

from configs import common
from experiments import convert, expand_vocab, train_tokenizer, transcribe
from experiments import train as training
from jasr import checkpoint, tree
from jasr.systems import loading
from jasr.systems.fastconformer import nemo
from jasr.text.sentencepiece_model import Model

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def archive(root):
    """A .nemo that NeMo wrote, with random weights overfitted to two sentences."""
    return str(root / "tests" / "goldens" / "nemo" / "archives" / "tiny_ctc_gzip.nemo")


def texts(capsys, *args):
    assert transcribe.main([*map(str, args), "--format=json"]) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def test_original_run_archive_and_hugging_face_directory_hold_the_same_model(
    archive, root, tmp_path, capsys
):
    recording = next((root / "tests" / "data" / "valid").glob("*.flac"))
    want = texts(capsys, f"--checkpoint={archive}", recording)
    run, again, folder = tmp_path / "run", tmp_path / "again.nemo", tmp_path / "model_hf"
    for source, target in ((archive, run), (run, again), (run, folder)):
        assert convert.main([str(source), str(target)]) == 0
    capsys.readouterr()
    old, new = nemo.state_dict(nemo.read(archive)), nemo.state_dict(nemo.read(str(again)))
    assert old.keys() == new.keys()
    for key in old:
        np.testing.assert_array_equal(old[key], new[key])
    _, from_folder, _ = loading.load(str(folder))
    flat = tree.flatten(nemo.read(archive).variables)
    for path, array in tree.flatten(from_folder).items():
        np.testing.assert_array_equal(array, flat[path])
    assert texts(capsys, f"--checkpoint={again}", recording) == want
    assert convert.main([archive, str(run)]) == 1  # a run is never written over
    assert "holds a run already" in capsys.readouterr().err


def test_an_expanded_vocabulary_changes_no_transcript(archive, root, tmp_path, capsys):
    recording = next((root / "tests" / "data" / "valid").glob("*.flac"))
    want = texts(capsys, f"--checkpoint={archive}", recording)
    (tmp_path / "hindi.txt").write_text("एक दो तीन चार\nदो एक चार\n" * 5, encoding="utf-8")
    arguments = [str(tmp_path / "hindi.txt"), "--vocab_size=16", f"--output={tmp_path / 'hi'}"]
    assert train_tokenizer.main([*arguments, "--allow_smaller", "--normalisation=none"]) == 0
    model, output = tmp_path / "hi" / "tokenizer.model", tmp_path / "both"
    command = [f"--checkpoint={archive}", f"--tokenizer={model}", f"--output={output}"]
    assert expand_vocab.main(command) == 0
    assert "appended" in capsys.readouterr().out
    assert texts(capsys, f"--checkpoint={output}", recording) == want
    before, after = (loading.load(p)[0].tokenizer for p in (archive, str(output)))
    assert after.vocab_size > before.vocab_size
    assert after.decode(after.encode("एक दो")) == "एक दो"
    other = Model.from_file(model).with_settings(remove_extra_whitespaces=True)
    (tmp_path / "other.model").write_bytes(other.to_bytes())
    command[1:] = [f"--tokenizer={tmp_path / 'other.model'}", f"--output={tmp_path / 'other'}"]
    capsys.readouterr()
    assert expand_vocab.main(command) == 1
    said = capsys.readouterr().err
    assert "remove_extra_whitespaces" in said and "--allow_other_normalizer" in said
    assert expand_vocab.main([*command, "--allow_other_normalizer"]) == 0
    assert "normalised as in the base: remove_extra_whitespaces" in capsys.readouterr().out
    assert loading.load(str(tmp_path / "other"))[0].tokenizer == after
    exported = tmp_path / "both.nemo"
    assert convert.main([str(output), str(exported)]) == 0
    capsys.readouterr()
    assert texts(capsys, f"--checkpoint={exported}", recording) == want


@pytest.mark.parametrize(
    "flag", ["scores=below", "keep_base_characters", "allow_other_normalizer", "texts=a.txt"]
)
def test_replacing_a_vocabulary_refuses_the_flags_of_merging(flag, capsys):
    command = ["--checkpoint=none.nemo", "--tokenizer=none.model", "--output=none", "--replace"]
    with pytest.raises(SystemExit):
        expand_vocab.main([*command, f"--{flag}"])
    assert f"--{flag.split('=')[0]} is about merging" in capsys.readouterr().err


def test_a_tokenizer_that_lower_cases_reads_capitals(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Ja nein, ja\nJa, nein\n", encoding="utf-8")
    command = [
        str(tmp_path / "a.txt"),
        "--vocab_size=12",
        "--allow_smaller",
        "--normalisation=none",
    ]
    for name, flags in (("cased", []), ("lower", ["--lower_case"])):
        assert train_tokenizer.main([*command, f"--output={tmp_path / name}", *flags]) == 0
    cased, lower = (Model.from_file(tmp_path / name) for name in ("cased", "lower"))
    assert lower.setting("normalizer_name") == "nmt_nfkc_cf"
    assert lower.processor.encode("JA NEIN") == lower.processor.encode("ja nein")
    assert 0 not in lower.processor.encode("JA NEIN")
    assert 0 in cased.processor.encode("JA NEIN")  # N is unknown to it


def test_init_is_short_for_the_path_of_the_weights_to_start_from():
    argv = ["train", "--config=x.py:tdt", "--config.init=runs/a", "--config.init.item=ema"]
    want = ["train", "--config=x.py:tdt", "--config.init.path=runs/a", "--config.init.item=ema"]
    assert training.written_out(argv) == want


def test_a_hybrid_trains_resumes_and_becomes_a_nemo_archive(root, tmp_path, capsys):
    data = root / "tests" / "data"
    folder = tmp_path / "tokenizer"
    assert (
        train_tokenizer.main([str(data / "train.jsonl"), "--vocab_size=24", f"--output={folder}"])
        == 0
    )
    config = common.default("parakeet")
    config.data.update(train=(str(data / "train.jsonl"),), valid=(str(data / "valid.jsonl"),))
    config.data.update(bucket_duration_bins=(4.0,), bucket_batch_size=(8,), num_threads=1)
    config.text.update(kind="sentencepiece", path=str(folder / "tokenizer.model"))
    config.model.kind = "hybrid"
    config.model.encoder.update(
        n_layers=1, d_model=16, n_heads=2, subsampling_conv_channels=4, conv_kernel_size=3
    )
    config.model.decoder.pred_hidden = config.model.joint.joint_hidden = 8
    config.optim.update(schedule="constant", warmup_steps=0)
    config.train.update(steps=2, log_every=1, eval_every=2)

    def losses(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}

    plain = json.loads(config.to_json())
    training.train(plain, tmp_path / "whole")
    first = {**plain, "train": {**plain["train"], "steps": 1}}
    training.train(first, tmp_path / "parts")
    training.train(plain, tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (checkpoint.load_params(tmp_path / name) for name in ("whole", "parts"))
    for path, array in tree.flatten(whole).items():
        np.testing.assert_array_equal(array, tree.flatten(parts)[path])

    assert convert.main([str(tmp_path / "whole"), str(tmp_path / "x.nemo")]) == 0
    capsys.readouterr()
    model = nemo.read(str(tmp_path / "x.nemo"))
    assert model.kind == "hybrid" and model.config["loss"]["durations"] == (0, 1, 2, 3, 4)
    recording = next((data / "valid").glob("*.flac"))
    both = [
        texts(capsys, f"--checkpoint={tmp_path / name}", recording) for name in ("whole", "x.nemo")
    ]
    assert both[0] == both[1]
