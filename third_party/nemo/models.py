"""The models that check.py compares: made by jasr's own commands, then exported as .nemo.

Small ones, trained until they know some of the sixteen recordings of tests/data by heart, so that
what they decode is text; fresh ones of settings that the trained ones do not have.
"""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
GOLDEN = ROOT / "tests" / "goldens" / "nemo" / "archives" / "tiny_ctc_gzip.nemo"

SMALL = dict(n_layers=2, d_model=64, n_heads=4, subsampling_conv_channels=16, conv_kernel_size=9)
HINDI = "एक दो तीन चार\nदो एक चार\nपाँच छह सात\n" * 5
# name: (kind, settings of the encoder, of the prediction network, of the loss)
TRAINED = {
    "tdt": ("tdt", dict(subsampling_factor=4), {}, dict(sigma=0.05, omega=0.0)),
    "rnnt": (
        "rnnt",
        dict(conv_norm_type="layer_norm", use_bias=False, xscaling=True, subsampling_factor=4),
        dict(pred_rnn_layers=2),
        {},
    ),
    "hybrid": ("hybrid", dict(n_heads=2, untie_biases=False), {}, dict(durations=(0, 1, 2, 4))),
    "ctc": ("ctc", dict(subsampling="striding", subsampling_factor=4), {}, {}),
}
# name: (kind, settings of the encoder); weights as drawn
FRESH = {
    "local attention": (
        "tdt",
        dict(self_attention_model="rel_pos_local_attn", att_context_size=(8, 8)),
    ),
    "chunked, causal": (
        "rnnt",
        dict(
            att_context_style="chunked_limited",
            att_context_size=(12, 3),
            conv_context_size="causal",
            causal_downsampling=True,
            conv_norm_type="layer_norm",
        ),
    ),
    "abs_pos, stacking": ("ctc", dict(self_attention_model="abs_pos", subsampling="stacking")),
    "reduction, feat_out": (
        "ctc",
        dict(
            reduction="striding",
            reduction_position=0,
            reduction_factor=2,
            feat_out=48,
            subsampling="dw_striding",
            subsampling_factor=4,
        ),
    ),
    "groups, limited": ("hybrid", dict(conv_norm_type="group_norm4", att_context_size=(10, 10))),
}


# Frames at the end of an utterance are other ones in NeMo before 2.5.
OLD = ("ctc", dict(masked_subsampling=False))


def make(folder, steps, given=(), only=()):
    """Yields {"name", "source", "nemo", "old"} of every model; those of `only` if it is not empty.

    source: what jasr loads. nemo: its export. old: whether the export asks for NeMo before 2.5.
    """
    from experiments import average, convert, expand_vocab
    from jasr.systems.fastconformer import nemo

    def entry(name, source, old=False):
        exported = folder / f"{name.replace(', ', '_').replace(' ', '_')}.nemo"
        exported.unlink(missing_ok=True)
        run(convert, source, exported)
        return {"name": name, "source": str(source), "nemo": str(exported), "old": old}

    def wanted(name):
        return not only or name in only

    if wanted("NeMo's own"):
        yield entry("NeMo's own", GOLDEN)
    for path in filter(lambda path: wanted(path.stem), given):
        if nemo.read(path).kind == "encoder":
            print(f"{path} is left out: jasr has the encoder of such a model and no text")
        else:
            yield entry(path.stem, path)
    for name in filter(wanted, TRAINED):  # RNN-T learns more slowly
        yield entry(name, trained(folder, name, 2 * steps if name == "rnnt" else steps))
    if wanted("averaged"):
        source = folder / "average"
        members = trained(folder, "tdt", steps)
        if not source.exists():
            run(average, f"--checkpoint_dir={members}", "--top_n=2", f"--output={source}")
        yield entry("averaged", source)
    if wanted("expanded"):
        source, pieces = folder / "both", tokenizer(folder, "hindi", HINDI)
        before = trained(folder, "tdt", steps)
        if not source.exists():
            options = f"--tokenizer={pieces}", f"--output={source}"
            run(expand_vocab, f"--checkpoint={before}", *options)
        yield entry("expanded", source)
    if wanted("expanded, fine-tuned"):
        yield entry("expanded, fine-tuned", fine_tuned(folder, steps // 4))
    for name, (kind, encoder) in FRESH.items():
        if wanted(name):
            yield entry(name, fresh(folder, name, kind, encoder))
    if wanted("before 2.5"):
        yield entry("before 2.5", fresh(folder, "before 2.5", *OLD), old=True)


def run(command, *arguments):
    """Runs one of jasr's commands."""
    if command.main([str(a) for a in arguments]):
        raise SystemExit(f"{command.__name__} {' '.join(map(str, arguments))} failed")


def config_of(kind, encoder, decoder=(), loss=(), tokenizer=""):
    """A run's config of a small model."""
    from configs import common

    config = common.default("parakeet")
    config.data.update(train=(str(DATA / "train.jsonl"),), valid=(str(DATA / "valid.jsonl"),))
    config.data.update(bucket_duration_bins=(4.0,), bucket_batch_size=(8,), num_threads=1)
    config.spec_augment.update(freq_masks=0, time_masks=0)
    config.text.update(kind="sentencepiece", path=str(tokenizer))
    config.model.kind = kind
    config.model.encoder.update({**SMALL, **dict(dropout=0.0, dropout_pre_encoder=0.0), **encoder})
    config.model.encoder.update(dropout_att=0.0, dropout_emb=0.0)
    config.model.decoder.update({**dict(pred_hidden=48, dropout=0.0), **dict(decoder)})
    config.model.joint.update(joint_hidden=48, dropout=0.1)
    config.loss.update({**dict(kind="tdt" if kind == "hybrid" else kind), **dict(loss)})
    config.optim.update(lr=3e-3, schedule="cosine", warmup_steps=20, ema=0.0)
    return config


def trained(folder, name, steps):
    """The run directory of one of TRAINED."""
    from experiments import train

    kind, encoder, decoder, loss = TRAINED[name]
    config = config_of(kind, encoder, decoder, loss, tokenizer(folder))
    config.train.update(steps=steps, log_every=50, eval_every=steps // 2)
    train.train(json.loads(config.to_json()), folder / name)  # nothing, where it is done
    return folder / name


def fine_tuned(folder, steps):
    """The run directory of NeMo's golden with the digits' pieces added, trained on them."""
    from experiments import expand_vocab, train
    from jasr.systems import loading

    start, output = folder / "golden_and_digits", folder / "fine_tuned"
    if not start.exists():
        pieces = f"--tokenizer={tokenizer(folder)}"
        run(expand_vocab, f"--checkpoint={GOLDEN}", pieces, f"--output={start}")
    _, _, meta = loading.load(str(start))
    config = json.loads(config_of("ctc", {}).to_json())
    config |= {key: meta["config"][key] for key in ("model", "front_end", "loss", "decoding")}
    config["text"] = {**config["text"], "kind": "init", "path": ""}
    config["init"] = {**config["init"], "path": str(start)}
    config["train"] = {**config["train"], "steps": steps, "log_every": steps, "eval_every": steps}
    train.train(config, output)
    return output


def fresh(folder, name, kind, encoder):
    """The run directory of a model with weights as drawn."""
    import jax
    import numpy as np

    from jasr import text
    from jasr.systems import loading

    output = folder / f"fresh_{kind}_{len(name)}"
    if output.exists():
        return output
    pieces = text.SentencePieceTokenizer(tokenizer(folder).read_bytes())
    config = json.loads(config_of(kind, encoder).to_json())
    if encoder.get("masked_subsampling") is False:
        config["front_end"]["kind"] = "nemo_legacy"
    task = loading.build(config, pieces)
    batch = {
        "audio": np.zeros((1, 16000), np.float32),
        "audio_len": np.array([16000], np.int32),
        "tokens": np.zeros((1, 2), np.int32),
    }
    variables = jax.device_get(jax.jit(task.init)(jax.random.key(0), batch))
    meta = {"config": config, "task": "parakeet", "tokenizer": pieces.to_dict()}
    loading.save(output, meta, variables)
    return output


def tokenizer(folder, name="digits", texts=DATA / "train.jsonl"):
    """Path of a SentencePiece model of the recordings' texts, or of other lines."""
    from experiments import train_tokenizer

    output = folder / name
    if not output.exists():
        source = texts
        if isinstance(texts, str):
            source = folder / f"{name}.txt"
            source.write_text(texts, encoding="utf-8")
        options = ["--vocab_size=32", "--allow_smaller", "--normalisation=none"]
        run(train_tokenizer, source, *options, f"--output={output}")
    return output / "tokenizer.model"
