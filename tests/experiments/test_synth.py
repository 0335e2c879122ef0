"""The synthetic corpus: its plan, its audio, and the minute of it that is committed."""

import importlib.util
import json
import os
import time

import numpy as np
import pytest

from experiments.prepare import espeak, synth

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra [tts]"
)


def entries(manifest):
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_plan_is_a_function_of_set_size_and_seed():
    assert synth.plan("train", 50, 3) == synth.plan("train", 50, 3)
    assert synth.plan("train", 50, 3) != synth.plan("train", 50, 4)
    assert synth.plan("valid", 50, 3) != synth.plan("accents", 50, 3)


def test_sets_share_no_string_and_no_voice_that_is_to_be_unseen():
    train, valid, accents = (synth.plan(name, 400, 0) for name in ("train", "valid", "accents"))

    def variants(says):
        return {say.voice.split("+")[1] for say in says}

    def accent(says):
        return {say.voice.split("+")[0] for say in says}

    assert not variants(train) & variants(valid)
    assert accent(train) == accent(valid)
    assert not accent(train) & accent(accents)
    assert not {say.text for say in train} & {say.text for say in valid + accents}


def test_every_voice_speaks_about_equally_often():
    says = synth.plan("train", 250, 1)
    counts = {voice: 0 for voice in {say.voice for say in says}}
    for say in says:
        counts[say.voice] += 1
    assert len(counts) == len(synth.TRAIN_ACCENTS) * len(synth.TRAIN_VARIANTS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_strings_keep_to_the_vocabulary_lengths_rates_and_pitches():
    for say in synth.plan("valid", 200, 5):
        words = say.text.split(" ")
        assert set(words) <= set(synth.WORDS)
        assert synth.NUM_WORDS[0] <= len(words) <= synth.NUM_WORDS[1]
        assert synth.WORD_RATE[0] <= say.rate <= synth.WORD_RATE[1]
        assert synth.PITCH[0] <= say.pitch <= synth.PITCH[1]


@needs_espeak
def test_two_corpora_are_the_same_bytes(tmp_path):
    sizes = {"num_train": 60, "num_valid": 5, "num_accents": 5, "seed": 7, "shar": False}
    synth.write_corpus(tmp_path / "a", **sizes)
    time.sleep(1.1)  # espeak-ng would seed its breath noise by the second
    synth.write_corpus(tmp_path / "b", **sizes)
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert len(a) == 60 + 5 + 5 + 3
    assert a == b


@needs_espeak
def test_manifests_describe_the_files(tmp_path):
    import soundfile

    manifests = synth.write_corpus(
        tmp_path, num_train=6, num_valid=3, num_accents=0, seed=2, shar=False
    )
    assert list(manifests) == ["train", "valid"]
    for name, manifest in manifests.items():
        rows, says = entries(manifest), synth.plan(name, len(entries(manifest)), 2)
        assert [row["text"] for row in rows] == [say.text for say in says]
        assert [row["speaker"] for row in rows] == [say.voice for say in says]
        for row in rows:
            info = soundfile.info(tmp_path / row["audio_filepath"])
            assert (info.samplerate, info.channels) == (16000, 1)
            assert info.frames == row["duration"] * 16000
            audio, _ = soundfile.read(tmp_path / row["audio_filepath"])
            assert np.abs(audio).max() == pytest.approx(0.5, abs=2e-3)
            assert 0.2 < info.duration / len(row["text"].split()) < 1.0


@needs_espeak
def test_a_voice_or_a_variant_that_does_not_exist_raises():
    for voice in ("xx", "en-us+nobody"):
        with pytest.raises(espeak.EspeakError, match=voice.replace("+", r"\+")):
            espeak.speak([espeak.Say("one", voice, 150, 50)])


@needs_espeak
def test_espeak_data_on_a_long_path_is_found(tmp_path, monkeypatch):
    import espeakng_loader

    deep = tmp_path.joinpath(*["a folder with quite a long name"] * 6)
    deep.mkdir(parents=True)
    (deep / "data").symlink_to(espeakng_loader.get_data_path())
    (tmp_path / "espeakng_loader.py").write_text(
        f"def get_library_path(): return {str(espeakng_loader.get_library_path())!r}\n"
        f"def get_data_path(): return {str(deep / 'data')!r}\n"
    )
    say = espeak.Say("one two", "en-us+f3", 150, 50)
    usual = espeak.speak([say])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert espeak.speak([say]) == usual


def test_without_espeak_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(espeak.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(espeak.EspeakError, match=r"jasr\[tts\]"):
        espeak.speak([espeak.Say("one", "en", 150, 50)])


def test_a_set_that_fails_leaves_no_manifest(tmp_path, monkeypatch):
    def fail(says):
        raise espeak.EspeakError("stopped")

    monkeypatch.setattr(espeak, "speak", fail)
    with pytest.raises(espeak.EspeakError):
        synth.write_corpus(tmp_path, num_train=2, num_valid=0, num_accents=0, shar=False)
    assert not (tmp_path / "train.jsonl").exists()


def test_waveform_is_at_16_khz_and_half_of_full_scale():
    t = np.arange(espeak.SAMPLE_RATE) / espeak.SAMPLE_RATE
    pcm = (3000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16).tobytes()
    audio = synth.waveform(pcm, np.random.default_rng(0))
    assert audio.dtype == np.float32 and len(audio) == 16000 + 2 * 1600
    assert np.abs(audio).max() == pytest.approx(0.5, abs=2e-3)
    assert np.abs(np.fft.rfft(audio[1600:-1600])).argmax() == 440
    margins = np.concatenate([audio[:1600], audio[-1600:]])
    assert 1e-4 < margins.std() < 3e-4


@needs_espeak
def test_shar_holds_the_same_utterances(tmp_path):
    from jasr.data import shar

    manifest = synth.write_corpus(tmp_path, num_train=5, num_valid=0, num_accents=0)["train"]
    cuts = [line.values for line in shar.shar_lines(str(tmp_path / "shar" / "train"))]
    rows = entries(manifest)
    assert [cut["text"] for cut in cuts] == [row["text"] for row in rows]
    assert [cut["audio_filepath"].seconds for cut in cuts] == pytest.approx(
        [row["duration"] for row in rows]
    )


def test_committed_sample_is_small_and_matches_its_plan(root):
    import soundfile

    folder = root / "tests" / "data"
    assert sum(os.path.getsize(p) for p in folder.rglob("*") if p.is_file()) < 1.5e6
    for name, count in (("train", 16), ("valid", 8)):
        rows = entries(folder / f"{name}.jsonl")
        says = synth.plan(name, count, 0)
        assert [(r["text"], r["speaker"]) for r in rows] == [(s.text, s.voice) for s in says]
        for row in rows:
            info = soundfile.info(folder / row["audio_filepath"])
            assert info.samplerate == 16000 and info.frames == row["duration"] * 16000


def test_quickstart_recipe_knows_every_letter_of_the_corpus():
    from configs import quickstart

    config = quickstart.get_config()
    assert set(config.text.vocabulary) == set(" ".join(synth.WORDS))
    assert config.data.concat_duration > 0 and config.data.num_buckets == 1
