"""Tokenizers and normalisation."""

import io
import json

import pytest

from jasr import text
from jasr.decoding.ctc import words
from jasr.text import CharTokenizer, SentencePieceTokenizer, TextError, normalise

TEXTS = ["it's nine nine", "seven"]


def test_lower_keeps_words_and_apostrophes_only():
    assert normalise("  It's\tNINE, nine--(ok)!\n", "lower") == "it's nine nineok"
    assert normalise("It\u2019s \u2018so\u2019", "lower") == "it's so"


def test_lower_keeps_combining_marks_of_other_scripts():
    assert normalise("नमस्ते, आप!", "lower") == "नमस्ते आप"


def test_none_only_tidies_whitespace():
    assert normalise(" A,\u00a0b \r\n", "none") == "A, b"


def test_unknown_normalisation_and_non_text_are_refused():
    with pytest.raises(TextError, match="no normalisation 'upper'"):
        normalise("a", "upper")
    with pytest.raises(TextError, match="NoneType"):
        normalise(None, "lower")


def test_whisper_english_uses_the_map_of_spellings(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    path = tmp_path / "normalizer.json"
    path.write_text(json.dumps({"colour": "color"}))
    monkeypatch.setenv("JASR_SPELLINGS", str(path))
    text.whisper_english.cache_clear()
    got = normalise("Mr. Brown's 3 dogs, it's colour!", "whisper_english")
    text.whisper_english.cache_clear()
    assert got == "mister brown is 3 dogs it is color"


def test_whisper_english_says_that_the_map_is_missing(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("jasr.text.tokenizers.spellings_file", lambda: None)
    text.whisper_english.cache_clear()
    with pytest.warns(UserWarning, match="British spellings"):
        assert normalise("Uh, it's colour", "whisper_english") == "it is colour"
    text.whisper_english.cache_clear()


def test_vocabulary_is_the_blank_then_characters_by_frequency():
    tokenizer = CharTokenizer.from_texts(["Bee!", "bA e"], normalisation="lower")
    assert tokenizer.vocabulary == ("<blank>", "e", "b", " ", "a")
    assert tokenizer.blank_id == 0 and tokenizer.vocab_size == 5


def test_vocabulary_does_not_depend_on_the_order_of_texts():
    assert CharTokenizer.from_texts(TEXTS) == CharTokenizer.from_texts(TEXTS[::-1])


def test_char_texts_come_back():
    tokenizer = CharTokenizer.from_texts(TEXTS)
    for line in TEXTS:
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_blank_may_stand_anywhere():
    tokenizer = CharTokenizer(("a", "b", "<blank>"))
    assert tokenizer.blank_id == 2
    assert tokenizer.decode([0, 2, 1]) == "ab"


def test_unknown_characters_are_named():
    with pytest.raises(TextError, match=r"'q' \(U\+0071\), 'é' \(U\+00E9\)"):
        CharTokenizer.from_texts(TEXTS).encode("séq")


def test_bad_vocabularies_are_refused():
    with pytest.raises(TextError, match="<blank>"):
        CharTokenizer(("<blank>", "a", "<blank>"))
    with pytest.raises(TextError, match="'a'"):
        CharTokenizer(("<blank>", "a", "a"))
    with pytest.raises(TextError, match="no normalisation"):
        CharTokenizer(("<blank>", "a"), "uper")


def test_characters_without_a_blank_are_tokens_too():
    plain = CharTokenizer((" ", "a", "b"))
    assert plain.encode("ab a") == [1, 2, 0, 1] and plain.decode([1, 2, 0, 1]) == "ab a"
    assert plain.vocab_size == 3 and plain.blank_id == -1
    assert plain.with_blank().vocabulary == ("<blank>", " ", "a", "b")
    assert plain.with_blank().with_blank().without_blank() == plain
    assert text.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain


def test_char_tokenizer_survives_json():
    tokenizer = CharTokenizer.from_texts(TEXTS, normalisation="lower")
    assert text.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_unknown_kind_of_tokenizer_is_refused():
    with pytest.raises(TextError, match="'wordpiece'"):
        text.from_dict({"kind": "wordpiece"})


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four five six seven eight nine"] * 20),
        model_writer=model,
        vocab_size=24,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue(), "lower")


def test_sentencepiece_texts_come_back_and_blank_is_the_last_id(sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer
    ids = tokenizer.encode("Seven, nine")
    assert tokenizer.decode(ids) == "seven nine"
    assert tokenizer.blank_id == tokenizer.vocab_size - 1 not in ids
    assert tokenizer.decode([*ids, tokenizer.blank_id]) == "seven nine"


def test_sentencepiece_survives_json(sentencepiece_tokenizer):
    again = text.from_dict(json.loads(json.dumps(sentencepiece_tokenizer.to_dict())))
    assert again == sentencepiece_tokenizer
    assert again.encode("one") == sentencepiece_tokenizer.encode("one")


def test_sentencepiece_names_what_it_does_not_know(sentencepiece_tokenizer):
    with pytest.raises(TextError, match="ü"):
        sentencepiece_tokenizer.encode("one ü")


def test_sentencepiece_words_begin_at_the_word_mark(sentencepiece_tokenizer):
    ids = sentencepiece_tokenizer.encode("one seven nine")
    assert len(ids) > 3
    found = words(sentencepiece_tokenizer, ids, range(len(ids)), range(1, len(ids) + 1), 1.0)
    assert [w["word"] for w in found] == ["one", "seven", "nine"]
    assert found[-1]["end"] == len(ids)


def test_what_is_no_sentencepiece_model_is_refused(tmp_path):
    pytest.importorskip("sentencepiece")
    with pytest.raises(TextError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"rubbish").vocab_size  # noqa: B018
    with pytest.raises(TextError, match="missing.model"):
        SentencePieceTokenizer.from_file(tmp_path / "missing.model")


def test_sentencepiece_without_a_blank_has_the_pieces_alone(sentencepiece_tokenizer):
    with_one, plain = sentencepiece_tokenizer, sentencepiece_tokenizer.without_blank()
    ids = plain.encode("Seven, nine")
    assert ids == with_one.encode("Seven, nine") and plain.decode(ids) == "seven nine"
    assert plain.vocab_size == with_one.vocab_size - 1 == 24 and plain.blank_id == -1
    assert [plain.piece(i) for i in range(24)] == [with_one.piece(i) for i in range(24)]
    assert plain.with_blank() == with_one and "blank" not in with_one.to_dict()
    assert text.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
