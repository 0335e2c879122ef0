"""Corpora as they are distributed -> manifests (JSON lines) and lhotse Shar.

    python -m experiments.prepare_data synth --out_dir=corpora/synth    speech by espeak-ng
    python -m experiments.prepare_data an4 AN4 data/an4                 CMU's archive or folder
    python -m experiments.prepare_data librispeech LIBRISPEECH data/libri --parts dev-clean
    python -m experiments.prepare_data manifest FOLDER_OR_TABLE out.jsonl
    python -m experiments.prepare_data shar train.jsonl data/shar/train

`--help` after a name shows its options. `experiments.doctor data` checks the result.
"""

import sys

from experiments import options
from experiments.errors import in_one_line


def an4(argv):
    """AN4 (CMU): 948 training and 130 test utterances of spelled words and numbers."""
    p = options.parser("prepare_data an4", an4.__doc__)
    p.add_argument("source", help="the official folder or archive (with --download: where to)")
    p.add_argument("out_dir", help="gets train, valid and test .jsonl and FLAC")
    p.add_argument("--valid_speakers", nargs="*", help="default: eight of the training speakers")
    p.add_argument("--download", action="store_true", help="fetch the archive from CMU")
    args = p.parse_args(argv)
    from experiments.prepare import recipes

    recipes.an4(**vars(args))


def librispeech(argv):
    """LibriSpeech by lhotse's recipe: manifests and Shar, FLAC files as they are."""
    p = options.parser("prepare_data librispeech", librispeech.__doc__)
    p.add_argument("corpus_dir", help="the LibriSpeech folder (with --download: where to)")
    p.add_argument("out_dir", help="gets PART.jsonl and shar/PART/")
    p.add_argument("--parts", nargs="*", default=[], help="e.g. train-clean-100 (default: all)")
    p.add_argument("--download", action="store_true", help="fetch the parts from OpenSLR")
    p.add_argument("--keep_case", dest="lower", action="store_false", help="texts in capitals")
    p.add_argument("--shard_size", type=int, default=1000)
    args = p.parse_args(argv)
    from experiments.prepare import recipes

    recipes.librispeech(**vars(args))


def manifest(argv):
    """A manifest from a folder (x.wav with x.txt, .trn or .lab) or a CSV, TSV or | table."""
    p = options.parser("prepare_data manifest", manifest.__doc__)
    p.add_argument("source", help="the folder or table")
    p.add_argument("out", help="the manifest, e.g. train.jsonl")
    p.add_argument("--audio_dir", default="", help="what the table's paths are relative to")
    p.add_argument("--path_column", default="")
    p.add_argument("--text_column", default="")
    p.add_argument("--lower", action="store_true", help="texts in lower case")
    args = p.parse_args(argv)
    from experiments.prepare import manifest as manifests

    manifests.make(**vars(args))


def shar(argv):
    """A manifest or CutSet as lhotse Shar, recordings copied as they are encoded."""
    p = options.parser("prepare_data shar", shar.__doc__)
    p.add_argument("source", help="manifest or CutSet")
    p.add_argument("out_dir", help="an older Shar directory there is replaced")
    p.add_argument("--shard_size", type=int, default=1000, help="utterances in a tar")
    p.add_argument("--max_bad_share", type=float, default=0.05)
    args = p.parse_args(argv)
    from experiments.prepare import manifest as manifests

    manifests.to_shar(**vars(args))


def synth(argv):
    """A synthetic corpus of connected words through espeak-ng (extra [tts])."""
    p = options.parser("prepare_data synth", synth.__doc__)
    p.add_argument("--out_dir", default="corpora/synth", help="folder that is written")
    p.add_argument("--num_train", type=int, default=960, help="utterances for training")
    p.add_argument("--num_valid", type=int, default=192, help="... of unseen voices")
    p.add_argument("--num_accents", type=int, default=192, help="... of unseen accents")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no_shar", dest="shar", action="store_false", help="FLAC and manifests only")
    args = p.parse_args(argv)
    from experiments.prepare import synth as corpus

    corpus.write_corpus(**vars(args))


COMMANDS = {f.__name__: f for f in (synth, an4, librispeech, manifest, shar)}


@in_one_line
def main(argv=None):
    return options.dispatch(argv, __doc__, "corpus", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
