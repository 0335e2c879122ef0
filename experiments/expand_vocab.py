"""Gives a model's vocabulary the pieces of another tokenizer, and its heads rows for them.

    python -m experiments.expand_vocab --checkpoint=parakeet.nemo --tokenizer=hi.model \
        --output=runs/en_hi_init                       # --replace: only the new vocabulary stays

Old pieces keep ids and rows, and texts of their characters the segmentation (unless
--keep_base_characters); blank and durations move behind the new pieces; the loss stays what it was.
The output is a run directory: train from it (config.init, with its tokenizer:
config.text.kind=init), transcribe with it, convert it.
"""

import base64
import pathlib
import sys

from experiments import options
from experiments.errors import in_one_line


@in_one_line
def main(argv=None):
    parser = options.parser("expand_vocab", __doc__)
    parser.add_argument("--checkpoint", required=True, help="what transcribe takes")
    parser.add_argument("--like", default="", help=".nemo that the weights of a .ckpt belong to")
    parser.add_argument("--tokenizer", required=True, help="the other SentencePiece .model")
    parser.add_argument("--output", required=True, help="run directory of the result")
    parser.add_argument("--replace", action="store_true", help="drop the old vocabulary")
    parser.add_argument(
        "--rows", default="", help="rule of new rows: low (default), mean, zero_bias, normal"
    )
    parser.add_argument(
        "--scores", choices=("below", "keep"), help="of new pieces: below the old ones' (default)"
    )
    parser.add_argument(
        "--keep_base_characters", action="store_true",
        help="also add pieces made of the old vocabulary's characters only: they can change how "
        "old texts are cut",
    )  # fmt: skip
    parser.add_argument(
        "--allow_other_normalizer", action="store_true",
        help="the other tokenizer may normalise texts otherwise (as SentencePiece's defaults do): "
        "the old one's rules hold, and some new pieces may never match",
    )  # fmt: skip
    parser.add_argument("--texts", default="", help="manifest or .txt: how its sentences are cut")
    parser.add_argument("--seed", type=int, default=0, help="of rows that are drawn")
    args = parser.parse_args(argv)
    for name in ("scores", "keep_base_characters", "allow_other_normalizer", "texts"):
        if args.replace and getattr(args, name):
            parser.error(f"--{name} is about merging two vocabularies: --replace keeps one alone")
    import jax

    from jasr.systems import loading
    from jasr.text.sentencepiece_model import Model, write_directory
    from jasr.text.vocab import expand, merge

    task, variables, meta = loading.load(args.checkpoint, like=args.like)
    heads, durations = task.heads
    if not heads:
        raise ValueError(f"{args.checkpoint}: vocabularies of this kind of model are not expanded")
    description = task.tokenizer.to_dict()
    if description["kind"] != "sentencepiece":
        raise ValueError(f"{args.checkpoint} has a tokenizer of kind {description['kind']!r}")
    old = Model.from_bytes(base64.b64decode(description["model"]))
    new = merged = Model.from_file(args.tokenizer)
    if not args.replace:
        result = merge.merge(
            old,
            new,
            scores=args.scores or "below",
            filter_base_characters=not args.keep_base_characters,
            allow_other_normalizer=args.allow_other_normalizer,
        )
        merged = result.model
        print("\n".join(result.lines()))
    rule = args.rows or ("normal" if args.replace else "low")
    params = expand.expand(
        variables["params"],
        heads,
        old.texts,
        merged.texts,
        durations=durations,
        rows=rule,
        key=jax.random.key(args.seed),
        replace=args.replace,
    )
    if args.texts:
        from jasr.data.entries import texts

        print("\n".join(merge.segmentation(old, merged, texts([args.texts])).lines()))
    tokenizer = {**description, "model": base64.b64encode(merged.to_bytes()).decode("ascii")}
    meta = {**meta, "tokenizer": tokenizer}
    loading.save(args.output, meta, {**variables, "params": params})
    write_directory(pathlib.Path(args.output) / "tokenizer", merged)
    print(f"{args.output}: {len(old.pieces)} -> {len(merged.pieces)} pieces, rows by rule {rule}")
    print(f"train with --config.init={args.output} --config.text.kind=init")
    return 0


if __name__ == "__main__":
    sys.exit(main())
