"""SentencePiece models trained on texts, as NeMo's recipe trains them.

    write_directory("hi_tokenizer", train(texts, vocab_size=256))

SentencePiece's trainer gets the flags that NeMo's process_asr_text_tokenizer.py gives it:
id 0 is <unk>, there is no <s>, </s> or <pad>, spaces are kept as they
are. The same texts in the same order give the same bytes.
"""

import io
import re

from jasr import text
from jasr.text.sentencepiece_model import Model

KINDS = ("bpe", "unigram")


class TrainError(ValueError):
    """The texts and the size asked for make no vocabulary."""


def train(
    texts,
    vocab_size,
    kind="bpe",
    *,
    normalisation="none",
    lower_case=False,
    character_coverage=1.0,
    user_defined_symbols=(),
    allow_smaller=False,
):
    """The sentencepiece_model.Model of so many pieces, <unk> included, trained on texts.

    Args:
      texts: iterable of sentences; empty ones are left out, none for its length.
      kind: "bpe" or "unigram".
      normalisation: jasr.text's, applied before training as a tokenizer applies it later.
      lower_case: the model itself lower-cases what it reads (nmt_nfkc_cf instead of nmt_nfkc).
      character_coverage: share of all characters that must be pieces; below 1 the rarest become
        <unk>.
      user_defined_symbols: strings that are always one piece.
      allow_smaller: take the largest vocabulary where the texts do not make `vocab_size` pieces
        (NeMo does so without a word).

    Raises:
      TrainError: no text, or a vocab_size that is too small for the characters or too large for
        the texts; it says which sizes are possible.
    """
    import sentencepiece

    if kind not in KINDS:
        raise TrainError(f"no kind of tokenizer {kind!r}; choose from {', '.join(KINDS)}")
    lines = [line for t in texts if (line := text.normalise(t, normalisation))]
    if not lines:
        raise TrainError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            shuffle_input_sentence=True,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            bos_id=-1,
            eos_id=-1,
            remove_extra_whitespaces=False,
            normalization_rule_name="nmt_nfkc_cf" if lower_case else "nmt_nfkc",
            user_defined_symbols=list(user_defined_symbols),
            # what is longer than this many bytes would be left out
            max_sentence_length=max(4192, 1 + max(len(line.encode()) for line in lines)),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as e:
        few = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(e))
        if not few:
            raise TrainError(f"sentencepiece cannot train a tokenizer: {e}") from e
        raise TrainError(
            f"vocab_size {vocab_size} is too low: the characters of the texts alone need "
            f"{few[1]} pieces. Ask for more, or lower character_coverage"
        ) from e
    trained = Model.from_bytes(model.getvalue())
    if len(trained.pieces) < vocab_size and not allow_smaller:
        raise TrainError(
            f"vocab_size {vocab_size} is too high: {len(lines)} sentences make at most "
            f"{len(trained.pieces)} {kind} pieces. Ask for fewer, give more text, or allow a "
            "smaller vocabulary"
        )
    return trained
