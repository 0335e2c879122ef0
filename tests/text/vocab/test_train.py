"""Tokenizers trained on manifests."""

import json

import pytest

from jasr.data import entries
from jasr.data.config import DataError
from jasr.text.sentencepiece_model import USER_DEFINED, Model, write_directory
from jasr.text.vocab.train import TrainError, train

pytest.importorskip("sentencepiece")


def manifest(path, texts):
    lines = [json.dumps({"audio_filepath": "x.wav", "duration": 1.0, "text": t}) for t in texts]
    path.write_text("\n".join([*lines, '{"text": 3}', ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_trained_on_manifests_as_nemo_trains(tmp_path, kind, capsys):
    texts = ["One  two three four", "five six seven eight", "nine ten eleven twelve"]
    sources = [manifest(tmp_path / f"{i}.jsonl", texts[i:]) for i in range(2)]
    (tmp_path / "more.txt").write_text("zehn elf zwölf\n\n", encoding="utf-8")
    sources.append(tmp_path / "more.txt")
    got = train(entries.texts(sources), 28, kind)
    assert got == Model.from_file(write_directory(tmp_path / "out", got))
    assert got.texts[0] == "<unk>" and "ö" in "".join(got.texts)
    assert not {"<s>", "</s>", "<pad>"} & set(got.texts)
    assert got.kind == kind and len(got.pieces) == 28
    assert got.setting("remove_extra_whitespaces") is False
    assert got.setting("normalizer_name") == "nmt_nfkc"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "tokenizer.model",
        "tokenizer.vocab",
        "vocab.txt",
    ]
    assert "0.jsonl: 1 entries left out" in capsys.readouterr().err
    again = train([*texts, *texts[1:], "zehn elf zwölf"], 28, kind)
    assert again.to_bytes() == got.to_bytes()


def test_lower_case_symbols_and_normalisation_go_into_the_model():
    got = train(["Ja Nein, ja", "JA"], 20, lower_case=True, user_defined_symbols=["<de>"])
    assert got.processor.encode("ja") == got.processor.encode("JA")
    assert got.pieces[1].text == "<de>" and got.pieces[1].type == USER_DEFINED
    got = train(["Ja Nein, ja"], 14, normalisation="lower")
    assert not {"J", "N", ","} & set("".join(got.texts[1:]))


def test_long_sentences_are_not_left_out():
    got = train(["ab " * 3000 + "xyz", "ab"], 12)
    assert "z" in got.texts


def test_sizes_that_cannot_be_are_refused_with_those_that_can():
    texts = ["one two three", "four five six"]
    with pytest.raises(TrainError, match=r"too low: .* need (\d+) pieces") as error:
        train(texts, 5)
    smallest = int(str(error.value).split("need ")[1].split()[0])
    assert len(train(texts, smallest).pieces) == smallest
    with pytest.raises(TrainError, match=r"500 is too high: 2 sentences make at most (\d+)") as e:
        train(texts, 500)
    largest = int(str(e.value).split("at most ")[1].split()[0])
    assert len(train(texts, largest).pieces) == largest
    assert len(train(texts, 500, allow_smaller=True).pieces) == largest


def test_no_text_and_unreadable_sources_are_refused(tmp_path):
    with pytest.raises(TrainError, match="no text"):
        train([" ", ""], 10)
    with pytest.raises(TrainError, match="'word'"):
        train(["a"], 10, "word")
    with pytest.raises(DataError, match="none.jsonl"):
        train(entries.texts(tmp_path / "none.jsonl"), 10)
    with pytest.raises(DataError, match="none.txt"):
        train(entries.texts(tmp_path / "none.txt"), 10)
    (tmp_path / "latin.txt").write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt"):
        train(entries.texts(tmp_path / "latin.txt"), 10)
