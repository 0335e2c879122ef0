"""The transcribe and evaluate commands with a tiny model: what they print, write and return."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import evaluate, transcribe
from jasr import checkpoint, text, tree
from jasr.recognition import report as score
from jasr.recognition.recognizer import Recognizer, from_pretrained
from jasr.systems import loading
from jasr.systems.lact import original
from jasr.systems.lact.model import LactConfig

soundfile = pytest.importorskip("soundfile")
RATE = 16000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with one checkpoint of an untrained model (its text is babble)."""
    from configs import common

    config = common.default()
    config.model.update(
        hidden_size=16,
        num_hidden_layers=2,
        num_attn_heads=2,
        num_lact_heads=2,
        intermediate_size=32,
        subsampling=4,
        lact_mode="bidirectional",
        lact_every=2,
        use_muon=False,
        use_momentum=False,
        positions="none",
        window_size=0,
        initializer_range=0.0,
    )
    config = json.loads(config.to_json())
    tokenizer = text.CharTokenizer.from_texts(["zero one two three four five six"], "lower")
    task = loading.build(config, tokenizer)
    batch = {"audio": np.zeros((1, RATE), np.float32), "audio_len": np.array([RATE], np.int32)}
    meta = {"step": 3, "config": config, "tokenizer": tokenizer.to_dict(), "task": "ctc"}
    path = tmp_path_factory.mktemp("rün")
    store = checkpoint.Checkpoints(path / "checkpoints")
    store.save(3, babbling(jax.eval_shape(task.init, jax.random.key(0), batch)), meta, wait=True)
    store.close()
    return path


def babbling(shapes):
    """Random variables of these shapes, compiling nothing."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        if len(x.shape) > 1:
            return rng.standard_normal(x.shape, np.float32) / np.float32(x.shape[-2] ** 0.5)
        return np.full(x.shape, path.endswith(("scale", "var")), np.float32)

    return tree.unflatten({path: leaf(path, x) for path, x in tree.flatten(shapes).items()})


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Sounds of several kinds, one cut file, one silence, one file that is missing."""
    folder = tmp_path_factory.mktemp("ton är")
    rng = np.random.default_rng(0)

    def noise(seconds, rate=RATE):
        swell = 0.5 + 0.5 * np.sin(np.arange(int(seconds * rate)) / rate * 20)
        return (0.1 * swell * rng.standard_normal(int(seconds * rate))).astype(np.float32)

    soundfile.write(folder / "a.wav", noise(1.2), RATE)
    soundfile.write(folder / "b.flac", np.stack([noise(1.5)] * 2, axis=1), RATE)
    soundfile.write(folder / "c.wav", noise(0.9, 8000), 8000)
    soundfile.write(folder / "silent.wav", np.zeros(RATE, np.float32), RATE)
    soundfile.write(folder / "long.wav", noise(21), RATE)
    (folder / "cut.wav").write_bytes((folder / "a.wav").read_bytes()[:400])
    return folder


def call(run, capsys, *args):
    status = transcribe.main([f"--checkpoint={run}", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json_is_pure_on_standard_output_and_complete(run, recordings, capsys):
    missing = recordings / "missing.wav"
    status, out, err = call(run, capsys, recordings, missing, "--format=json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert [r["audio_filepath"] for r in rows] == [
        *(str(recordings / n) for n in ("a.wav", "b.flac", "c.wav", "cut.wav", "long.wav")),
        str(recordings / "silent.wav"),
        str(missing),
    ]
    for row in rows:
        assert {"audio_filepath", "duration", "text", "words", "warnings"} <= set(row)
        assert row["text"] == " ".join(w["word"] for w in row["words"])
        times = [t for w in row["words"] for t in (w["start"], w["end"])]
        assert times == sorted(times) and all(0 <= t <= row["duration"] for t in times)
    assert [bool(r.get("error")) for r in rows] == [False] * 3 + [True, False, False, True]
    assert "8000 Hz" in rows[2]["warnings"][0]
    assert "cut.wav" in err and "missing.wav" in err and "2 failed" in err


def test_other_formats_leave_bad_files_out_and_fail(run, recordings, capsys):
    status, out, err = call(run, capsys, recordings / "cut.wav", recordings / "a.wav")
    assert status == 1 and "error:" in err
    assert out.startswith(str(recordings / "a.wav")) and out.count("\n") == 1


def test_one_recording_is_one_line_of_text(run, recordings, capsys):
    status, out, _ = call(run, capsys, recordings / "a.wav")
    assert status == 0 and out.endswith("\n") and out.count("\n") == 1 and "\t" not in out


def test_subtitles_of_several_recordings_are_a_file_each(
    run, recordings, capsys, tmp_path, monkeypatch
):
    two = recordings / "a.wav", recordings / "b.flac"
    monkeypatch.chdir(tmp_path)
    status, out, err = call(run, capsys, *two, "--format=srt")
    assert (status, out) == (0, "") and "current directory" in err
    assert sorted(p.name for p in tmp_path.glob("*.srt")) == ["a.srt", "b.srt"]
    status, out, _ = call(run, capsys, *two, "--format=vtt", "--output_dir", tmp_path / "out")
    assert (status, out) == (0, "")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.vtt", "b.vtt"]
    assert (tmp_path / "out" / "a.vtt").read_text().startswith("WEBVTT\n\n")


def test_times_that_a_model_does_not_have_are_refused_with_those_it_has(run, recordings, capsys):
    argv = [recordings / "a.wav", "--format=json", "--timestamps=other"]
    status, out, err = call(run, capsys, *argv)
    assert (status, out) == (1, "") and "timestamps 'other': this model has none" in err
    with pytest.raises(SystemExit, match="2"):
        call(run, capsys, recordings / "a.wav", "--timestamps=other")
    assert "add --format=json" in capsys.readouterr().err


def test_ctm_holds_several_recordings(run, recordings, capsys):
    status, out, _ = call(
        run, capsys, recordings / "a.wav", recordings / "long.wav", "--format=ctm"
    )
    assert status == 0
    names = set()
    for line in out.splitlines():
        name, channel, start, duration, _ = re.fullmatch(
            r"(\S+) (\d) (\d+\.\d+) (\d+\.\d+) (\S+)", line
        ).groups()
        names.add(name)
    assert names == {"a", "long"}


def test_a_folder_without_recordings_and_a_missing_checkpoint_are_errors(tmp_path, capsys):
    status, out, err = call(tmp_path, capsys, tmp_path)
    assert (status, out) == (1, "") and "no recordings" in err
    soundfile.write(tmp_path / "a.wav", np.zeros(10, np.float32), RATE)
    status, out, err = call(tmp_path / "nowhere", capsys, tmp_path / "a.wav")
    assert (status, out) == (1, "") and "nowhere" in err


@pytest.mark.parametrize("args", [["a.wav"], ["--checkpoint=x"], ["--checkpoint=x", "a", "--fmt"]])
def test_wrong_usage_exits_with_2(args, capsys):
    with pytest.raises(SystemExit, match="2"):
        transcribe.main(args)


def test_batch_mates_and_windows_change_no_text_and_no_time(run, recordings):
    model = from_pretrained(run)
    paths = sorted(recordings.glob("[abc].*"))
    together = model.transcribe([*paths, recordings / "long.wav"])
    alone = [model.transcribe(p) for p in paths]
    assert [(r["text"], r["words"]) for r in together[:3]] == [
        (r["text"], r["words"]) for r in alone
    ]
    programs = len(model.programs)
    model.transcribe([*paths, recordings / "long.wav"])
    assert len(model.programs) == programs


def test_models_of_the_original_transcribe(tmp_path, recordings, capsys):
    vocabulary = (text.BLANK, *" etaoinhsr")
    config = LactConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attn_heads=2,
        num_lact_heads=2,
        intermediate_size=32,
        audio_encoder_layers=1,
        ctc_vocab_size=len(vocabulary),
    )
    original.write_lact(tmp_path, config, babbling(original.shapes(config)), vocabulary)
    status, out, err = call(tmp_path, capsys, recordings / "a.wav", "--format=json")
    row = json.loads(out)
    assert status == 0, err
    assert row["text"] and set(row["text"]) <= set(vocabulary[1:])


@pytest.fixture(scope="module")
def manifest(root):
    return root / "tests" / "data" / "valid.jsonl"


def test_evaluate_prints_rates_and_writes_every_utterance(run, manifest, tmp_path, capsys):
    report, lines = tmp_path / "eval.json", tmp_path / "predictions.jsonl"
    args = [f"--checkpoint={run}", f"--manifest={manifest}", f"--output={report}"]
    status = evaluate.main([*args, f"--predictions={lines}", "--label=unseen voices"])
    out = capsys.readouterr().out.splitlines()
    found = json.loads(report.read_text())
    n = len(manifest.read_text().splitlines())
    assert status == 0
    assert re.fullmatch(rf"WER \d+\.\d\d % on {n} utterances of unseen voices", out[-1])
    assert found["num_utterances"] == len(found["utterances"]) == n
    assert found["wer"] == sum(u["word_errors"] for u in found["utterances"]) / found["words"]
    assert sum(b["utterances"] for b in found["by_duration"]) == n
    assert found["updates_per_utterance"] == 1.0 and found["real_time_factor"] > 0
    assert found["step"] == 3 and found["left_out"] == []
    assert found["window"] == from_pretrained(run).windows.length / RATE and found["cut"] == 0
    predictions = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [p["hyp"] for p in predictions] == [u["hyp"] for u in found["utterances"]]
    # Ablated weights and a comparison with the first report, on the same utterances.
    ablated = [*args[:2], "--lact_updates=no_branch", "--window=1", f"--baseline={report}"]
    assert evaluate.main([*ablated, f"--output={tmp_path / 'b.json'}"]) == 0
    out = capsys.readouterr().out
    again = json.loads((tmp_path / "b.json").read_text())
    assert "points" in out and f"{again['cut']} utterances are longer than 1 s" in out
    assert again["cut"] == sum(u["duration"] > 1 for u in found["utterances"]) > 0
    assert again["updates_per_utterance"] == 0.0 and again["lact_updates"] == "no_branch"
    assert set(again["baseline"]) == {"file", "difference", "low", "high", "p_better"}


def test_evaluation_is_the_transcription_of_the_files(run, manifest):
    task, variables, meta = loading.load(run)
    report = score.evaluate(task, variables, str(manifest), meta=meta, limit=3)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][:3]
    model = Recognizer(task, variables, meta=meta)
    results = model.transcribe([manifest.parent / r["audio_filepath"] for r in rows])
    assert [u["hyp"] for u in report["utterances"]] == [r["text"] for r in results]
    assert [u["ref"] for u in report["utterances"]] == [r["text"] for r in rows]


def test_evaluation_says_what_is_wrong(run, tmp_path, capsys):
    args = [f"--checkpoint={run}", f"--manifest={tmp_path / 'none.jsonl'}"]
    assert evaluate.main(args) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "none.jsonl" in captured.err
    (tmp_path / "other.json").write_text("[]")
    assert evaluate.main([*args, f"--baseline={tmp_path / 'other.json'}"]) == 1
    assert "other.json is not a report" in capsys.readouterr().err


def test_reports_of_different_utterances_are_not_compared():
    one = score.score(["a b"], ["a"], [1.0])
    one["utterances"][0]["id"] = "x"
    other = {"utterances": [{**one["utterances"][0], "id": "y"}]}
    with pytest.raises(ValueError, match="different utterances"):
        score.compare(one, other)
    assert score.compare(one, one)["difference"] == 0.0


def test_normalisation_is_applied_to_both_sides():
    report = score.score(["It's NINE!"], ["it's nine"], [1.0], "lower")
    assert report["wer"] == 0.0
    assert score.last_line(report) == "WER 0.00 % on 1 utterances"


@pytest.mark.parametrize("name", ["transcribe", "evaluate"])
def test_help_loads_nothing_heavy(name, root):
    heavy = "jax torch transformers lhotse scipy soundfile jiwer grain sentencepiece numpy"
    program = f"""
import sys
from experiments import {name}
try:
    {name}.main(["--help"])
except SystemExit as e:
    assert e.code == 0
print([m for m in {heavy.split()} if m in sys.modules], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert ran.stderr.strip() == "[]", ran.stderr
    assert "--checkpoint" in ran.stdout
