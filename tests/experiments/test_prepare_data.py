"""Corpora in the layouts in which they are distributed become manifests and Shar."""

import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile

from experiments import prepare_data
from experiments.prepare import recipes
from experiments.prepare.manifest import make, to_shar
from jasr.data import DataConfig, index
from tests.corpora import layout, make_corpus, noise, write_lines


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def samples_of(manifest, entry):
    samples, rate = soundfile.read(manifest.parent / entry["audio_filepath"], dtype="int16")
    assert rate == 16000
    return samples


AN4 = {  # identifier -> transcript, as CMU writes them
    "train": {
        "an251-fash-b": "<s> YES </s>",
        "an253-fash-b": "<s> GO </s>",
        "cen1-fejs-b": "<s> H I N(2) I C H </s>",
        "an36-mmap-b": "<s> RUBOUT ++NOISE++ C Y </s>",
    },
    "test": {"an406-fcaw-b": "R E P E A T", "an407-fcaw-b": "E N T E R <sil> SEVEN"},
}


def write_an4(root, kind):
    """The official layout with audio as SPHERE or headerless samples; {identifier: i16[S]}."""
    (root / "etc").mkdir(parents=True)
    audio = {}
    for part, texts in AN4.items():
        folder = "an4_clstk" if part == "train" else "an4test_clstk"
        ids = []
        for n, ident in enumerate(texts):
            speaker = ident.split("-")[1]
            ids.append(f"{folder}/{speaker}/{ident}")
            (root / "wav" / folder / speaker).mkdir(parents=True, exist_ok=True)
            t = np.arange(8000 + 800 * n) / 16000
            audio[ident] = pcm = (9000 * np.sin(2 * np.pi * (300 + n) * t)).astype(np.int16)
            path = root / "wav" / ids[-1]
            if kind == "sph":
                soundfile.write(f"{path}.sph", pcm, 16000, format="NIST")
            else:
                order = ">i2" if kind == "big" else "<i2"
                (path.parent / f"{ident}.raw").write_bytes(pcm.astype(order).tobytes())
        said = "".join(f"{text} ({ident})\n" for ident, text in texts.items())
        (root / "etc" / f"an4_{part}.transcription").write_text(said)
        (root / "etc" / f"an4_{part}.fileids").write_text("\n".join(ids) + "\n")
    return audio


@pytest.mark.parametrize("kind", ["sph", "big", "little"])
def test_an4_becomes_manifests_split_by_speaker(tmp_path, kind):
    audio = write_an4(tmp_path / "an4", kind)
    made = recipes.an4(tmp_path / "an4", tmp_path / "out", ("fejs", "mmap"))
    assert list(made) == ["train", "valid", "test"]
    texts = {name: [e["text"] for e in lines(path)] for name, path in made.items()}
    assert texts == {
        "train": ["yes", "go"],
        "valid": ["h i n i c h", "rubout c y"],
        "test": ["r e p e a t", "e n t e r seven"],
    }
    for path in made.values():
        for e in lines(path):
            ident = e["audio_filepath"].split("/")[-1][:-5]
            assert e["speaker"] == ident.split("-")[1] and e["lang"] == "en"
            np.testing.assert_array_equal(samples_of(path, e), audio[ident])
            assert e["duration"] == len(audio[ident]) / 16000


def test_an4_comes_from_the_archive_too_and_names_missing_files(tmp_path, capsys):
    write_an4(tmp_path / "an4", "sph")
    (tmp_path / "an4/wav/an4_clstk/fash/an253-fash-b.sph").unlink()
    with tarfile.open(tmp_path / "an4_sphere.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "an4", "an4")
    argv = ["an4", str(tmp_path / "an4_sphere.tar.gz"), str(tmp_path / "o")]
    assert prepare_data.main([*argv, "--valid_speakers", "fejs"]) == 0
    assert [len(lines(tmp_path / "o" / f"{s}.jsonl")) for s in ("train", "valid", "test")] == [
        2, 1, 2,
    ]  # fmt: skip
    bad = lines(tmp_path / "o" / "train.jsonl.quarantine.jsonl")
    assert [b["id"] for b in bad] == ["an253-fash-b"] and "no such file" in bad[0]["reason"]
    assert "an253-fash-b" in capsys.readouterr().err


def test_an4_downloads_where_there_is_a_network(tmp_path, monkeypatch):
    write_an4(tmp_path / "an4", "sph")
    with tarfile.open(tmp_path / "an4_sphere.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "an4", "an4")
    monkeypatch.setattr(recipes, "AN4_URL", (tmp_path / "an4_sphere.tar.gz").as_uri())
    (tmp_path / "fetched").mkdir()
    made = recipes.an4(tmp_path / "fetched", tmp_path / "out", ("fejs",), download=True)
    assert len(made) == 3 and (tmp_path / "fetched" / "an4_sphere.tar.gz").exists()


def test_an4_says_what_is_not_an4(tmp_path, capsys):
    assert prepare_data.main(["an4", str(tmp_path), str(tmp_path / "o")]) == 1
    assert "etc/an4_train.transcription is missing" in capsys.readouterr().err
    write_an4(tmp_path / "an4", "sph")
    assert prepare_data.main(["an4", str(tmp_path), str(tmp_path / "o")]) == 1
    assert "no training speaker" in capsys.readouterr().err


def test_the_default_an4_split_is_that_of_the_shared_data(shared_dir):
    speakers = {e["speaker"] for e in lines(shared_dir / "data" / "an4" / "valid.jsonl")}
    assert speakers == set(recipes.AN4_VALID)


def write_librispeech(root):
    """Two parts in the official layout."""
    for part, chapters in {
        "dev-clean": ("84/121123", "84/121550"),
        "test-clean": ("61/70968",),
    }.items():
        for chapter in chapters:
            folder = root / part / chapter
            folder.mkdir(parents=True)
            name, said = chapter.replace("/", "-"), []
            for n in range(2):
                soundfile.write(folder / f"{name}-{n:04d}.flac", noise(0.5 + n / 4, n), 16000)
                said.append(f"{name}-{n:04d} GO ON {'ABC'[n]}\n")
            (folder / f"{name}.trans.txt").write_text("".join(said))


def check_librispeech(out):
    dev = lines(out / "dev-clean.jsonl")
    assert [e["id"] for e in dev] == [f"84-{c}-000{n}" for c in (121123, 121550) for n in (0, 1)]
    assert dev[1]["text"] == "go on b" and dev[1]["speaker"] == "84" and dev[1]["duration"] == 0.75
    cfg = DataConfig()
    listed = index.build(str(out / "dev-clean.jsonl"), layout(cfg), cfg)
    packed = index.build(str(out / "shar" / "dev-clean"), layout(cfg), cfg)
    assert [packed.id(i) for i in range(4)] == [listed.id(i) for i in range(4)]
    assert packed.duration.tolist() == listed.duration.tolist()


def test_librispeech_is_prepared_by_lhotse(tmp_path):
    pytest.importorskip("lhotse")
    write_librispeech(tmp_path / "LibriSpeech")
    argv = ["librispeech", str(tmp_path / "LibriSpeech"), str(tmp_path / "out")]
    assert prepare_data.main(argv) == 0
    check_librispeech(tmp_path / "out")
    assert len(lines(tmp_path / "out" / "test-clean.jsonl")) == 2


def test_librispeech_is_downloaded_by_lhotse(tmp_path, monkeypatch):
    recipe = pytest.importorskip("lhotse.recipes.librispeech")
    write_librispeech(tmp_path / "site" / "LibriSpeech")
    (tmp_path / "site" / "12").mkdir()
    with tarfile.open(tmp_path / "site" / "12" / "dev-clean.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "site" / "LibriSpeech" / "dev-clean", "LibriSpeech/dev-clean")
    defaults = list(recipe.download_librispeech.__defaults__)
    at = next(i for i, d in enumerate(defaults) if str(d).startswith("http") and "openslr" in d)
    defaults[at] = (tmp_path / "site").as_uri()
    monkeypatch.setattr(recipe.download_librispeech, "__defaults__", tuple(defaults))
    recipes.librispeech(tmp_path / "got", tmp_path / "out", ("dev-clean",), download=True)
    check_librispeech(tmp_path / "out")


def test_librispeech_names_damaged_files_and_missing_parts(tmp_path, capsys):
    pytest.importorskip("lhotse")
    write_librispeech(tmp_path / "LibriSpeech")
    argv = ["librispeech", str(tmp_path), str(tmp_path / "out"), "--parts"]
    assert prepare_data.main([*argv, "train-clean-100"]) == 1
    assert "has no part train-clean-100; choose from dev-clean, test-clean" in (
        capsys.readouterr().err
    )
    (tmp_path / "LibriSpeech/dev-clean/84/121123/84-121123-0001.flac").write_bytes(b"fLaC")
    assert prepare_data.main([*argv, "dev-clean"]) == 1
    said = capsys.readouterr().err
    assert "1 damaged files" in said and "84-121123-0001.flac" in said


def test_a_folder_of_audio_with_transcripts_becomes_a_manifest(tmp_path):
    folder = tmp_path / "in"
    for n, (name, text) in enumerate(
        [("a/x.wav", "Hello\nthere"), ("b/y.flac", "GO HOME (y)"), ("z.ogg", "last")]
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, noise(0.5, n, 8000), 8000)
        ext = (".txt", ".trn", ".lab")[n]
        (folder / name).with_suffix(ext).write_text(text)
    soundfile.write(folder / "alone.wav", noise(0.5, 1), 16000)
    (folder / "broken.wav").write_bytes(b"RIFF")
    (folder / "broken.txt").write_text("broken")
    out = make(folder, folder / "m.jsonl", lower=True)
    found = [(e["audio_filepath"], e["text"], e["duration"]) for e in lines(out)]
    want = [("a/x.wav", "hello there", 0.5), ("b/y.flac", "go home", 0.5), ("z.ogg", "last", 0.5)]
    assert found == want
    bad = lines(f"{out}.quarantine.jsonl")
    assert [b["audio"].split("/")[-1] for b in bad] == ["alone.wav", "broken.wav"]
    elsewhere = make(folder, tmp_path / "other" / "m.jsonl")
    assert lines(elsewhere)[0]["audio_filepath"] == str(folder / "a" / "x.wav")


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("t.csv", 'path,speaker,sentence\nx.wav,s1,"go, there"\ny,s2,home\n'),
        ("t.tsv", "client_id\tpath\tsentence\ns1\tx.wav\tgo, there\ns2\ty.wav\thome\n"),
        ("metadata.csv", "x|Go, There.|go, there\ny|Home|home\n"),
        ("bom.csv", '\ufeffpath,sentence\r\nx.wav,"go, there"\r\ny.wav,home\r\nz.wav,gone\r\n'),
    ],
)
def test_a_table_becomes_a_manifest(tmp_path, name, table):
    (tmp_path / "wavs").mkdir()
    for n, file in enumerate(("x.wav", "y.wav")):
        soundfile.write(tmp_path / "wavs" / file, noise(0.25, n), 16000)
    (tmp_path / name).write_text(table, encoding="utf-8", newline="")
    out = tmp_path / "m.jsonl"
    argv = ["manifest", str(tmp_path / name), str(out), "--audio_dir", str(tmp_path / "wavs")]
    assert prepare_data.main(argv) == 0
    found = lines(out)
    assert [e["text"] for e in found] == ["go, there", "home"]
    assert [e["audio_filepath"] for e in found] == ["wavs/x.wav", "wavs/y.wav"]
    if "tsv" in name:
        assert found[0]["client_id"] == "s1"


def test_columns_can_be_named_and_wrong_names_are_refused(tmp_path, capsys):
    soundfile.write(tmp_path / "x.wav", noise(0.25, 1), 16000)
    (tmp_path / "t.csv").write_text("clip,words\nx.wav,go\n")
    argv = ["manifest", str(tmp_path / "t.csv"), str(tmp_path / "m.jsonl"), "--path_column=clip"]
    assert prepare_data.main([*argv, "--text_column=words"]) == 0
    assert lines(tmp_path / "m.jsonl")[0]["text"] == "go"
    assert prepare_data.main([*argv, "--text_column=said"]) == 1
    assert "no column 'said'; it has clip, words" in capsys.readouterr().err


def test_a_manifest_becomes_shar_with_segments_cut_out(tmp_path):
    manifest, entries = make_corpus(tmp_path, 6, seed=3)
    soundfile.write(tmp_path / "long.wav", noise(3.0, 9), 16000)
    part = {"audio_filepath": "long.wav", "offset": 1.0, "duration": 0.5, "text": "part"}
    write_lines(manifest, [part, {"audio_filepath": "none.wav", "text": "a"}], "a")
    argv = ["shar", manifest, str(tmp_path / "out"), "--max_bad_share=0.5", "--shard_size=4"]
    assert prepare_data.main(argv) == 0
    found = index.build(str(tmp_path / "out"), layout(DataConfig()), DataConfig())
    items = [found.item(i) for i in range(7)]
    assert [i.fields["text"] for i in items] == [e["text"] for e in entries] + ["part"]
    assert found.id(6) == "long-00001000" and found.duration[6] == 0.5
    assert items[0].fields["speaker"] == entries[0]["speaker"]
    assert lines(tmp_path / "out.quarantine.jsonl")[0]["reason"] == "missing file"
    again = tmp_path / "again"
    assert to_shar(str(tmp_path / "out"), again) == 7  # Shar to Shar, bytes as they are
    for name in ("recording.000000.tar", "cuts.000000.jsonl.gz"):
        assert (again / name).exists()


def test_errors_are_short_and_name_the_choices(capsys):
    assert prepare_data.main([]) == 0 and "librispeech" in capsys.readouterr().out
    assert prepare_data.main(["an5"]) == 2 and "choose from" in capsys.readouterr().err
    assert prepare_data.main(["manifest", "/nowhere", "/tmp/x.jsonl"]) == 1
    assert "does not exist" in capsys.readouterr().err
    for command in prepare_data.COMMANDS:
        with pytest.raises(SystemExit) as e:
            prepare_data.main([command, "--help"])
        assert e.value.code == 0


def test_help_loads_nothing_slow(root):
    program = (
        "import sys\nfrom experiments import prepare_data\n"
        "try: prepare_data.main(['an4', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'lhotse', 'soundfile', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=root)
