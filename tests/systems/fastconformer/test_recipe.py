"""configs/parakeet_tdt_110m_enhi.py by its command lines, with a tiny model in place."""

import json
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import parakeet_tdt_110m_enhi
from experiments import expand_vocab, train_tokenizer
from experiments import train as training
from jasr import checkpoint, text, tree
from jasr.systems import loading
from tests.systems.fastconformer.nemo_models import tokenizer_of

pytest.importorskip("soundfile")
pytest.importorskip("sentencepiece")
TINY = {
    "model.encoder.n_layers": 1, "model.encoder.d_model": 16, "model.encoder.n_heads": 2,
    "model.encoder.subsampling_conv_channels": 4, "model.decoder.pred_hidden": 8,
    "model.joint.joint_hidden": 8,
}  # fmt: skip


def test_an_expanded_model_is_fine_tuned_as_the_recipe_says(goldens, root, tmp_path, monkeypatch):
    config = parakeet_tdt_110m_enhi.get_config()
    config.update_from_flattened_dict(TINY)
    config = json.loads(config.to_json())
    tokenizer = text.SentencePieceTokenizer(tokenizer_of(goldens, tmp_path))
    task = loading.build(config, tokenizer)
    rows = {"audio": (1, 16000), "audio_len": (1,), "tokens": (1, 4), "token_len": (1,)}
    rows = {name: np.zeros(shape, np.int32) for name, shape in rows.items()}
    variables = jax.jit(task.init)(jax.random.key(0), {**rows, "audio": rows["audio"] / 1.0})
    variables = jax.tree.map(np.asarray, variables)
    loading.save(tmp_path / "en", {"config": config, "tokenizer": tokenizer.to_dict()}, variables)

    folder = root / "tests" / "data"
    entries = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    manifests = {}
    for name, words in (("en", "a b"), ("hi", "एक दो तीन")):
        lines = [
            {**e, "audio_filepath": str(folder / e["audio_filepath"]), "text": words}
            for e in entries
        ]
        manifests[name] = tmp_path / f"{name}.jsonl"
        manifests[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = [str(manifests["hi"]), "--vocab_size=12", f"--output={tmp_path / 'tok'}"]
    assert train_tokenizer.main([*trained, "--allow_smaller", "--normalisation=none"]) == 0
    given = [f"--checkpoint={tmp_path / 'en'}", f"--tokenizer={tmp_path / 'tok/tokenizer.model'}"]
    assert expand_vocab.main([*given, f"--output={tmp_path / 'en_hi_init'}"]) == 0

    pairs = tuple((str(path), weight) for path, weight in zip(manifests.values(), (1.0, 2.0)))
    line = [
        "train", "--config=configs/parakeet_tdt_110m_enhi.py",
        f"--config.init={tmp_path / 'en_hi_init'}", "--config.optim.name=adamw8bit",
        f"--config.data.train={pairs}", "--config.data.valid=()",
        "--config.init.freeze=('encoder/.*',)", "--config.train.steps=2",
        "--config.optim.warmup_steps=1",
        "--config.train.eval_every=2", "--config.train.log_every=1",
        "--config.train.sample_every=0", "--config.data.num_buckets=1",
        "--config.data.bucket_batch_size=(8,)",
        *(f"--config.{name}={value}" for name, value in TINY.items()),
    ]  # fmt: skip
    line = training.written_out(line)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", line)  # ml_collections looks there, too
    given = flags.FlagValues()
    chosen = config_flags.DEFINE_config_file("config", None, "", flag_values=given)
    given(line)
    training.train(json.loads(chosen.value.to_json()), tmp_path / "run")
    log = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2 and np.all(np.isfinite(losses))
    before, after = (
        tree.flatten(checkpoint.load_params(tmp_path / name)) for name in ("en_hi_init", "run")
    )
    assert len(before["joint/joint_net/bias"]) > 65 + 5  # pieces were added
    for path, array in after.items():
        moved = np.any(array != before[path])
        assert not moved if path.startswith("encoder/") else moved or "embed" in path, path


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variants hybrid and tdt"):
        parakeet_tdt_110m_enhi.get_config("ctc")
