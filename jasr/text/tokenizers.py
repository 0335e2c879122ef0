"""Tokenizers behind one face, and the normalisations that texts go through.

A tokenizer has `encode(text) -> list[int]`, `decode(ids) -> text`, `piece(id) -> str` (a leading
space marks the beginning of a word), `normalisation`, `vocab_size` and `to_dict()`, which
`from_dict` reverses: it travels in the checkpoint's meta, so that a checkpoint alone can
transcribe. CTC and transducers have a blank among the ids, `blank_id`, language models have none
(-1): a task takes the tokenizer that it is given `with_blank()` or `without_blank()`.
"""

import base64
import collections
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import unicodedata
import warnings

from jasr import metrics
from jasr.text.sentencepiece_model import duplicates, some

BLANK = "<blank>"
NORMALISATIONS = ("none", "lower", "whisper_english")


class TextError(ValueError):
    """A text that a tokenizer or normaliser cannot take; the message names the characters."""


def normalise(text, kind):
    """`text` in one of the NORMALISATIONS, whitespace runs as single spaces.

    "none" leaves all else; "lower" is LaCT ASR's rule: lower case, and of
    punctuation only apostrophes stay (typographic ones inside words become plain, and combining
    marks stay, which the rule's `\\w` would strip from Hindi); "whisper_english" is the
    leaderboards' normaliser as transformers ships it.
    """
    if not isinstance(text, str):
        raise TextError(f"text must be a string, got {type(text).__name__} {text!r:.60}")
    if kind == "lower":
        text = re.sub(r"(?<=\w)\u2019(?=\w)", "'", text.lower())
        text = "".join(c for c in text if _keeps(c))
    elif kind == "whisper_english":
        text = whisper_english()(text)
    elif kind != "none":
        raise TextError(f"no normalisation {kind!r}; choose from {', '.join(NORMALISATIONS)}")
    return " ".join(text.split())


def _keeps(c):
    return c.isalnum() or c.isspace() or c in "_'" or unicodedata.category(c).startswith("M")


@functools.cache
def whisper_english():
    """The callable EnglishTextNormalizer of transformers, with Whisper's map of spellings.

    transformers has the code alone. The map ("colour" -> "color") is the `normalizer.json` beside
    any Whisper checkpoint: its path in JASR_SPELLINGS, or the package whisper-normalizer, which
    carries it. Without either a warning says that British spellings stay as they are.
    """
    try:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    except ImportError as e:
        raise TextError(
            "normalisation 'whisper_english' needs transformers: pip install transformers"
        ) from e
    path = spellings_file()
    if path is None:
        warnings.warn(
            "whisper_english runs without its map of British spellings: give the path of a "
            "Whisper checkpoint's normalizer.json in JASR_SPELLINGS or pip install "
            "whisper-normalizer",
            stacklevel=2,
        )
        return EnglishTextNormalizer({})
    try:
        spellings = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TextError(f"cannot read the map of spellings {path}: {e}") from e
    return EnglishTextNormalizer(spellings)


def spellings_file():
    """Path of the map of spellings that whisper_english uses; None where there is none."""
    if os.environ.get("JASR_SPELLINGS"):
        return pathlib.Path(os.environ["JASR_SPELLINGS"])
    found = importlib.util.find_spec("whisper_normalizer")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = pathlib.Path(folder) / "normalizers" / "english.json"
        if path.exists():
            return path
    return None


def text_scores(refs, hyps, normalisation="none"):
    """Word and character error rates of hypotheses.

    Args:
      refs, hyps: lists of texts of equal length.
      normalisation: one of the NORMALISATIONS, through which both sides go.

    Returns:
      (what `metrics.wer` says, normalised refs, normalised hyps).
    """
    refs, hyps = ([normalise(text, normalisation) for text in side] for side in (refs, hyps))
    return metrics.wer(refs, hyps), refs, hyps


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """Characters as tokens; `vocabulary[id]` is the character, or "<blank>" for the blank."""

    vocabulary: tuple[str, ...]
    normalisation: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        if twice := duplicates(self.vocabulary):
            raise TextError(f"the vocabulary holds {twice} more than once")
        if self.normalisation not in NORMALISATIONS:
            normalise("", self.normalisation)

    @classmethod
    def from_texts(cls, texts, normalisation="none"):
        """The tokenizer of all characters in `texts`: the blank, then by falling frequency.

        Characters of equal frequency stand in order of their code points, so that the same texts
        give the same ids whatever their order.
        """
        counts = collections.Counter()
        for text in texts:
            counts.update(normalise(text, normalisation))
        ranked = sorted(counts, key=lambda c: (-counts[c], c))
        return cls((BLANK, *ranked), normalisation)

    @functools.cached_property
    def ids(self):
        """dict of character -> id, without the blank."""
        return {c: i for i, c in enumerate(self.vocabulary) if c != BLANK}

    @property
    def vocab_size(self):
        return len(self.vocabulary)

    @property
    def blank_id(self):
        return self.vocabulary.index(BLANK) if BLANK in self.vocabulary else -1

    def with_blank(self):
        """This tokenizer if it has a blank, else the one with the blank before all characters."""
        if BLANK in self.vocabulary:
            return self
        return dataclasses.replace(self, vocabulary=(BLANK, *self.vocabulary))

    def without_blank(self):
        """The tokenizer whose ids are those of characters alone."""
        return dataclasses.replace(self, vocabulary=tuple(self.ids))

    def encode(self, text):
        """Ids of the normalised text's characters; TextError names those it does not know."""
        text = normalise(text, self.normalisation)
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            named = some([f"{c!r} (U+{ord(c):04X})" for c in unknown], 10)
            raise TextError(f"characters not in the vocabulary: {named} in {text!r:.80}")
        return [self.ids[c] for c in text]

    def piece(self, token):
        """The character of an id; "" for the blank."""
        piece = self.vocabulary[token]
        return "" if piece == BLANK else piece

    def decode(self, tokens):
        """Text of the ids, blanks left out, whitespace runs as single spaces."""
        return " ".join("".join(self.piece(int(t)) for t in tokens).split())

    def to_dict(self):
        """JSON-able description for the checkpoint's meta."""
        vocabulary = list(self.vocabulary)
        return {"kind": "char", "vocabulary": vocabulary, "normalisation": self.normalisation}


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """SentencePiece pieces as tokens; the blank is one more id, the last (NeMo's convention).

    `model` is the serialised model, which travels inside `to_dict` (base64).
    """

    model: bytes = dataclasses.field(repr=False)
    normalisation: str = "none"
    blank: bool = True

    @classmethod
    def from_file(cls, path, normalisation="none"):
        """The tokenizer of a SentencePiece `.model` file."""
        try:
            return cls(pathlib.Path(path).read_bytes(), normalisation)
        except OSError as e:
            raise TextError(f"cannot read the SentencePiece model {path}: {e}") from e

    @functools.cached_property
    def processor(self):
        """The sentencepiece.SentencePieceProcessor, loaded at first use."""
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except Exception as e:  # sentencepiece raises several kinds
            raise TextError(f"not a SentencePiece model ({len(self.model)} bytes): {e}") from e

    @property
    def vocab_size(self):
        return self.processor.vocab_size() + self.blank

    @property
    def blank_id(self):
        return self.vocab_size - 1 if self.blank else -1

    def with_blank(self):
        """The tokenizer with the blank after all pieces."""
        return dataclasses.replace(self, blank=True)

    def without_blank(self):
        """The tokenizer whose ids are those of pieces alone."""
        return dataclasses.replace(self, blank=False)

    def encode(self, text):
        """Ids of the normalised text's pieces; TextError names the pieces it does not know."""
        text = normalise(text, self.normalisation)
        ids = self.processor.encode(text)
        unknown = self.processor.unk_id()
        if unknown in ids:
            pieces = self.processor.encode(text, out_type=str)
            named = sorted({p for p, i in zip(pieces, ids) if i == unknown})
            raise TextError(f"not in the vocabulary: {some([*map(repr, named)])} in {text!r:.80}")
        return ids

    def piece(self, token):
        """The piece of an id, a leading space for the word mark; "" for blank and control ids."""
        if token == self.blank_id or self.processor.is_control(token):
            return ""
        return self.processor.id_to_piece(token).replace("\u2581", " ")

    def decode(self, tokens):
        """Text of the ids, blanks left out, whitespace runs as single spaces."""
        kept = [int(t) for t in tokens if int(t) != self.blank_id]
        return " ".join(self.processor.decode(kept).split())

    def to_dict(self):
        """JSON-able description for the checkpoint's meta."""
        return {
            "kind": "sentencepiece",
            "model": base64.b64encode(self.model).decode("ascii"),
            "normalisation": self.normalisation,
            **({} if self.blank else {"blank": False}),
        }


def from_dict(description):
    """The tokenizer that `to_dict` described; TextError for an unknown kind."""
    kind = description.get("kind")
    normalisation = description.get("normalisation", "none")
    if kind == "char":
        return CharTokenizer(tuple(description["vocabulary"]), normalisation)
    if kind == "sentencepiece":
        model, blank = base64.b64decode(description["model"]), description.get("blank", True)
        return SentencePieceTokenizer(model, normalisation, blank)
    raise TextError(f"no tokenizer of kind {kind!r}; known: char, sentencepiece")
