"""Two SentencePiece models as one, in which every old piece keeps its id.

    merged = merge(Model.from_file("en.model"), Model.from_file("hi.model"))
    print("\\n".join(merged.lines()))
    print("\\n".join(segmentation(base, merged.model, english_texts).lines()))
    write_directory("en_hi", merged.model)

What keeps the old language's segmentation is the filter, not the scores: an appended piece made
only of characters that the base knows can fire in the base's texts whatever its score, since BPE
sooner or later has a pair left that only the new piece joins. Specification nemo.md 6.4.
"""

import dataclasses

from jasr.text import sentencepiece_model as spm

SCORES = ("below", "keep")
_OWN = (spm.NORMAL, spm.USER_DEFINED)  # pieces of text; the others are special

# What decides how a text is cut into characters, before any piece is looked for.
_CUTTING = (
    "precompiled_charsmap",
    "add_dummy_prefix",
    "remove_extra_whitespaces",
    "escape_whitespaces",
    "treat_whitespace_as_suffix",
    "pretokenization_delimiter",
)


class MergeError(ValueError):
    """The two models do not fit together; the message lists every reason."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """A merged model and what became of each piece of the new one.

    `appended` and `shared` (present in the base already) are in the merged vocabulary. Left out
    are `base_characters` (the filter), `unreachable` (no text is ever cut into them, see
    `unreachable`) and `special` (control, unknown and unused pieces, and bytes). `notes` says what
    is unusual about the pair.
    """

    model: spm.Model = dataclasses.field(repr=False)
    base_size: int
    appended: tuple[str, ...]
    shared: tuple[str, ...]
    base_characters: tuple[str, ...]
    unreachable: tuple[str, ...]
    special: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self, shown=20):
        """The report as lines of text; of each list at most `shown` pieces are named."""
        size = len(self.model.pieces)
        lines = [f"{self.base_size} pieces + {len(self.appended)} appended = {size}"]
        for words, pieces in (
            ("shared with the base", self.shared),
            ("dropped, made of the base's characters only", self.base_characters),
            ("dropped, can never be produced", self.unreachable),
            ("dropped, special pieces", self.special),
        ):
            if pieces:
                lines.append(f"{len(pieces)} {words}: {spm.some(pieces, shown, ' ')}")
        return [*lines, *self.notes]


def merge(
    base,
    new,
    *,
    scores="below",
    filter_base_characters=True,
    drop_unreachable=True,
    allow_other_normalizer=False,
):
    """The Merged of two models: the base's pieces with their ids, then those of `new` it lacks.

    Appended are NORMAL and USER_DEFINED pieces in order of their ids in `new`. The base's
    settings are kept; only vocab_size changes.

    Args:
      base, new: sentencepiece_model.Model, both "bpe" or both "unigram".
      scores: "below" shifts the new pieces below the lowest NORMAL score of the base, so that
        merges of the base come first; "keep" leaves them. With the filter neither changes how
        texts of the base are cut. For "unigram", where scores are log probabilities, "below"
        makes every new piece improbable and so prefers long ones: there "keep" cuts the new
        language as its own model did.
      filter_base_characters: leave out new NORMAL pieces all of whose characters occur in NORMAL
        or USER_DEFINED pieces of the base. User-defined symbols are always taken.
      drop_unreachable: leave out new pieces that the merged model can never produce, for instance
        because the filter took the halves of their last merge.
      allow_other_normalizer: normalise as the base does although `new` was trained otherwise.

    Raises:
      MergeError: other kinds, other normalisation (unless allowed), duplicates; all in one error.
    """
    if scores not in SCORES:
        raise MergeError(f"no rule for scores {scores!r}; choose from {', '.join(SCORES)}")
    notes = _judge(base, new, allow_other_normalizer)
    known = set(base.texts)
    characters = set().union(*(p.text for p in base.pieces if p.type in _OWN))
    appended, shared, filtered, special = [], [], [], []
    for piece in new.pieces:
        if piece.text in known and piece.type != spm.UNKNOWN:
            shared.append(piece.text)
        elif piece.type not in _OWN:
            special.append(piece.text)
        elif filter_base_characters and piece.type == spm.NORMAL and set(piece.text) <= characters:
            filtered.append(piece.text)
        else:
            appended.append(piece)
    if scores == "below":
        appended = _below(base, new, appended)
    model = base.with_pieces((*base.pieces, *appended))
    dead = {model.pieces[i].text for i in unreachable(model, start=len(base.pieces))}
    if drop_unreachable and dead:
        model = model.with_pieces(p for p in model.pieces if p.text not in dead)
    elif dead:
        named = spm.some(sorted(dead), between=" ")
        notes.append(f"{len(dead)} appended pieces can never be produced: {named}")
    return Merged(
        model=model,
        base_size=len(base.pieces),
        appended=tuple(model.texts[len(base.pieces) :]),
        shared=tuple(shared),
        base_characters=tuple(filtered),
        unreachable=tuple(p.text for p in appended if p.text in dead) if drop_unreachable else (),
        special=tuple(special),
        notes=tuple(notes),
    )


def _below(base, new, pieces):
    """The pieces with scores shifted as one below the base's lowest NORMAL score.

    User-defined symbols are matched before any score is looked at, and keep theirs.
    """
    lowest = min((p.score for p in base.pieces if p.type == spm.NORMAL), default=0.0)
    highest = max((p.score for p in new.pieces if p.type == spm.NORMAL), default=0.0)
    shift = lowest - 1 - highest
    return [p.with_score(p.score + shift) if p.type == spm.NORMAL else p for p in pieces]


def _judge(base, new, allow_other_normalizer):
    """Lines about what is unusual in the pair. MergeError: they cannot be merged, and why."""
    problems, notes = [], []
    for name, model in (("base", base), ("new", new)):
        problems += [f"{name}: {problem}" for problem in model.problems()]
    if base.kind != new.kind or base.kind not in ("bpe", "unigram"):
        problems.append(
            f"the base is a {base.kind} model and the new one a {new.kind} model: their scores "
            "mean different things (both must be bpe, or both unigram)"
        )
    differ = [name for name in _CUTTING if base.setting(name) != new.setting(name)]
    if differ:
        said = "; ".join(
            f"{n} {_brief(base.setting(n))} in the base, {_brief(new.setting(n))} in the new model"
            for n in differ
        )
        if allow_other_normalizer:
            notes.append(f"texts are cut and normalised as in the base: {said}")
        else:
            names = ", ".join(m.setting("normalizer_name") or "unnamed" for m in (base, new))
            problems.append(
                f"they normalise texts differently ({names}): {said}. Train the new "
                "model as the base was, or allow it (--allow_other_normalizer): then the base's "
                "rules hold and some new pieces may never match"
            )
    if new.setting("byte_fallback") != base.setting("byte_fallback"):
        does = {True: "does", False: "does not"}[base.setting("byte_fallback")]
        notes.append(f"only one model falls back to bytes: the merged one {does}, as the base")
    types = {p.text: p.type for p in base.pieces}
    ours = [(p.text, p.type) for p in new.pieces if p.type in _OWN]
    special = [text for text, kind in ours if types.get(text, kind) not in (spm.NORMAL, kind)]
    if special:
        named = spm.some(special, between=" ")
        notes.append(f"in the base these are special pieces and stay so: {named}")
    if problems:
        raise MergeError("the models cannot be merged: " + "; ".join(problems))
    return notes


def _brief(value):
    return f"of {len(value)} bytes" if isinstance(value, bytes) else repr(value)


def unreachable(model, start=0):
    """Ids from `start` on of NORMAL pieces that no text is ever cut into.

    A piece is reachable if it is cut into itself where it stands alone. BPE: pairs inside a span
    are joined in the same order whatever surrounds it, unless a pair across its edge is, and then
    the span is no piece. Unigram: parts that beat the piece alone beat it in every text. What the
    normaliser turns into something else (a capital letter, say) is in no text that it has read.
    """
    ids = [i for i in range(start, len(model.pieces)) if model.pieces[i].type == spm.NORMAL]
    bare = model.with_settings(add_dummy_prefix=False, remove_extra_whitespaces=False)
    texts = [model.pieces[i].text for i in ids]
    if model.setting("escape_whitespaces"):
        texts = [text.replace(spm.WORD_MARK, " ") for text in texts]
    cut = bare.processor.encode(texts)
    return [i for i, got in zip(ids, cut, strict=True) if got != [i]]


# ---- what the old model and the merged one make of a corpus ------------------------------------


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """How two models cut the same sentences: how many alike, and the others.

    `changed` holds (sentence, pieces before, pieces after) of the first ones that differ;
    `unknown_before` and `unknown_after` count the sentences with an unknown character.
    """

    sentences: int
    kept: int
    changed: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    unknown_before: int
    unknown_after: int

    def lines(self, shown=5):
        """The report as lines of text with at most `shown` sentences that are cut otherwise."""
        lines = [
            f"{self.kept} of {self.sentences} sentences keep their segmentation; sentences with "
            f"unknown characters: {self.unknown_before} before, {self.unknown_after} after"
        ]
        for text, before, after in self.changed[:shown]:
            lines += [text, "  was " + " ".join(before), "  is  " + " ".join(after)]
        return lines


def segmentation(before, after, texts, keep=100):
    """The Segmentation of sentences by two models, compared piece string by piece string. At most
    `keep` sentences that differ are kept with their pieces."""
    sentences, kept, changed, unknown = 0, 0, [], [0, 0]
    for text in texts:
        cuts = []
        for which, model in enumerate((before, after)):
            ids = model.processor.encode(text)
            unknown[which] += model.processor.unk_id() in ids
            cuts.append(tuple(model.pieces[i].text for i in ids))
        sentences += 1
        if cuts[0] == cuts[1]:
            kept += 1
        elif len(changed) < keep:
            changed.append((text, *cuts))
    return Segmentation(sentences, kept, tuple(changed), *unknown)
