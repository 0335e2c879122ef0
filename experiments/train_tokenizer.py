"""Trains a SentencePiece tokenizer on the texts of manifests, Shar directories or .txt files.

    python -m experiments.train_tokenizer data/an4/train.jsonl --vocab_size=64 \
        --output=data/an4/tokenizer

The output directory is NeMo's: tokenizer.model, tokenizer.vocab, vocab.txt; recipes take the
.model as config.text.path. SentencePiece is run as NeMo's own script runs it; the flags are jasr's:
what NeMo does without --no_lower_case is --normalisation=none --lower_case.
"""

import sys

from experiments import options
from experiments.errors import in_one_line


@in_one_line
def main(argv=None):
    parser = options.parser("train_tokenizer", __doc__)
    parser.add_argument("sources", nargs="+", help="manifest, CutSet, Shar directory or .txt")
    parser.add_argument("--vocab_size", type=int, required=True, help="pieces, <unk> included")
    parser.add_argument("--output", required=True, help="directory of the tokenizer")
    parser.add_argument("--kind", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--normalisation", default="lower", help="none, lower, whisper_english")
    parser.add_argument(
        "--lower_case", action="store_true",
        help="the tokenizer itself lower-cases what it reads (nmt_nfkc_cf)",
    )  # fmt: skip
    parser.add_argument("--character_coverage", type=float, default=1.0)
    parser.add_argument("--allow_smaller", action="store_true", help="take fewer pieces if need be")
    args = parser.parse_args(argv)
    from jasr.data.entries import texts
    from jasr.text.sentencepiece_model import write_directory
    from jasr.text.vocab import train

    given = vars(args)
    folder, sources = given.pop("output"), given.pop("sources")
    model = train.train(texts(sources), **given)
    write_directory(folder, model)
    shown = " ".join(model.texts[1:21])
    print(f"{folder}/tokenizer.model: {len(model.pieces)} pieces: {shown} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
