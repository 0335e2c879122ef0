"""Tokenizers, text normalisation and SentencePiece vocabularies."""

from jasr.text.tokenizers import (
    BLANK,
    NORMALISATIONS,
    CharTokenizer,
    SentencePieceTokenizer,
    TextError,
    from_dict,
    normalise,
    text_scores,
    whisper_english,
)
