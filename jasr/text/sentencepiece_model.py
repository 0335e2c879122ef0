"""SentencePiece model files as values: pieces and settings, read and written without protobuf.

A `.model` file is one protobuf message (sentencepiece_model.proto of google/sentencepiece, proto2)
of which four fields matter here; everything else, known or not, is kept as the bytes it came in.

    model = Model.from_bytes(data)
    [p.text for p in model.pieces], model.kind, model.setting("byte_fallback")
    model.to_bytes() == data          # for whatever protobuf's own writers wrote

sentencepiece's own Python classes for this refuse a protobuf older than they were made with.
"""

import collections
import dataclasses
import functools
import pathlib
import struct
from typing import NamedTuple

WORD_MARK = "\u2581"  # stands for the space, inside pieces

# ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType

# Fields of ModelProto. Self-test samples are what an earlier vocabulary made of some texts.
_PIECES, _TRAINER, _NORMALIZER, _SELF_TEST, _DENORMALIZER = 1, 2, 3, 4, 5

# name -> (message, field number, default); a default's type is that of the value.
_SETTINGS = {
    "model_type": (_TRAINER, 3, 1),
    "vocab_size": (_TRAINER, 4, 8000),
    "treat_whitespace_as_suffix": (_TRAINER, 24, False),
    "byte_fallback": (_TRAINER, 35, False),
    "pretokenization_delimiter": (_TRAINER, 53, ""),
    "normalizer_name": (_NORMALIZER, 1, ""),
    "precompiled_charsmap": (_NORMALIZER, 2, b""),
    "add_dummy_prefix": (_NORMALIZER, 3, True),
    "remove_extra_whitespaces": (_NORMALIZER, 4, True),
    "escape_whitespaces": (_NORMALIZER, 5, True),
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types; groups are long gone
_FIXED = {_FIXED64: 8, _FIXED32: 4}


class ModelError(ValueError):
    """The bytes are no SentencePiece model, or its pieces make no vocabulary."""


class Field(NamedTuple):
    """One field of a protobuf message: an int for a varint, else the bytes of its value."""

    number: int
    wire: int
    value: int | bytes


# ---- the wire format ---------------------------------------------------------------------------


def parse(data):
    """The fields of a serialised message, in order. ModelError: truncated or malformed."""
    fields, at = [], 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _BYTES or wire in _FIXED:
            size, at = (_FIXED[wire], at) if wire in _FIXED else _varint(data, at)
            value, at = bytes(data[at : at + size]), at + size
        else:
            raise ModelError(f"not a SentencePiece model: wire type {wire} before byte {at}")
        if not number or at > len(data):
            raise ModelError(f"not a SentencePiece model: it breaks off or is damaged at byte {at}")
        fields.append(Field(number, wire, value))
    return tuple(fields)


def serialise(fields):
    """The bytes of a message; varints in their shortest form."""
    out = bytearray()
    for number, wire, value in fields:
        _put_varint(out, number << 3 | wire)
        if wire == _VARINT:
            _put_varint(out, value)
        else:
            if wire == _BYTES:
                _put_varint(out, len(value))
            out += value
    return bytes(out)


def _varint(data, at):
    """(value, position behind it) of a base-128 integer of at most 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ModelError("not a SentencePiece model: it breaks off inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ModelError(f"not a SentencePiece model: a number of more than 64 bits at byte {at}")


def _put_varint(out, value):
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _last(fields, number, wire, default):
    """The value of a field that counts: the last one, by protobuf's rule."""
    for f in reversed(fields):
        if f.number == number:
            if f.wire != wire:
                raise ModelError(f"not a SentencePiece model: field {number} has type {f.wire}")
            return f.value
    return default


def _with(fields, new):
    """The fields with `new` in the place of those of its number, or where that number belongs."""
    rest = [f for f in fields if f.number != new.number]
    at = sum(f.number < new.number for f in rest)
    return (*rest[:at], new, *rest[at:])


# ---- the model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, text, score=0.0, type=NORMAL):
        """A new piece."""
        kind, scored = Field(3, _VARINT, type), Field(2, _FIXED32, struct.pack("<f", score))
        return cls((Field(1, _BYTES, text.encode()), scored, kind))

    @functools.cached_property
    def text(self):
        """The piece, a word mark (U+2581) where a space is meant."""
        try:
            return _last(self.fields, 1, _BYTES, b"").decode()
        except UnicodeDecodeError as e:
            raise ModelError(f"a piece of the SentencePiece model is not UTF-8: {e}") from e

    @functools.cached_property
    def score(self):
        """Log probability (unigram) or minus the rank of its merge (BPE): an f32 as a float."""
        return struct.unpack("<f", _last(self.fields, 2, _FIXED32, b"\0\0\0\0"))[0]

    @functools.cached_property
    def type(self):
        """NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE."""
        return _last(self.fields, 3, _VARINT, NORMAL)

    def with_score(self, score):
        """The same piece under another score, which is rounded to f32."""
        return Piece(_with(self.fields, Field(2, _FIXED32, struct.pack("<f", score))))


@dataclasses.dataclass(frozen=True)
class Model:
    """A SentencePiece model. `others` are the fields of the file that are not pieces."""

    pieces: tuple[Piece, ...] = dataclasses.field(repr=False)
    others: tuple[Field, ...] = dataclasses.field(repr=False)

    @classmethod
    def from_bytes(cls, data):
        """The model of a `.model` file's bytes. ModelError: they are none."""
        pieces, others = [], []
        for field in parse(data):
            if field.number == _PIECES and field.wire == _BYTES:
                pieces.append(Piece(parse(field.value)))
            else:
                others.append(field)
        if not pieces:
            raise ModelError(f"not a SentencePiece model: no pieces in {len(data)} bytes")
        model = cls(tuple(pieces), tuple(others))
        [(p.text, p.score, p.type) for p in pieces]  # what is malformed is said here, not later
        for name in _SETTINGS:
            model.setting(name)
        return model

    @classmethod
    def from_file(cls, path):
        """The model of a `.model` file, or of a NeMo tokenizer directory."""
        path = pathlib.Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError as e:
            raise ModelError(f"cannot read the SentencePiece model {path}: {e.strerror}") from e
        except ModelError as e:
            raise ModelError(f"{path}: {e}") from e

    def to_bytes(self):
        """The bytes of the `.model` file: the pieces, then everything else in its order."""
        pieces = tuple(Field(_PIECES, _BYTES, serialise(p.fields)) for p in self.pieces)
        return serialise(pieces + self.others)

    @property
    def texts(self):
        """The pieces' strings in order of their ids."""
        return [p.text for p in self.pieces]

    @property
    def kind(self):
        """ "bpe", "unigram", "word" or "char"."""
        return KINDS.get(self.setting("model_type"), "unknown")

    def setting(self, name):
        """A setting of the trainer or normaliser, or its default; see _SETTINGS for the names."""
        message, number, default = _SETTINGS[name]
        wire = _BYTES if isinstance(default, str | bytes) else _VARINT
        value = _last(self._message(message), number, wire, None)
        if isinstance(value, bytes) and isinstance(default, str):
            return value.decode("utf-8", "replace")
        return default if value is None else type(default)(value)

    def with_settings(self, **values):
        """The model under other values of some settings."""
        others = self.others
        for name, value in values.items():
            message, number, default = _SETTINGS[name]
            value = value.encode() if isinstance(value, str) else value
            wire = _BYTES if isinstance(default, str | bytes) else _VARINT
            field = Field(number, wire, value if wire == _BYTES else int(value))
            inner = _with(Model((), others)._message(message), field)
            others = _with(others, Field(message, _BYTES, serialise(inner)))
        return dataclasses.replace(self, others=others)

    def with_pieces(self, pieces):
        """The model with other pieces and the vocab_size that they make, without self-tests."""
        others = tuple(f for f in self.others if f.number != _SELF_TEST)
        model = Model(tuple(pieces), others)
        return model.with_settings(vocab_size=len(model.pieces))

    def _message(self, number):
        """Fields of an embedded message; one that is given in parts is their concatenation."""
        parts = [f.value for f in self.others if f.number == number]
        if not all(isinstance(part, bytes) for part in parts):
            raise ModelError(f"not a SentencePiece model: field {number} is no message")
        return parse(b"".join(parts))

    def problems(self):
        """Lines about duplicate and empty pieces and a missing <unk>."""
        twice = duplicates(self.texts)
        if twice:
            yield f"pieces given more than once: {some([*map(repr, twice)])}"
        empty = [i for i, p in enumerate(self.pieces) if not p.text]
        if empty:
            yield f"empty pieces at ids {empty}"
        unknown = [i for i, p in enumerate(self.pieces) if p.type == UNKNOWN]
        if len(unknown) != 1:
            yield f"there must be one piece of type UNKNOWN, not at ids {unknown}"

    def check(self):
        """The model itself. ModelError lists its `problems`."""
        problems = "; ".join(self.problems())
        if problems:
            raise ModelError(f"the SentencePiece model is none: {problems}")
        return self

    @functools.cached_property
    def processor(self):
        """The sentencepiece.SentencePieceProcessor of this model, loaded at first use."""
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.to_bytes())
        except Exception as e:  # sentencepiece raises several kinds
            raise ModelError(f"sentencepiece cannot load the model: {e}") from e


def duplicates(texts):
    """The strings that occur more than once, in order of their first occurrence."""
    return [text for text, n in collections.Counter(texts).items() if n > 1]


def some(texts, shown=20, between=", "):
    """The first of the texts in a line, and how many more there are."""
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return between.join(texts[:shown]) + more


# ---- NeMo's tokenizer directory ----------------------------------------------------------------


def vocab_tsv(model):
    """Text of `tokenizer.vocab`: a line "piece<tab>score" for each id, as SentencePiece writes."""
    return "".join(f"{p.text}\t{p.score:g}\n" for p in model.pieces)


def vocab_txt(model):
    """Text of NeMo's `vocab.txt`: "x" begins a word, "##x" does not; special pieces are left out.

    NeMo's models never read it.
    """
    texts = [p.text for p in model.pieces if p.type not in (UNKNOWN, CONTROL, USER_DEFINED)]
    return "".join(f"{t[1:] or t}\n" if t.startswith(WORD_MARK) else f"##{t}\n" for t in texts)


def write_directory(folder, model):
    """The path of a NeMo tokenizer directory: tokenizer.model, tokenizer.vocab and vocab.txt.

    Files of these names are replaced. ModelError: see `Model.check`.
    """
    folder = pathlib.Path(folder)
    model.check()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.to_bytes())
    (folder / "tokenizer.vocab").write_bytes(vocab_tsv(model).encode())
    (folder / "vocab.txt").write_bytes(vocab_txt(model).encode())
    return folder
