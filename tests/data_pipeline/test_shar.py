"""lhotse's formats are read and written without lhotse; lhotse agrees where it is installed."""

import dataclasses
import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from jasr.data import DataConfig, DataError, index, open_eval, shar
from tests.corpora import layout, make_corpus, noise, texts, write_lines

CFG = DataConfig(batch_duration=6.0, num_buckets=2, num_threads=0, max_bad_share=1.0)


def encoded(samples, kind="FLAC", rate=16000):
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=kind)
    return data.getvalue()


def contents(source, cfg=CFG):
    """{text: audio bytes} of a source."""
    data, found = open_eval(cfg, str(source), layout(cfg)), {}
    for _, batch in data.iterate():
        for i, x, n in zip(batch["index"], batch["audio"], batch["audio_len"], strict=True):
            if i >= 0:
                found[texts(data)[i]] = x[:n].tobytes()
    return found


@pytest.fixture(scope="module")
def written(corpus, tmp_path_factory):
    """(Shar directory of the corpus in shards of 10, its manifest, entries)."""
    manifest, entries = corpus
    folder, out = os.path.dirname(manifest), tmp_path_factory.mktemp("shar") / "train"
    paths = [os.path.join(folder, e["audio_filepath"]) for e in entries]
    items = ((e, open(p, "rb").read()) for e, p in zip(entries, paths, strict=True))
    assert shar.write(out, items, shard_size=10) == len(entries)
    return out, manifest, entries


def test_shar_holds_what_the_manifest_holds(written):
    out, manifest, entries = written
    assert sorted(os.listdir(out)) == sorted(
        f"{field}.{n:06d}.{ext}" for n in range(3) for field, ext in
        (("cuts", "jsonl.gz"), ("recording", "tar"))
    )  # fmt: skip
    assert contents(out) == contents(manifest)
    data = open_eval(CFG, str(out), layout(CFG))
    assert texts(data) == [e["text"] for e in entries]
    np.testing.assert_allclose(data.durations, [e["duration"] for e in entries], atol=1e-4)
    assert data.item(13).fields["speaker"] == entries[13]["speaker"]


def test_lhotse_reads_what_is_written(written):
    lhotse = pytest.importorskip("lhotse")
    out, manifest, entries = written
    cuts = list(lhotse.CutSet.from_shar(in_dir=str(out)))
    assert [c.supervisions[0].text for c in cuts] == [e["text"] for e in entries]
    assert [c.supervisions[0].speaker for c in cuts] == [e["speaker"] for e in entries]
    for cut in cuts[::5]:
        lhotse.qa.validate(cut)
        ours = np.frombuffer(contents(manifest)[cut.supervisions[0].text], np.float32)
        np.testing.assert_array_equal(cut.load_audio()[0], ours)


def test_what_lhotse_writes_is_read(tmp_path):
    lhotse = pytest.importorskip("lhotse")
    from lhotse.shar import SharWriter

    cuts, want = [], {}
    for i in range(5):
        soundfile.write(tmp_path / f"r{i}.wav", noise(2.0, i), 16000)
        recording = lhotse.Recording.from_file(tmp_path / f"r{i}.wav")
        cut = recording.to_cut()
        text = "abcde"[i] * 3
        spoken = {"id": f"s{i}", "recording_id": f"r{i}", "start": 0, "duration": 2.0}
        cut.supervisions = [lhotse.SupervisionSegment(**spoken, text=text)]
        if i == 3:
            cut = cut.truncate(offset=0.5, duration=1.0)
        cuts.append(cut)
        want[text] = cut.load_audio()[0].tobytes()
    cuts = lhotse.CutSet.from_cuts(cuts)
    (tmp_path / "shar").mkdir()
    with SharWriter(str(tmp_path / "shar"), {"recording": "flac"}, shard_size=2) as writer:
        for cut in cuts:
            writer.write(cut)
    assert contents(tmp_path / "shar") == want
    for name in ("cuts.jsonl", "cuts.jsonl.gz"):
        cuts.to_file(tmp_path / name)
        assert contents(tmp_path / name) == want


def test_reading_and_writing_need_neither_lhotse_nor_torch(written, tmp_path):
    program = (
        "import sys\n"
        "sys.modules['lhotse'] = sys.modules['torch'] = None\n"
        "from jasr.data import AudioText, DataConfig, open_eval, shar\n"
        "layout = AudioText(DataConfig(), 16000, lambda text: [1] * len(text))\n"
        f"data = open_eval(DataConfig(), {str(written[0])!r}, layout)\n"
        "assert sum((b['index'] >= 0).sum() for _, b in data.iterate()) == 24\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def cut(ident="c", text="abc", source=None, **change):
    """A lhotse cut as lhotse writes it."""
    sources = [source or {"type": "file", "channels": [0], "source": "a.wav"}]
    recording = {"id": "r", "sources": sources, "sampling_rate": 16000, "num_samples": 32000}
    recording |= {"duration": 2.0, "channel_ids": [0]}
    spoken = {"id": "s", "recording_id": "r", "start": 0.0, "duration": 2.0, "text": text}
    base = {"id": ident, "start": 0.0, "duration": 2.0, "channel": 0, "supervisions": [spoken]}
    return base | {"recording": recording, "type": "MonoCut"} | change


def test_cuts_with_several_supervisions_join_their_texts_in_time(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2.0, 1), 16000)
    both = [{"id": str(i), "start": t, "duration": 1.0, "text": x} for i, (t, x) in
            enumerate([(1.0, "two"), (0.0, "one"), (1.5, None)])]  # fmt: skip
    path = write_lines(tmp_path / "cuts.jsonl", [cut(supervisions=both)])
    assert list(contents(path)) == ["one two"]


def test_a_channel_of_a_recording_is_picked(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2.0, 1, channels=2), 16000)
    two = cut()["recording"] | {"channel_ids": [0, 1]}
    cuts = [cut("x", "left", recording=two), cut("y", "right", recording=two, channel=1)]
    cuts.append(cut("z", "part", recording=two, channel=1, start=0.5, duration=1.0))
    found = contents(write_lines(tmp_path / "cuts.jsonl", cuts))
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert found["left"] == samples[:, 0].tobytes()
    assert found["right"] == samples[:, 1].tobytes()
    assert found["part"] == samples[8000:24000, 1].tobytes()


def test_cuts_that_cannot_be_used_are_quarantined(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2.0, 1), 16000)
    url = {"type": "url", "channels": [0], "source": "https://example.org/a.wav"}
    bad = {
        "cut type not supported": cut("mixed", type="MixedCut"),
        "recording source not supported": cut("url", source=url),
        "missing key": cut("silent", supervisions=[]),
        "text is not a string": cut("number", text=3),
        "start or duration is not a number": cut("when", start="0"),
        "missing file": cut("tar", source={"type": "shar", "channels": [0], "source": ""}),
        "duplicate": cut("again"),
        "duplicate id": cut("ok", start=0.5, duration=1.0),
    }
    path = write_lines(tmp_path / "cuts.jsonl", [cut("ok"), *bad.values(), "{", "7"])
    found = index.build(path, layout(CFG), CFG)
    assert len(found) == 1 and found.id(0) == "ok"
    reasons = [b.reason.split(":")[0] for b in found.bad]
    assert reasons == [*bad, "bad JSON", "bad JSON"]


def test_a_damaged_shard_costs_only_its_damaged_cuts(written, tmp_path):
    out = tmp_path / "shar"
    shutil.copytree(written[0], out)
    tar = out / "recording.000001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    (out / "recording.000002.tar").unlink()
    found = index.build(str(out), layout(CFG), CFG)
    assert 13 <= len(found) <= 16 and len(found) + len(found.bad) == 24
    kinds = {b.reason.split(":")[0] for b in found.bad}
    assert kinds <= {"missing file", "undecodable audio"} and "missing file" in kinds


def test_two_writes_are_the_same_bytes_and_a_failed_one_leaves_the_old(tmp_path):
    item = ({"audio_filepath": "a.flac", "text": "a", "id": "x/1"}, encoded(noise(0.3, 1)))
    for name in ("one", "two"):
        shar.write(tmp_path / name, [item])
    for file in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with pytest.raises(DataError, match="two utterances with the identifier 'x/1'"):
        shar.write(tmp_path / "one", [item, item])
    assert list(contents(tmp_path / "one")) == ["a"]
    (tmp_path / "one" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="other files than Shar"):
        shar.write(tmp_path / "one", [item])
    with pytest.raises(DataError, match="nothing to write"):
        shar.write(tmp_path / "three", [])


@pytest.mark.parametrize("ident", ["/abs", "a/../b", "a/", "x\0y"])
def test_identifiers_that_lhotse_could_not_read_are_refused(tmp_path, ident):
    entry = {"audio_filepath": "a.flac", "text": "a", "id": ident}
    with pytest.raises(DataError, match="cannot name a file"):
        shar.write(tmp_path / "s", [(entry, encoded(noise(0.2, 1)))])


def test_a_cut_is_compressed_json_with_the_extra_fields_as_custom(tmp_path):
    entry = {"audio_filepath": "a.ogg", "text": "a", "lang": "en", "snr": 12.5}
    shar.write(tmp_path / "s", [(entry, encoded(noise(0.3, 1, channels=2), "OGG"))])
    with gzip.open(tmp_path / "s" / "cuts.000000.jsonl.gz", "rt") as f:
        found = json.loads(f.read())
    assert found["type"] == "MultiCut" and found["id"] == "a"
    assert found["supervisions"][0]["custom"] == {"snr": 12.5}
    assert found["supervisions"][0]["language"] == "en"
    assert shar.tar_members(tmp_path / "s" / "recording.000000.tar").keys() == {"a"}
    assert list(contents(tmp_path / "s")) == ["a"]


def test_manifest_and_shar_can_be_mixed(written, tmp_path):
    other, entries = make_corpus(tmp_path, 8, seed=5)
    cfg = dataclasses.replace(CFG, max_bad_share=0.0)
    found = index.build([str(written[0]), other], layout(cfg), cfg)
    assert np.bincount(found.source).tolist() == [24, 8]
