"""SentencePiece models as tokenizer.json: texts are split alike, and the model comes back."""

import io
import json
import random

import pytest

from jasr.interop import tokenizer_json
from jasr.interop.tokenizer_json import TokenizerError
from jasr.text.sentencepiece_model import USER_DEFINED, Model, ModelError, Piece
from tests.systems.fastconformer.nemo_models import tokenizer_of

TEXTS = (
    "the other man, is it?",
    "  leading  and   double ",
    "ﬁ ligature ½",
    "ünknown ↯↯ x",
    "",
    "a",
)


@pytest.fixture
def bpe(goldens, tmp_path):
    return Model.from_bytes(tokenizer_of(goldens, tmp_path))


def trained(**options):
    import sentencepiece

    out = io.BytesIO()
    lines = ["hello world this is a test", "the other man and the thing", "a test of the world"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_writer=out, bos_id=-1, eos_id=-1,
        minloglevel=2, **options,
    )  # fmt: skip
    return Model.from_bytes(out.getvalue())


def assert_alike(model):
    """HF's tokenizer, and the model made of its description, split texts as the model."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.to_json(model, ("<pad>",))))
    back = tokenizer_json.from_json(json.loads(theirs.to_str()), len(model.pieces))
    assert back.texts == model.texts
    assert [p.type for p in back.pieces] == [p.type for p in model.pieces]
    assert theirs.token_to_id("<pad>") == len(model.pieces)
    letters = [p.text.replace("▁", " ") for p in model.pieces if not p.text.startswith("<")]
    rng = random.Random(0)
    mixed = ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(200)]
    for sentence in (*TEXTS, *mixed):
        want = model.processor.encode(sentence)
        assert theirs.encode(sentence, add_special_tokens=False).ids == want, sentence
        assert back.processor.encode(sentence) == want, sentence
        if 0 not in want:
            assert theirs.decode(want) == model.processor.decode(want)


def test_bpe_splits_alike(bpe):
    assert_alike(bpe)


@pytest.mark.parametrize("spaces", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_unigram_splits_alike(spaces, prefix):
    options = dict(remove_extra_whitespaces=spaces, add_dummy_prefix=prefix)
    assert_alike(trained(model_type="unigram", vocab_size=24, **options))


def test_other_kinds_and_clashes_are_refused(bpe):
    with pytest.raises(TokenizerError, match="of kind 'char'"):
        tokenizer_json.to_json(bpe.with_settings(model_type=4))
    with pytest.raises(TokenizerError, match="contain 'he'"):
        tokenizer_json.to_json(bpe, ("he",))
    with pytest.raises(ModelError, match="more than once"):
        tokenizer_json.to_json(bpe.with_pieces((*bpe.pieces, Piece.of("he"))))


def test_what_is_no_tokenizer_is_refused(bpe):
    good = tokenizer_json.to_json(bpe)
    for change, reason in (
        ({"model": None}, "malformed"),
        ({"model": {"type": "WordPiece"}}, "'WordPiece', not BPE or Unigram"),
        ({"model": {**good["model"], "vocab": {"<unk>": 0, "a": 5}}}, "no token 1 of 64"),
        ({"added_tokens": [3]}, "malformed"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "a"}}, "malformed: Error"),
    ):
        with pytest.raises(TokenizerError, match=reason):
            tokenizer_json.from_json({**good, **change}, 64)
    with pytest.raises(TokenizerError, match="no token 64 of"):
        tokenizer_json.from_json(good, 1 << 50)


@pytest.mark.parametrize("score", [1e300, float("nan"), "x", None, True])
def test_a_score_that_is_no_f32_is_refused(score):
    vocab = [["<unk>", 0.0], ["a", score]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab}
    with pytest.raises(TokenizerError, match="the piece 'a' has the score"):
        tokenizer_json.from_json({"model": model}, 2)
    vocab[1][1] = -3.4e38
    assert tokenizer_json.from_json({"model": model}, 2).pieces[1].score < -3e38


def test_symbols_that_a_user_defined_stay_what_they_are(bpe):
    model = bpe.with_pieces((*bpe.pieces, Piece.of("<lang>", 0.0, USER_DEFINED)))
    back = tokenizer_json.from_json(tokenizer_json.to_json(model), 65)
    assert back.pieces[64].type == USER_DEFINED and back.texts == model.texts
