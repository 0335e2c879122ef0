"""Merged tokenizers: NeMo's goldens, special pieces, and random pairs of languages."""

import io

import numpy as np
import pytest

from jasr.text.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Model,
    Piece,
    vocab_tsv,
)
from jasr.text.vocab.merge import MergeError, merge, segmentation, unreachable
from jasr.text.vocab.train import train

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def new(folder):
    return train((folder / "corpus_new.txt").read_text(encoding="utf-8").splitlines(), 72)


VARIANTS = {
    "merged": ({}, "merged_filtered_shifted", 8),
    "merged_unfiltered": ({"filter_base_characters": False}, "merged_unfiltered_shifted", 4),
    "merged_keepscores": (
        {"filter_base_characters": False, "scores": "keep"},
        "merged_keepscores",
        4,
    ),
}


def encodings(model, texts):
    return [model.processor.encode(text) for text in texts]


def test_the_trainer_makes_nemos_tokenizer(base, new, golden):
    assert encodings(new, golden["texts"]) == golden["new"]
    assert encodings(base, golden["texts"]) == golden["base"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_pieces_scores_and_encodings_are_the_golden_ones(base, new, golden, folder, variant):
    settings, name, english_kept = VARIANTS[variant]
    merged = merge(base, new, **settings)
    want = (folder / f"{variant}.vocab").read_text(encoding="utf-8")
    assert vocab_tsv(merged.model) == want
    assert encodings(merged.model, golden["texts"]) == golden[name]
    kept = segmentation(base, merged.model, golden["texts"][:8])
    assert (kept.sentences, kept.kept, len(kept.changed)) == (8, english_kept, 8 - english_kept)
    assert not merged.unreachable


def test_merged_model_of_the_shared_goldens(base, new, shared_dir):
    want = Model.from_file(shared_dir / "goldens" / "nemo" / "vocab_expansion" / "tokenizer_merged")
    got = merge(base, new).model
    assert [(p.text, p.score, p.type) for p in got.pieces] == [
        (p.text, p.score, p.type) for p in want.pieces
    ]
    assert got.others == want.others  # settings, with the vocab_size


def test_report_says_what_became_of_every_new_piece(base, new, golden):
    merged = merge(base, new)
    assert merged.base_characters == ("ch", "ol")
    assert merged.special == ("<unk>",)
    assert merged.base_size + len(merged.appended) == len(merged.model.pieces) == 121
    assert merged.model.texts == golden["merged_pieces"]
    assert merged.model.pieces[:64] == base.pieces
    parts = (merged.appended, merged.shared, merged.base_characters, merged.special)
    assert sorted(sum(parts, ())) == sorted(new.texts)
    report = "\n".join(merged.lines())
    assert "64 pieces + 57 appended = 121" in report and "ch ol" in report


def test_segmentation_names_what_changed_and_counts_the_unknown(base, new, golden):
    merged = merge(base, new, filter_base_characters=False).model
    seen = segmentation(base, merged, golden["texts"])
    assert (seen.sentences, seen.kept) == (16, 4)
    assert (seen.unknown_before, seen.unknown_after) == (8, 0)
    text, before, after = seen.changed[0]
    assert text.startswith("speech recognition") and before != after
    assert "".join(before) == "".join(after) == "▁" + text.replace(" ", "▁")
    assert any("4 of 16" in line for line in seen.lines())


def model_of(pieces, kind=2, **settings):
    """A model of (text, score[, type]) and <unk>, without any normalisation."""
    made = Model((Piece.of("<unk>", 0, UNKNOWN), *(Piece.of(*p) for p in pieces)), ())
    settings = dict(normalizer_name="identity", remove_extra_whitespaces=False) | settings
    return made.with_settings(model_type=kind, **settings).with_pieces(made.pieces)


def test_dead_pieces_are_dropped_and_said():
    old = model_of([("▁", -3), ("a", -1), ("b", -2)])
    more = model_of([("ab", 0), ("abc", -1), ("cd", -2), ("c", -3), ("d", -4)])
    merged = merge(old, more)  # without "ab", which the filter takes, nothing makes "abc"
    assert merged.base_characters == ("ab",) and merged.unreachable == ("abc",)
    assert merged.appended == ("cd", "c", "d")
    assert "can never be produced: abc" in "\n".join(merged.lines())
    left = merge(old, more, drop_unreachable=False)
    assert left.appended == ("abc", "cd", "c", "d") and not left.unreachable
    assert "1 appended pieces can never be produced: abc" in left.notes[0]
    assert unreachable(left.model) == [4]


def test_symbols_of_the_user_are_taken_and_other_special_pieces_are_not():
    old = model_of([("▁", -3), ("a", -1), ("<b>", 0, CONTROL)])
    more = model_of([("<b>", 0, USER_DEFINED), ("aa", 0, USER_DEFINED), ("<c>", 0, CONTROL)])
    merged = merge(old, more)
    assert merged.appended == ("aa",) and merged.special == ("<unk>", "<c>")
    assert merged.model.pieces[-1].type == USER_DEFINED and merged.model.pieces[-1].score == 0
    assert "special pieces and stay so: <b>" in merged.notes[0]
    assert merged.model.processor.encode("aaa", out_type=str) == ["▁", "aa", "a"]


def test_bytes_stay_the_bases_matter():
    texts = ["one two three"] * 5
    with_bytes = train_small(texts, 300, byte_fallback=True)
    without = train_small(["drei vier fünf"] * 5, 25)
    merged = merge(with_bytes, without)
    assert merged.model.pieces[: len(with_bytes.pieces)] == with_bytes.pieces
    assert "the merged one does" in merged.notes[0]
    merged = merge(without, with_bytes)
    assert "the merged one does not" in merged.notes[0]
    assert "<0x00>" in merged.special and "<0x00>" not in merged.model.texts


def test_models_that_do_not_fit_are_refused_with_every_reason(base):
    other = model_of([("a", 0), ("a", -1)], kind=1, add_dummy_prefix=False)
    with pytest.raises(MergeError) as error:
        merge(base, other)
    said = str(error.value)
    for part in ("'a'", "bpe model", "unigram model", "normalise", "add_dummy_prefix True"):
        assert part in said
    with pytest.raises(MergeError, match="no rule for scores 'high'"):
        merge(base, base, scores="high")


def test_another_normaliser_is_allowed_on_request(base, new):
    cased = new.with_settings(precompiled_charsmap=b"", normalizer_name="identity")
    with pytest.raises(MergeError, match=r"\(nmt_nfkc, identity\).*\(--allow_other_normalizer"):
        merge(base, cased)
    merged = merge(base, cased, allow_other_normalizer=True)
    assert merged.model == merge(base, new).model
    assert "as in the base: precompiled_charsmap of" in merged.notes[0]


def test_what_the_bases_normaliser_changes_is_never_produced():
    old = train(["one two three"] * 3, 20, lower_case=True)
    more = train(["Да нет Нет да"] * 3, 22, allow_smaller=True)
    merged = merge(old, more, allow_other_normalizer=True)
    assert {p for p in merged.unreachable if p != p.lower()} >= {"Д", "Н"}
    assert not [p for p in merged.appended if p != p.lower()]
    assert merged.model.processor.encode("Да", out_type=str) == ["▁да"]


def test_a_model_merged_with_itself_does_not_grow(base):
    merged = merge(base, base)
    assert merged.model.to_bytes() == base.to_bytes() and not merged.appended


def train_small(texts, size, kind="bpe", **settings):
    """A quickly trained model without a characters map."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        normalization_rule_name="identity",
        minloglevel=2,
        **settings,
    )
    return Model.from_bytes(model.getvalue())


def sentences(rng, alphabet, count, words=12):
    """Random sentences over few words, so that pieces of several characters pay."""
    lexicon = ["".join(rng.choice(list(alphabet), rng.integers(1, 6))) for _ in range(words)]
    return [" ".join(rng.choice(lexicon, rng.integers(1, 7))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_random_merges_leave_the_old_language_alone(kind):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        old = train_small(sentences(rng, "abcdef", 40), 40, kind)
        more = train_small(sentences(rng, "cdefxyzé", 40), 45, kind)
        texts = sentences(rng, "abcdef", 40, words=60)
        for scores in ("below", "keep"):
            merged = merge(old, more, scores=scores)
            assert merged.model.pieces[: len(old.pieces)] == old.pieces
            assert len(set(merged.model.texts)) == len(merged.model.pieces)
            assert merged.model.setting("vocab_size") == merged.model.processor.vocab_size()
            seen = segmentation(old, merged.model, texts)
            assert seen.kept == seen.sentences == 40
        below = merge(old, more).model.pieces[len(old.pieces) :]
        lowest = min(p.score for p in old.pieces if p.type == NORMAL)
        assert all(p.score < lowest for p in below)
        ranked = {p.text: p.score for p in more.pieces}
        order = [ranked[p.text] for p in sorted(below, key=lambda p: -p.score)]
        assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_dropping_dead_pieces_changes_no_text(kind):
    dropped = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        old = train_small(sentences(rng, "abcdef", 60), 50, kind)
        corpus = sentences(rng, "cdefxyzé", 60)
        more = train_small(corpus, 90, kind)
        whole = merge(old, more, drop_unreachable=False).model
        fewer = merge(old, more)
        texts = corpus + sentences(rng, "abcdefxyzé", 60, words=80)
        assert segmentation(whole, fewer.model, texts).kept == len(texts)
        dropped += len(fewer.unreachable)
    assert dropped or kind == "unigram"
