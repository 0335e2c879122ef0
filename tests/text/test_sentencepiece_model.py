"""SentencePiece files against sentencepiece itself, NeMo's directories, and damaged bytes."""

import io
import lzma
import struct

import numpy as np
import pytest

from jasr.text import sentencepiece_model as spm
from jasr.text.sentencepiece_model import Field, Model, ModelError, Piece

TEXTS = ["one two three four five six", "seven eight nine ten eleven twelve"] * 5

VARIANTS = {
    "bpe": dict(model_type="bpe", bos_id=-1, eos_id=-1, vocab_size=30),
    "unigram": dict(model_type="unigram", vocab_size=30, hard_vocab_limit=False),
    "bytes": dict(model_type="bpe", byte_fallback=True, vocab_size=300),
    "symbols": dict(
        model_type="unigram",
        user_defined_symbols=["<hi>", "▁ok"],
        control_symbols=["<ctl>"],
        pad_id=3,
        vocab_size=40,
        hard_vocab_limit=False,
    ),
}


@pytest.fixture(scope="module")
def trained():
    """Name -> bytes of a trained model, of every variant."""
    sentencepiece = pytest.importorskip("sentencepiece")
    models = {}
    for name, settings in VARIANTS.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, **settings
        )
        models[name] = model.getvalue()
    return models


@pytest.fixture(scope="module")
def nemo_model(goldens):
    """Bytes of the tokenizer that NeMo trained for its tiny models."""
    return lzma.decompress((goldens / "nemo" / "vocab" / "base.model.xz").read_bytes())


@pytest.mark.parametrize("name", VARIANTS)
def test_trained_models_come_back_byte_for_byte(trained, name):
    model = Model.from_bytes(trained[name])
    assert model.to_bytes() == trained[name]
    assert model.check() is model


@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_are_what_sentencepiece_reads(trained, name):
    model = Model.from_bytes(trained[name])
    processor = model.processor
    ids = range(processor.vocab_size())
    assert model.texts == [processor.id_to_piece(i) for i in ids]
    assert [p.score for p in model.pieces] == [processor.get_score(i) for i in ids]
    for type, holds in (
        (spm.UNKNOWN, processor.is_unknown),
        (spm.CONTROL, processor.is_control),
        (spm.BYTE, processor.is_byte),
    ):
        assert [p.type == type for p in model.pieces] == [holds(i) for i in ids]
    assert model.setting("vocab_size") == len(model.pieces)
    assert model.kind == VARIANTS[name]["model_type"]
    assert model.setting("byte_fallback") == ("byte_fallback" in VARIANTS[name])


def test_types_of_special_pieces(trained):
    types = {p.text: p.type for p in Model.from_bytes(trained["symbols"]).pieces}
    assert types["<hi>"] == types["▁ok"] == spm.USER_DEFINED
    assert types["<ctl>"] == types["<pad>"] == types["<s>"] == spm.CONTROL
    assert types["<unk>"] == spm.UNKNOWN


def test_nemo_model_and_its_directory(nemo_model, goldens, tmp_path):
    model = Model.from_bytes(nemo_model)
    assert model.to_bytes() == nemo_model
    assert (model.kind, len(model.pieces)) == ("bpe", 64)
    assert model.setting("normalizer_name") == "nmt_nfkc"
    assert model.setting("remove_extra_whitespaces") is False
    assert model.setting("add_dummy_prefix") is True
    folder = spm.write_directory(tmp_path / "new" / "tokenizer", model)
    golden = goldens / "nemo" / "vocab"
    assert (folder / "tokenizer.model").read_bytes() == nemo_model
    assert (folder / "tokenizer.vocab").read_bytes() == (golden / "base.vocab").read_bytes()
    assert (folder / "vocab.txt").read_bytes() == (golden / "base.vocab.txt").read_bytes()
    assert Model.from_file(folder) == Model.from_file(folder / "tokenizer.model") == model


def test_vocab_files_of_a_unigram_model_are_sentencepieces_own(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        minloglevel=2,
        **VARIANTS["symbols"],
    )
    model = Model.from_file(tmp_path / "m.model")
    assert spm.vocab_tsv(model) == (tmp_path / "m.vocab").read_text(encoding="utf-8")
    lines = spm.vocab_txt(model).splitlines()
    assert not {"<unk>", "##<hi>", "ok", "##<ctl>"} & set(lines)
    assert len(lines) == sum(p.type == spm.NORMAL for p in model.pieces)


def test_what_is_not_understood_is_kept_byte_for_byte(nemo_model):
    extra = (Field(200, 0, 2**63), Field(201, 5, b"abcd"), Field(202, 1, b"12345678"))
    trainer = Field(2, 2, spm.serialise(extra))
    piece = Field(1, 2, spm.serialise((*Piece.of("zzz", -9).fields, *extra)))
    fields = list(spm.parse(nemo_model))
    data = spm.serialise([piece, *fields, trainer, *extra])  # a message may come in two parts
    model = Model.from_bytes(data)
    assert model.to_bytes() == data
    assert model.setting("model_type") == 2
    assert model.pieces[0].with_score(-3.5).fields[-3:] == extra
    changed = model.with_settings(vocab_size=65)
    assert changed.setting("vocab_size") == 65 and changed.setting("model_type") == 2
    assert spm.parse([f.value for f in changed.others if f.number == 2][0])[-3:] == extra
    assert changed.others[-3:] == extra


def test_other_pieces_drop_the_self_test(nemo_model):
    model = Model.from_bytes(nemo_model + spm.serialise([Field(4, 2, b"\x0a\x00")]))
    fewer = model.with_pieces(model.pieces[:-1])
    assert len(fewer.pieces) == fewer.setting("vocab_size") == 63
    assert 4 in [f.number for f in model.others] and 4 not in [f.number for f in fewer.others]
    assert fewer.processor.vocab_size() == 63


def test_settings_replace_and_default():
    model = Model((Piece.of("<unk>", 0, spm.UNKNOWN), Piece.of("a")), ())
    assert model.kind == "unigram" and model.setting("vocab_size") == 8000
    model = model.with_settings(model_type=2, add_dummy_prefix=False, normalizer_name="identity")
    assert model.kind == "bpe" and model.setting("normalizer_name") == "identity"
    assert model.setting("add_dummy_prefix") is False
    assert [f.number for f in model.others] == [2, 3]
    assert Model.from_bytes(model.to_bytes()) == model


def test_scores_are_rounded_to_f32():
    assert Piece.of("a", 0.1).score == np.float32(0.1)
    assert Piece.of("a").with_score(-1e-3) == Piece.of("a", -1e-3)


def test_check_lists_everything():
    pieces = [Piece.of(t) for t in ("a", "b", "a", "", "b")]
    with pytest.raises(ModelError, match=r"'a', 'b'.*empty pieces at ids \[3\].*UNKNOWN"):
        Model(tuple(pieces), ()).check()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="none.model"):
        Model.from_file(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="bad.model: not a SentencePiece model"):
        Model.from_file(tmp_path / "bad.model")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length beyond 64 bits
        b"\x0b\x0c",  # groups
        spm.serialise([Field(1, 2, b"\x0a\x05ab")]),  # a piece that breaks off
        spm.serialise([Field(1, 2, b"\x0a\x02\xff\xfe")]),  # not UTF-8
        spm.serialise([Field(1, 2, spm.serialise([Field(2, 0, 7)]))]),  # a score of another type
        spm.serialise([Field(1, 2, Piece.of("a").fields[0].value), Field(2, 0, 1)]),
        spm.serialise([Field(2, 2, b"")]),  # no pieces
    ],
)
def test_damaged_bytes_are_refused(data):
    with pytest.raises(ModelError):
        Model.from_bytes(data)


def test_random_damage_raises_nothing_else(trained):
    rng = np.random.default_rng(0)
    whole = spm.serialise(
        f for f in spm.parse(trained["symbols"]) if f.number != 3
    )  # without the characters map, which hides the rest
    for _ in range(500):
        data = bytearray(whole[: rng.integers(0, len(whole) + 1)])
        for _ in range(rng.integers(0, 4)):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        try:
            model = Model.from_bytes(bytes(data))
        except ModelError:
            continue
        assert Model.from_bytes(model.to_bytes()) == model


def test_random_messages_come_back():
    rng = np.random.default_rng(1)
    for _ in range(200):
        fields = []
        for _ in range(rng.integers(0, 6)):
            number, wire = int(rng.integers(1, 5000)), int(rng.choice([0, 1, 2, 5]))
            size = {1: 8, 2: int(rng.integers(0, 300)), 5: 4}.get(wire)
            value = int(rng.integers(0, 2**63)) >> int(rng.integers(0, 63))
            fields.append(Field(number, wire, value if wire == 0 else rng.bytes(size)))
        assert spm.parse(spm.serialise(fields)) == tuple(fields)


def test_a_score_keeps_its_bits():
    rng = np.random.default_rng(2)
    for raw in rng.integers(0, 0x7F7FFFFF, 100, dtype=np.uint32):
        score = struct.unpack("<f", struct.pack("<I", raw))[0]
        assert struct.pack("<f", Piece.of("a", score).score) == struct.pack("<I", raw)
