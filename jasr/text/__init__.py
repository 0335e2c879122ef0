"""Tokenizers, text normalisation and SentencePiece vocabularies."""

from jasr.text.tokenizers import (
    BLANK,
    NORMALISATIONS,
    CharTokenizer,
    SentencePieceTokenizer,
    TextError,
    from_dict,
    normalise,
    spellings_file,
    text_scores,
    whisper_english,
)
