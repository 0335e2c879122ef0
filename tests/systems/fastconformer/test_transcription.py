"""NeMo's recognisers through transcription: beams, branches, NeMo's timestamps, local attention,
recordings of any length and kind."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import evaluate, transcribe
from jasr import settings as settings_lib
from jasr import tree
from jasr.models.fastconformer.encoder import FastConformer, FastConformerConfig
from jasr.recognition.recognizer import Recognizer, from_pretrained, trained_seconds
from jasr.systems import catalogue, loading
from jasr.systems.fastconformer import nemo, nemo_config, original, task, times
from jasr.systems.fastconformer import options as options_lib
from tests.experiments.test_cli import babbling
from tests.recognition import test_recognizer
from tests.recognition.test_recognizer import coded, sentence
from tests.systems.fastconformer import nemo_models
from tests.systems.fastconformer.test_task import RATE, TOKENIZER, batch, config

soundfile = pytest.importorskip("soundfile")
OPTIONS = dict(window=2.0, overlap=0.5, batch_seconds=8.0, timestamps="nemo")


def muted(variables):
    """Variables with which only blanks are decoded."""
    flat = tree.flatten(variables["params"])
    bias = np.array(flat["joint/joint_net/bias"])
    bias[TOKENIZER.blank_id] += 100
    params = tree.unflatten({**flat, "joint/joint_net/bias": bias})
    return {**variables, "params": params}


@pytest.fixture(scope="module")
def babble():
    """(config, task, variables) of a tiny TDT model that says something everywhere."""
    settings = config("tdt")
    task = loading.build(settings, TOKENIZER)
    return settings, task, babbling(jax.eval_shape(task.init, jax.random.key(0), batch()))


@pytest.fixture(scope="module")
def model(babble):
    _, task, variables = babble
    return Recognizer(task, variables, **OPTIONS)


def noise(seconds, seed=0):
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (0.1 * samples).astype(np.float32)


def heard(result):
    return result["text"], result["words"], result["timestamp"]


def test_batch_mates_change_nothing_and_programs_are_few(model):
    recordings = [noise(s, n) for n, s in enumerate((1.0, 7.0, 0.3, 1.9, 0.05, 2.0))]
    together = model.transcribe(recordings)
    assert [heard(r) for r in together] == [heard(model.transcribe(x)) for x in recordings]
    assert set(model.programs) == {(1, 2 * RATE), (4, 2 * RATE)}
    long = together[1]
    assert len(long["words"]) > 3 and long["duration"] == 7.0
    assert long["coverage"] == {"windows": 5, "seconds": 7.0, "uncovered": []}
    starts = [w["start"] for w in long["words"]]
    assert starts == sorted(starts) and all(w["start"] <= w["end"] <= 7 for w in long["words"])
    hull = long["words"][0]["start"], long["words"][-1]["end"]
    assert (long["segments"][0]["start"], long["segments"][-1]["end"]) == hull
    assert " ".join(s["segment"] for s in long["segments"]) == long["text"]


def test_recordings_without_speech_or_of_milliseconds_give_a_result_or_a_reason(
    babble, model, tmp_path
):
    _, task, variables = babble
    mute = Recognizer(task, muted(variables), **OPTIONS)
    mute.programs = model.programs
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0, np.float32), RATE)
    late = np.concatenate([np.zeros(RATE, np.float32), noise(0.5)])
    recordings = [np.zeros(RATE, np.float32), noise(0.01), noise(0.003), late, empty]
    with pytest.warns(UserWarning, match="empty.wav"):
        results = mute.transcribe(recordings), model.transcribe(recordings)
    for silence, ten_ms, three_ms, delayed, nothing in results:
        assert silence["text"] or "silent" in silence["warnings"][0]
        assert ten_ms["coverage"]["uncovered"] == []
        assert three_ms["text"] == "" and three_ms["coverage"]["uncovered"] == [[0.0, 0.003]]
        assert three_ms["warnings"][0] == "nothing was decoded between 0.000 and 0.003 s"
        assert delayed["text"] or "no words found although 0.5 s" in delayed["warnings"][0]
        assert nothing["error"] and nothing["coverage"]["windows"] == 0
    assert [r["text"] for r in results[0]] == [""] * 5 and results[1][3]["text"]


class Durations(test_recognizer.Levels):
    """A perfect TDT: the tokens of `Levels` with durations; `full` stops at the last one."""

    full = False

    @property
    def verbs(self):
        decoder = super().verbs["transcribe"]
        extras = {"nemo": self.timestamps}
        changed = dataclasses.replace(decoder, columns=("durations",), totals={}, extras=extras)
        return {"transcribe": changed}

    def decode(self, variables, batch):
        out = super().decode(variables, batch)
        out |= {"durations": out["end_frame"] - out["start_frame"], "logit_len": out["heard"]}
        return {
            **out,
            "heard": task.heard({**out, "full": batch["audio_len"] < self.full * 10**9}),
        }

    @staticmethod
    def timestamps(tokens, start_frame, end_frame, durations, *, meta):
        return times.timestamps(
            "tdt", tokens, start_frame, end_frame, test_recognizer.TOKENIZER, durations=durations,
            window_stride=0.04, subsampling=1,
        )  # fmt: skip


def test_nemos_timestamps_of_windows_are_those_of_the_whole():
    samples = coded(sentence(0, 1500))
    whole, cut = (
        Recognizer(Durations(), {}, window=window, timestamps="nemo").transcribe(samples)
        for window in (100.0, 8.0)
    )
    assert whole["coverage"]["windows"] == 1 and cut["coverage"]["windows"] > 9
    assert heard(cut) == heard(whole)


def test_a_row_without_room_for_more_tokens_is_reported():
    task = Durations()
    task.full = True
    result = Recognizer(task, {}).transcribe(coded([0, 2, 0, 3, *[0] * 21]))
    assert result["coverage"] == {"windows": 1, "seconds": 0.16, "uncovered": [[0.16, 1.0]]}
    assert result["warnings"][0] == "nothing was decoded between 0.160 and 1.000 s"


@pytest.mark.parametrize(
    "kind, options",
    [("tdt", {"attention": "local"}), ("rnnt", {"beam": 2})],
)
def test_texts_and_timestamps_are_nemos(shared_dir, kind, options):
    folder = shared_dir / "goldens" / "nemo"
    golden = folder / f"tiny_{kind}.nemo"
    model = from_pretrained(golden, timestamps="nemo", **options)
    results = model.transcribe([folder / "wav" / f"utt{n}.wav" for n in (0, 1)])
    assert model.windows.length == (600 if kind == "tdt" else 40) * RATE
    want = json.loads((folder / f"tiny_{kind}.json").read_text("utf-8"))["transcribe_timestamps"]
    for got, hypothesis in zip(results, want, strict=True):
        assert got["text"] == hypothesis["text"]
        assert got["timestamp"] == hypothesis["timestamp"]
        assert got["coverage"]["uncovered"] == []


@pytest.mark.parametrize("tied", [False, True])
def test_local_attention_has_the_weights_of_attention_over_all(tied):
    c = FastConformerConfig(
        feat_in=8, n_layers=2, d_model=8, n_heads=2, subsampling_factor=2,
        subsampling_conv_channels=2, conv_kernel_size=3, untie_biases=not tied,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    mel, length = rng.standard_normal((2, 600, 8), np.float32), np.array([600, 411])
    shapes = jax.eval_shape(FastConformer(c).init, jax.random.key(0), mel, length)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(np.float32), shapes)
    want, lengths = FastConformer(c).apply(variables, mel, length)
    for context, same in (((299, 299), True), ((20, 20), False)):
        local = locally(c, context)
        got, _ = FastConformer(local).apply(variables, mel, length)
        worst = max(np.abs(got[b, :n] - want[b, :n]).max() for b, n in enumerate(lengths))
        assert bool(worst < 1e-5) == same


def locally(encoder, context):
    """The encoder's settings as --attention=local changes them."""
    given = {"kind": "ctc", "encoder": settings_lib.to_dict(encoder)}
    asked = {"attention": "local", "att_context": context}
    changed = catalogue.with_options({"task": "fastconformer", "model": given}, asked)
    return settings_lib.build(FastConformerConfig, changed["model"]["encoder"])


def test_local_attention_of_other_encoders_is_refused():
    for change, why in (
        ({"self_attention_model": "abs_pos"}, "absolute positions"),
        ({"att_context_style": "chunked_limited", "att_context_size": (6, 2)}, "in chunks"),
    ):
        with pytest.raises(ValueError, match=why):
            locally(FastConformerConfig(**change), (4, 4))


def test_options_that_a_model_does_not_have_are_refused(babble):
    tdt, ctc, hybrid = (config(kind) for kind in ("tdt", "ctc", "hybrid"))
    asked = catalogue.with_options
    for other, options, why in (
        (tdt, {"branch": "ctc"}, "no hybrid"),
        (ctc, {"branch": "transducer"}, "no hybrid"),
        (ctc, {"beam": 4}, "CTC is greedy"),
        (hybrid, {"beam": 4, "branch": "ctc"}, "CTC is greedy"),
        (tdt, {"att_context": (4, 4)}, "of attention 'local'"),
        (tdt, {"attention": "band"}, "choose full or local"),
        (asked(tdt, {"attention": "local"}), {"attention": "full"}, "was trained"),
        (tdt, {"lact_updates": "off"}, "lact_updates: options of lact models; this one is of fast"),
        (tdt, {"bema": 4}, "bema: no option of any model"),
    ):
        with pytest.raises(ValueError, match=why):
            asked(other, options)
    assert loading.build(asked(hybrid, {"branch": "ctc"}), TOKENIZER).decodes == "ctc"
    wide = asked(tdt, {"beam": 4})
    assert wide["decoding"]["strategy"] == "beam" and wide["decoding"]["beam"] == 4
    assert asked(wide, {"beam": 1})["decoding"]["strategy"] == "greedy_batch"
    for changes, why in (
        ({"decoding__strategy": "beam", "kind": "ctc"}, "is a transducer's"),
        ({"decoding__strategy": "alsd"}, "config.decoding.strategy must be one of .* got 'alsd'"),
        ({"decoding__branch": "ctc"}, "has no CTC"),
        ({"decoding__beam": 0}, "beam must be at least 1"),
    ):
        with pytest.raises(ValueError, match=why):
            loading.build(config(changes.pop("kind", "tdt"), **changes), TOKENIZER)
    for text in ("128", "128,-1", "a,b", "99999999999,5"):
        with pytest.raises(ValueError, match="--att_context"):
            options_lib.context(text)
    assert options_lib.context("64,32") == (64, 32)


def test_commands_take_the_options_and_report_what_was_covered(babble, tmp_path, capsys):
    settings, _, variables = babble
    run, recording = tmp_path / "run", tmp_path / "a.wav"
    loading.save(run, {"config": settings, "tokenizer": TOKENIZER.to_dict()}, variables)
    soundfile.write(recording, noise(0.8), RATE)
    given = [f"--checkpoint={run}", "--beam=2", "--window=2"]
    asked = [*given, str(recording), "--format=json", "--timestamps=nemo"]
    assert transcribe.main(asked) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert row["coverage"] == {"windows": 1, "seconds": 0.8, "uncovered": []}
    assert row["text"] and list(row["timestamp"]) == ["timestep", "char", "word", "segment"]
    assert "nothing left undecoded by 1 windows" in captured.err
    rows = {"audio_filepath": str(recording), "duration": 0.8, "text": "abba"}
    (tmp_path / "valid.jsonl").write_text(json.dumps(rows) + "\n")
    report = tmp_path / "report.json"
    manifest = f"--manifest={tmp_path / 'valid.jsonl'}"
    assert evaluate.main([*given, manifest, f"--output={report}"]) == 0
    found = json.loads(report.read_text())
    assert found["beam"] == 2 and found["utterances"][0]["hyp"] == row["text"]
    assert transcribe.main([f"--checkpoint={run}", "--branch=ctc", str(recording)]) == 1
    assert "error: branch 'ctc': a model of kind 'tdt' is no hybrid" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        transcribe.main([*given, str(recording), "--format=srt", "--timestamps=nemo"])
    for flag in ("--window=-5", "--window=nan", "--overlap=inf"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*given, manifest, flag])
        with pytest.raises(SystemExit, match="2"):
            transcribe.main([*given, str(recording), flag])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*given, manifest, "--limit=-2"])
    assert transcribe.main([f"--checkpoint={run}", "--beam=0", str(recording)]) == 1
    (tmp_path / "valid.jsonl").write_text(json.dumps({**rows, "text": " "}) + "\n")
    capsys.readouterr()
    assert evaluate.main([*given, manifest]) == 1
    assert "without a word: nothing to score" in capsys.readouterr().err


def run_decoding(config):
    """What a run's config.decoding is made of a NeMo config."""
    settings, _ = nemo_config.parse(config)
    model = nemo.NemoModel(settings.kind, settings.sections, None, {}, config)
    return original.run_config(model)["decoding"], settings


def test_a_nemo_configs_beam_search_is_taken_and_written_back(goldens, recwarn):
    theirs = nemo_models.config_of(goldens, "tdt")
    theirs["joint"]["num_classes"] = theirs["decoder"]["vocab_size"] = 64
    assert run_decoding(theirs)[0] == {"strategy": "greedy_batch", "max_symbols": 10}
    theirs["decoding"]["strategy"] = "maes"
    how, settings = run_decoding(theirs)
    numbers = {"beam": 2, "expansion_gamma": 2.3, "length_normalised": True}
    assert how == {"strategy": "beam", "max_symbols": 10, **numbers} and not recwarn.list
    settings.sections["decoding"] = {**how, "beam": 8}
    back = nemo_config.write(settings, ["x"] * 64, theirs)["decoding"]
    assert back["strategy"] == "maes" and back["beam"]["beam_size"] == 8


def test_what_is_decoded_otherwise_than_in_nemo_is_noted(goldens):
    tdt, ctc = (nemo_models.config_of(goldens, kind) for kind in ("tdt", "ctc"))
    tdt["joint"]["num_classes"] = tdt["decoder"]["vocab_size"] = 64
    for theirs, strategy, note, ours in (
        (tdt, "malsd_batch", "a beam search like 'maes'", "beam"),
        (tdt, "psychic", "'psychic' is not known", None),
        (ctc, "pyctcdecode", "of a CTC model: decoded greedily", None),
    ):
        theirs["decoding"]["strategy"] = strategy
        with pytest.warns(UserWarning, match=note):
            assert run_decoding(theirs)[0].get("strategy") == ours
    tdt["decoding"] |= {"strategy": "greedy", "greedy": {"ngram_lm_model": "lm.arpa"}}
    with pytest.warns(UserWarning, match="language model or phrases"):
        run_decoding(tdt)


def test_the_window_is_what_the_model_was_trained_on():
    decoder = loading.build(config("ctc"), TOKENIZER).verbs["transcribe"]

    def window(meta):
        return decoder.window(meta, trained_seconds(meta))

    assert window({}) == 20
    assert window({"nemo": {"config": {"train_ds": {"max_duration": 40}}}}) == 40
    recipe = {"model": {"train_ds": {"max_duration": 200.0}}}
    assert window({"nemo": {"config": recipe}}) == 60
    assert window({"nemo": {"config": {"train_ds": None}}}) == 20
    assert window({"longest_seconds": 12.5, "nemo": {"config": recipe}}) == 12.5
    longest = {"longest": {"samples": 100000, "tokens": 9}}
    assert window({**longest, "config": {"data": {"sample_rate": 8000}}}) == 12.5
