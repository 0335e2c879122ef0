"""SentencePiece models as the tokenizer.json of Hugging Face's tokenizers, and back.

Both are written as plain data; neither library is needed.
"""

import base64
import binascii
import re

from jasr.text import sentencepiece_model as spm

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LARGEST = (2 - 2**-23) * 2.0**127  # an f32


class TokenizerError(ValueError):
    """A tokenizer that the other side does not have."""


def to_json(model, added=()):
    """The content of a tokenizer.json that splits texts as the SentencePiece model does.

    Args:
      model: sentencepiece_model.Model of kind "bpe" or "unigram".
      added: special tokens that follow the pieces, e.g. ("<blank>",).

    Raises:
      TokenizerError: another kind. sentencepiece_model.ModelError: pieces that are no vocabulary.
    """
    pieces = [*model.check().pieces]
    clash = [text for text in added if text in model.texts]
    if clash:
        raise TokenizerError(f"the pieces contain {clash[0]!r}, which is to be added to them")
    unknown = next(i for i, p in enumerate(pieces) if p.type == spm.UNKNOWN)
    tokens = [(i, p.text, p.type != spm.USER_DEFINED) for i, p in enumerate(pieces)
              if p.type in (spm.UNKNOWN, spm.CONTROL, spm.USER_DEFINED)]  # fmt: skip
    tokens += [(len(pieces) + i, text, True) for i, text in enumerate(added)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    prefix = model.setting("add_dummy_prefix")
    # "always" adds no prefix to a text that begins with a space, which only stripping rules out
    before = prefix and model.setting("remove_extra_whitespaces")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": special} for i, text, special in tokens
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": _metaspace("always" if before else "never"),
        "post_processor": None,
        "decoder": _metaspace("always" if prefix else "never"),
        "model": _bpe(model, unknown) if model.kind == "bpe" else _unigram(model, unknown),
    }


def _metaspace(scheme):
    mark = spm.WORD_MARK
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": True}


def _normalizers(model):
    steps = []
    charsmap = model.setting("precompiled_charsmap")
    if charsmap:
        text = base64.b64encode(charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if model.setting("remove_extra_whitespaces"):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    elif model.setting("add_dummy_prefix"):
        steps.append({"type": "Prepend", "prepend": " "})
    return steps


def _bpe(model, unknown):
    """SentencePiece joins the two neighbours whose joint piece has the highest score; here every
    way to make a piece of two is a rule, in the order of the scores."""
    scores = {p.text: p.score for p in model.pieces if p.type in (spm.NORMAL, spm.USER_DEFINED)}
    rules = [
        (-score, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    rules.sort(key=lambda rule: rule[0])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.texts[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": any(p.type == spm.BYTE for p in model.pieces),
        "ignore_merges": False,
        "vocab": {text: i for i, text in enumerate(model.texts)},
        "merges": [[left, right] for _, left, right in rules],
    }


def _unigram(model, unknown):
    if model.kind != "unigram":
        raise TokenizerError(f"a SentencePiece model of kind {model.kind!r}; only bpe and unigram")
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[p.text, p.score] for p in model.pieces],
        "byte_fallback": any(p.type == spm.BYTE for p in model.pieces),
    }


def from_json(description, size):
    """The SentencePiece model of a tokenizer.json's content, of its first `size` tokens.

    Scores of BPE pieces are the ranks of their rules, so texts are split alike; whether runs of
    spaces are joined is read off the normaliser, and the prefix off the pre-tokenizer.

    Raises:
      TokenizerError: another kind of tokenizer, ids with gaps, or scores that are no f32.
      sentencepiece_model.ModelError: pieces that are no vocabulary.
    """
    try:
        return _from_json(description, size)
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeError, binascii.Error) as e:
        raise TokenizerError(f"tokenizer.json is malformed: {type(e).__name__} {e}") from e


def _from_json(description, size):
    model = description["model"]
    kind = {"BPE": "bpe", "Unigram": "unigram"}.get(model["type"])
    if kind is None:
        raise TokenizerError(f"tokenizer.json is of type {model['type']!r}, not BPE or Unigram")
    if kind == "bpe":
        texts = {number: text for text, number in model["vocab"].items()}
        merged = [
            "".join(m) if isinstance(m, list) else m.replace(" ", "", 1) for m in model["merges"]
        ]
        ranks = {text: rank for rank, text in enumerate(dict.fromkeys(merged))}
        scores = {text: -float(ranks.get(text, len(ranks))) for text in texts.values()}
        unknown = model["unk_token"]
    else:
        texts = {number: text for number, (text, _) in enumerate(model["vocab"])}
        scores = {text: _score(text, score) for text, score in model["vocab"]}
        unknown = texts[model["unk_id"]]
    added = {token["content"]: token for token in description.get("added_tokens") or []}
    for text, token in added.items():
        texts.setdefault(token["id"], text)
        scores.setdefault(text, 0.0)
    gap = next((number for number in range(size) if number not in texts), None)
    if gap is not None:
        raise TokenizerError(f"tokenizer.json has no token {gap} of {size}")
    pieces = [_piece(texts[i], scores[texts[i]], unknown, added) for i in range(size)]
    normalizer = description.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = {step["type"] for step in steps}
    charsmap = [s["precompiled_charsmap"] for s in steps if s["type"] == "Precompiled"]
    space = description.get("pre_tokenizer") or {}
    prefix = "Prepend" in kinds or space.get("prepend_scheme", "always") != "never"
    return spm.Model(tuple(pieces), ()).with_settings(
        model_type={"unigram": 1, "bpe": 2}[kind],
        vocab_size=size,
        byte_fallback=any(p.type == spm.BYTE for p in pieces),
        precompiled_charsmap=base64.b64decode(charsmap[0]) if charsmap else b"",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=bool(kinds & {"Strip", "Replace"}),
    ).check()  # fmt: skip


def _score(text, score):
    """A piece's score, which a SentencePiece model keeps as an f32."""
    if type(score) not in (int, float) or not abs(score) <= _LARGEST:
        raise TokenizerError(f"tokenizer.json: the piece {text!r} has the score {score!r:.100}")
    return score


def _piece(text, score, unknown, added):
    if text == unknown:
        kind = spm.UNKNOWN
    elif text in added:
        kind = spm.CONTROL if added[text].get("special") else spm.USER_DEFINED
    else:
        kind = spm.BYTE if _BYTE.fullmatch(text) else spm.NORMAL
    return spm.Piece.of(text, score, kind)
